//! From the text of `--registry` to the registry it means. The registry in memory has no such text: only the program that
//! holds it can use it.

use std::sync::Arc;

use crate::{EtcdOptions, FileRegistry, Registry, RegistryError};

/// Opens `file:PATH` or `etcd://HOST:PORT,HOST:PORT[/PREFIX]`, the latter with `etcd`. Files are read at once; etcd is not
/// contacted yet, so that processes start in any order.
///
/// # Errors
/// [`RegistryError::Specification`] for anything else; [`RegistryError::NotBuilt`] for etcd without that feature; those of
/// [`FileRegistry::open`], and those of the options' files.
pub fn open(specification: &str, etcd: &EtcdOptions) -> Result<Arc<dyn Registry>, RegistryError> {
    if let Some(path) = specification.strip_prefix("file:") {
        return Ok(Arc::new(FileRegistry::open(path)?));
    }
    if specification.starts_with("etcd://") {
        return open_etcd(specification, etcd);
    }
    let reason = "it is of no known kind".to_owned();
    Err(RegistryError::Specification { specification: specification.to_owned(), reason })
}

#[cfg(feature = "etcd")]
fn open_etcd(specification: &str, options: &EtcdOptions) -> Result<Arc<dyn Registry>, RegistryError> {
    let config = crate::EtcdConfig { access: options.clone(), ..specification.parse()? };
    Ok(Arc::new(crate::EtcdRegistry::connect(config)?))
}

#[cfg(not(feature = "etcd"))]
fn open_etcd(specification: &str, _: &EtcdOptions) -> Result<Arc<dyn Registry>, RegistryError> {
    Err(RegistryError::NotBuilt { specification: specification.to_owned(), feature: "etcd" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(specification: &str) -> RegistryError {
        open(specification, &EtcdOptions::default()).err().unwrap_or_else(|| panic!("{specification:?} was opened"))
    }

    #[test]
    fn unknown_kinds_are_refused() {
        for specification in ["", "replicas.json", "http://h:1", "etcd:h:1"] {
            let error = refusal(specification);
            assert!(matches!(error, RegistryError::Specification { .. }), "{specification:?}: {error}");
        }
        assert!(matches!(refusal("file:/no/such/replicas.json"), RegistryError::Read { .. }));
    }

    #[cfg(not(feature = "etcd"))]
    #[test]
    fn etcd_without_its_feature_is_an_error_that_names_the_feature() {
        let error = refusal("etcd://127.0.0.1:2379");
        assert!(matches!(error, RegistryError::NotBuilt { feature: "etcd", .. }));
        assert!(error.to_string().contains("--features etcd"), "{error}");
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn etcd_is_opened_before_it_runs() {
        assert!(open("etcd://127.0.0.1:1", &EtcdOptions::default()).is_ok());
        let missing = EtcdOptions { etcd_ca: Some("/no/such/ca.pem".into()), ..EtcdOptions::default() };
        let error = open("etcd://127.0.0.1:1", &missing).err().expect("a file is missing");
        assert!(error.to_string().contains("/no/such/ca.pem"), "{error}");
        assert!(matches!(refusal("etcd://"), RegistryError::Specification { .. }));
    }
}
