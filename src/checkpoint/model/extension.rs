//! Extensions in stasis.img: what CRIU has no place for, each under a name of its own.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::files::{EXEC_TERMINALS, FILESYSTEM_MARKS, pipe};
use crate::checkpoint::image::{Extension, IMG_VERSION, IMG_VERSION_CRITICAL};
use crate::checkpoint::memory::{aio, compressed, marks};
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::mount::late;
use crate::checkpoint::namespaces::nested::pids;
use crate::checkpoint::namespaces::net;
use crate::checkpoint::task::{sessions, sharing};

/// The critical extensions.
const CRITICAL: &[&str] = &[
    pipe::PACKETS,
    pids::EXTENSION,
    late::EXTENSION,
    marks::EXTENSION,
    sessions::EXTENSION,
    EXEC_TERMINALS,
    sharing::EXTENSION,
    aio::EXTENSION,
    net::EXTENSION,
    FILESYSTEM_MARKS,
    compressed::EXTENSION,
];

impl Model {
    /// The bytes of an extension.
    pub fn extension_data(&self, name: &str) -> Option<&[u8]> {
        let mut all = self.extension.iter().flat_map(|x| &x.extensions);
        all.find(|x| x.name == name).map(|x| &x.data[..])
    }

    /// Adds an ancillary extension, in the place of what it held before.
    pub fn set_extension_data(&mut self, name: &str, data: Vec<u8>) {
        let all = &mut self.extension.get_or_insert_default().extensions;
        all.retain(|x| x.name != name);
        all.push(Extension { name: name.to_owned(), critical: false, data });
    }

    /// The same for what CRIU would restore wrong without: it refuses the whole set.
    pub fn set_critical_extension_data(&mut self, name: &str, data: Vec<u8>) {
        self.set_extension_data(name, data);
        let all = &mut self.extension.get_or_insert_default().extensions;
        all.iter_mut().filter(|x| x.name == name).for_each(|x| x.critical = true);
    }

    /// The version of the set: one that CRIU refuses, if it would restore it wrong.
    pub fn version(&self) -> u32 {
        let critical = self.extension.iter().flat_map(|x| &x.extensions).any(|x| x.critical);
        if critical { IMG_VERSION_CRITICAL } else { IMG_VERSION }
    }

    /// A critical extension that nothing here knows.
    pub fn unknown_extension(&self) -> Option<&str> {
        let mut all = self.extension.iter().flat_map(|x| &x.extensions);
        all.find(|x| x.critical && !CRITICAL.contains(&x.name.as_str())).map(|x| x.name.as_str())
    }

    /// What an extension of JSON says; the default without it.
    pub fn extension<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T> {
        self.extension_data(name).map_or_else(
            || Ok(T::default()),
            |data| {
                serde_json::from_slice(data)
                    .map_err(|e| Error::new(format!("extension {name} not understood: {e}")))
            },
        )
    }

    /// The same for writing.
    pub fn set_extension<T: Serialize>(&mut self, name: &str, what: &T) -> Result<()> {
        let data = serde_json::to_vec(what)
            .map_err(|e| Error::new(format!("cannot write extension {name}: {e}")))?;
        self.set_extension_data(name, data);
        Ok(())
    }

    /// The same for what CRIU would restore wrong without: it refuses the whole set.
    pub fn set_critical_extension<T: Serialize>(&mut self, name: &str, what: &T) -> Result<()> {
        let data = serde_json::to_vec(what)
            .map_err(|e| Error::new(format!("cannot write extension {name}: {e}")))?;
        self.set_critical_extension_data(name, data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_again_replaces_what_was() {
        let mut model = Model::default();
        assert!(model.extension::<Vec<u32>>("numbers").unwrap().is_empty());
        model.set_extension("others", &"text").unwrap();
        model.set_extension("numbers", &[1, 2]).unwrap();
        model.set_extension("numbers", &[3]).unwrap();
        assert_eq!(model.extension::<Vec<u32>>("numbers").unwrap(), [3]);
        assert_eq!(model.extension.as_ref().unwrap().extensions.len(), 2);
        assert_eq!((model.version(), model.unknown_extension()), (IMG_VERSION, None));
        model.set_critical_extension("numbers", &[3]).unwrap();
        assert_eq!((model.version(), model.unknown_extension()), (IMG_VERSION_CRITICAL, Some("numbers")));
        let error = model.extension::<Vec<u32>>("others").unwrap_err().to_string();
        assert!(error.contains("extension others not understood"), "{error}");
    }
}
