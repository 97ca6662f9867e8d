//! `tests/known-failures`: tests that are known to fail. They run all the same; their failure counts as a skip, with the
//! reason, and their passing as a failure, so that the list gets shorter.

use std::collections::BTreeMap;
use std::path::Path;

/// Names of tests, and why they fail.
#[derive(Debug, Default)]
pub struct Known(BTreeMap<String, String>);

impl Known {
    /// Reads the lines of these suites: `suite/NAME: REASON`.
    pub fn read(path: &Path, suites: &[String]) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut known = BTreeMap::new();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let (name, reason) = line
                .split_once(": ")
                .ok_or_else(|| format!("{}: not `NAME: REASON`: {line}", path.display()))?;
            if let Some((suite, test)) = name.split_once('/')
                && suites.iter().any(|s| s == suite)
            {
                known.insert(test.to_owned(), reason.to_owned());
            }
        }
        Ok(Self(known))
    }

    /// Why this test fails, if that is known. A name without a mode means all of the fixture's.
    pub fn reason(&self, fixture: &str, mode: &str) -> Option<&str> {
        self.0.get(&format!("{fixture}/{mode}")).or_else(|| self.0.get(fixture)).map(String::as_str)
    }
}
