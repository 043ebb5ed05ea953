//! The text after `--memory`: a name and options.

use crate::error::{Error, Result};
use std::str::FromStr;

/// A memory's description: `NAME` or `NAME:key=value,key=value`.
#[derive(Clone, Debug, PartialEq)]
pub struct MemorySpec {
    /// Row of [`super::MEMORIES`].
    pub name: String,
    /// Options in the order given.
    pub options: Vec<(String, String)>,
    /// The description as written.
    pub text: String,
}

impl MemorySpec {
    /// The option `key` parsed as `T`, or `default`.
    pub fn get<T: FromStr>(&self, key: &str, default: T) -> Result<T> {
        match self.options.iter().rev().find(|(k, _)| k == key) {
            None => Ok(default),
            Some((_, value)) => value.parse().map_err(|_| {
                self.refuse(format!(
                    "`{key}` expects {}, got `{value}`",
                    std::any::type_name::<T>()
                        .rsplit("::")
                        .next()
                        .unwrap_or("another value")
                ))
            }),
        }
    }

    /// Whether `key` was given.
    pub fn has(&self, key: &str) -> bool {
        self.options.iter().any(|(k, _)| k == key)
    }

    /// An error about this description.
    pub fn refuse(&self, what: impl Into<String>) -> Error {
        Error::Memory {
            spec: self.text.clone(),
            what: what.into(),
        }
    }
}

impl FromStr for MemorySpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<MemorySpec> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut options = Vec::new();
        for part in rest.split(',').filter(|p| !p.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(Error::Memory {
                    spec: text.into(),
                    what: format!("expected key=value, got `{part}`"),
                });
            };
            options.push((key.trim().replace(['-', '.'], "_"), value.trim().into()));
        }
        Ok(MemorySpec {
            name: name.trim().into(),
            options,
            text: text.into(),
        })
    }
}

impl std::fmt::Display for MemorySpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}
