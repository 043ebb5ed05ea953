//! Log-probabilities of a token and of its likeliest alternatives, from raw logits.

use super::TokenProbs;

/// What a token the model gives no chance is reported with: JSON has no minus infinity.
const NEVER: f32 = f32::MIN;

/// Log-probability of every token's own logit under a soft-max over all of `logits`.
fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    max + sum.ln() as f32
}

/// The log-probability of `id` and the `n` likeliest tokens (ties: lower id first).
pub fn from_logits(logits: &[f32], id: u32, n: usize) -> TokenProbs {
    let norm = log_sum_exp(logits);
    let value = |x: f32| match x - norm {
        p if p.is_finite() => p.min(0.0),
        _ => NEVER,
    };
    TokenProbs {
        id,
        value: logits.get(id as usize).map_or(NEVER, |x| value(*x)),
        top: (likeliest(logits, n).into_iter())
            .map(|i| (i, value(logits[i as usize])))
            .collect(),
    }
}

/// Ids of the `n` largest values, best first.
fn likeliest(values: &[f32], n: usize) -> Vec<u32> {
    let n = n.min(values.len());
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    let order = |a: &u32, b: &u32| {
        let (x, y) = (values[*a as usize], values[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    if n > 0 && n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
    }
    ids.truncate(n);
    ids.sort_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_sum_to_one() {
        let logits = [1.0, 3.0, -2.0, 3.0];
        let probs = from_logits(&logits, 0, 4);
        let ids: Vec<u32> = probs.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, [1, 3, 0, 2]);
        let sum: f32 = probs.top.iter().map(|t| t.1.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(probs.value, probs.top[2].1);
        assert_eq!(from_logits(&logits, 0, 2).top, probs.top[..2]);
    }

    #[test]
    fn a_token_without_a_chance_has_a_finite_value() {
        let probs = from_logits(&[0.0, f32::NEG_INFINITY], 1, 2);
        assert_eq!(probs.value, NEVER);
        assert_eq!(probs.top, [(0, 0.0), (1, NEVER)]);
    }
}
