//! `-hf user/repo[:quant]`: GGUF files from the Hugging Face hub, kept in its usual cache.

use anyhow::{Context, Result, bail};
use hf_hub::api::sync::ApiBuilder;
use std::path::PathBuf;

/// The quantisation taken when the name says none, as llama.cpp does.
const DEFAULT_QUANT: &str = "Q4_K_M";

/// Downloads what `name` means, unless it is in the cache, and returns the path of the model's
/// (first) file.
pub fn fetch(name: &str) -> Result<PathBuf> {
    let (repo, quant) = match name.split_once(':') {
        Some((repo, quant)) => (repo, Some(quant)),
        None => (name, None),
    };
    if repo.split('/').filter(|part| !part.is_empty()).count() != 2 {
        bail!("-hf {name}: expected user/repo or user/repo:quant");
    }
    let mut builder = ApiBuilder::from_env();
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().context("hugging face client")?;
    let repo_api = api.model(repo.to_owned());
    let info = repo_api.info().with_context(|| format!("-hf {name}"))?;
    let files: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    let parts = choose(&files, quant).with_context(|| format!("-hf {name}"))?;
    let mut paths = Vec::with_capacity(parts.len());
    for part in parts {
        paths.push(
            repo_api
                .get(part)
                .with_context(|| format!("{repo}/{part}"))?,
        );
    }
    Ok(paths.swap_remove(0))
}

/// The files of one model among those of a repository: those whose name contains `quant`, or the
/// default quantisation, or else the first model there is. Parts of a split file come together.
fn choose<'a>(files: &[&'a str], quant: Option<&str>) -> Result<Vec<&'a str>> {
    let mut models: Vec<&str> = files
        .iter()
        .copied()
        .filter(|f| {
            let lower = f.to_lowercase();
            lower.ends_with(".gguf") && !lower.contains("mmproj") && !lower.contains("imatrix")
        })
        .collect();
    models.sort_unstable();
    let Some(first) = models.first().copied() else {
        bail!("the repository has no GGUF file");
    };
    let named = |quant: &str| {
        let quant = quant.to_lowercase();
        // A whole word: `Q8_0` must not match `IQ8_0X`.
        models.iter().copied().find(|f| {
            let lower = f.to_lowercase();
            lower.match_indices(&quant).any(|(at, _)| {
                let edge =
                    |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
                edge(lower[..at].chars().next_back())
                    && edge(lower[at + quant.len()..].chars().next())
            })
        })
    };
    let chosen = match quant {
        Some(quant) => named(quant).with_context(|| {
            format!(
                "no GGUF file for `{quant}`; there are {}",
                models.join(", ")
            )
        })?,
        None => named(DEFAULT_QUANT).unwrap_or(first),
    };
    match split_stem(chosen) {
        None => Ok(vec![chosen]),
        Some(stem) => Ok(models
            .into_iter()
            .filter(|f| split_stem(f) == Some(stem))
            .collect()),
    }
}

/// What parts of one split file have in common: the name before `-00001-of-00003.gguf`.
fn split_stem(file: &str) -> Option<&str> {
    let stem = file.strip_suffix(".gguf")?;
    let (rest, n) = stem.rsplit_once("-of-")?;
    let (stem, i) = rest.rsplit_once('-')?;
    let number = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    (number(n) && number(i)).then_some(stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_quantisation_is_taken() {
        let files = [
            "README.md",
            "m-q8_0.gguf",
            "m-q4_k_m.gguf",
            "m-iq4_xs.gguf",
            "mmproj-f16.gguf",
        ];
        assert_eq!(choose(&files, Some("Q8_0")).unwrap(), ["m-q8_0.gguf"]);
        assert_eq!(choose(&files, None).unwrap(), ["m-q4_k_m.gguf"]);
        assert_eq!(choose(&files[..2], None).unwrap(), ["m-q8_0.gguf"]);
        let e = choose(&files, Some("Q4_K")).unwrap_err().to_string();
        assert!(e.contains("m-q8_0.gguf"), "{e}");
        assert!(choose(&files[..1], None).is_err());
    }

    #[test]
    fn parts_of_a_split_file_come_together() {
        let files = [
            "big-f16-00002-of-00002.gguf",
            "big-f16-00001-of-00002.gguf",
            "big-q8_0.gguf",
        ];
        let parts = choose(&files, Some("f16")).unwrap();
        assert_eq!(
            parts,
            ["big-f16-00001-of-00002.gguf", "big-f16-00002-of-00002.gguf"]
        );
    }
}
