//! The Mersenne Twister MT19937 and uniform draws as the C++ standard library makes them, so that one seed gives
//! the same draws as in llama.cpp (M. Matsumoto, T. Nishimura, 1998).

const N: usize = 624;
const M: usize = 397;

/// A seeded generator that knows how many 32-bit draws it has made.
#[derive(Clone)]
pub(super) struct Rng {
    state: Box<[u32; N]>,
    at: usize,
    n_draws: u64,
}

impl Rng {
    pub fn new(seed: u32) -> Rng {
        let mut state = Box::new([0u32; N]);
        state[0] = seed;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Rng {
            state,
            at: N,
            n_draws: 0,
        }
    }

    /// Draws made since the seed.
    pub fn n_draws(&self) -> u64 {
        self.n_draws
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        self.n_draws += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) from two draws.
    pub fn next_f64(&mut self) -> f64 {
        let low = f64::from(self.next_u32());
        let high = f64::from(self.next_u32());
        let r = (low + high * 4_294_967_296.0) / 18_446_744_073_709_551_616.0;
        r.min(1.0 - f64::EPSILON / 2.0)
    }

    /// Uniform in [0, 1) from one draw.
    pub fn next_f32(&mut self) -> f32 {
        let r = self.next_u32() as f32 / 4_294_967_296.0;
        r.min(1.0 - f32::EPSILON / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_values() {
        // The standard requires 4123659995 as the 10000th draw from the default seed.
        let mut rng = Rng::new(5489);
        let last = (0..10000).map(|_| rng.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
        assert_eq!(rng.n_draws(), 10000);
        let mut rng = Rng::new(1);
        assert!((0..1000).all(|_| (0.0..1.0).contains(&rng.next_f64())));
        assert!((0..1000).all(|_| (0.0..1.0).contains(&rng.next_f32())));
    }
}
