//! How a registry is reached, beside its specification: the options of a connection to etcd. They name files and never
//! hold a secret, since other users of a machine can read its command lines.

use std::path::PathBuf;

#[cfg(feature = "etcd")]
use crate::RegistryError;

/// Options for `--registry etcd://...`; without them etcd is spoken to in plain text and without a user.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct EtcdOptions {
    /// Certificates of the authority that signs etcd's, PEM; turns TLS to etcd on.
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate chain to show to etcd, PEM.
    #[arg(long, value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// Private key of that certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd.
    #[arg(long, value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// File with that user's password.
    #[arg(long, value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
}

/// What the options' files hold.
#[cfg(feature = "etcd")]
#[derive(Clone, Default)]
pub(crate) struct EtcdSecrets {
    pub(crate) authority: Option<Vec<u8>>,
    /// Certificate chain and private key.
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
    /// Name and password.
    pub(crate) user: Option<(String, String)>,
}

impl EtcdOptions {
    /// Everything that is wrong with them.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.etcd_cert.is_some() != self.etcd_key.is_some() {
            faults.push("--etcd-cert and --etcd-key: each needs the other".to_owned());
        }
        if self.etcd_cert.is_some() && self.etcd_ca.is_none() {
            faults.push("--etcd-cert: a certificate is shown over TLS only, which --etcd-ca turns on".to_owned());
        }
        if self.etcd_user.is_some() != self.etcd_password_file.is_some() {
            faults.push("--etcd-user and --etcd-password-file: each needs the other".to_owned());
        }
        faults
    }

    /// Reads the files as they are now: certificates and passwords change while a process runs.
    ///
    /// # Errors
    /// [`RegistryError::Read`] for a file, [`RegistryError::Options`] for contradicting options.
    #[cfg(feature = "etcd")]
    pub(crate) fn secrets(&self) -> Result<EtcdSecrets, RegistryError> {
        match self.faults() {
            faults if faults.is_empty() => {}
            faults => return Err(RegistryError::Options { faults: faults.join("\n") }),
        }
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|source| RegistryError::Read { path: path.clone(), source });
        let identity = match (&self.etcd_cert, &self.etcd_key) {
            (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
            _ => None,
        };
        let user = match (&self.etcd_user, &self.etcd_password_file) {
            (Some(name), Some(path)) => {
                let password = String::from_utf8(read(path)?).map_err(|_| RegistryError::Malformed {
                    path: path.clone(),
                    reason: "a password must be UTF-8".to_owned(),
                })?;
                // Editors end a file with a line feed that is no part of a password.
                Some((name.clone(), password.trim_end_matches(['\r', '\n']).to_owned()))
            }
            _ => None,
        };
        Ok(EtcdSecrets { authority: self.etcd_ca.as_ref().map(read).transpose()?, identity, user })
    }
}

#[cfg(feature = "etcd")]
impl std::fmt::Debug for EtcdSecrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EtcdSecrets")
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "etcd"))]
mod tests {
    use super::*;

    #[test]
    fn options_come_in_pairs_and_files_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| Some(folder.path().join(name));
        std::fs::write(folder.path().join("password"), "secret\n").expect("written");
        let user = EtcdOptions {
            etcd_user: Some("perigee".to_owned()),
            etcd_password_file: path("password"),
            ..EtcdOptions::default()
        };
        let secrets = user.secrets().expect("good options");
        assert_eq!(secrets.user, Some(("perigee".to_owned(), "secret".to_owned())));
        assert!(!format!("{secrets:?}").contains("secret"), "passwords stay out of logs");
        for (options, faults) in [
            (EtcdOptions { etcd_password_file: None, ..user.clone() }, 1),
            (EtcdOptions { etcd_user: None, ..user.clone() }, 1),
            (EtcdOptions { etcd_cert: path("c"), ..user.clone() }, 2),
            (EtcdOptions { etcd_cert: path("c"), etcd_key: path("k"), ..user.clone() }, 1),
        ] {
            assert_eq!(options.faults().len(), faults, "{options:?}");
            assert!(matches!(options.secrets(), Err(RegistryError::Options { .. })));
        }
        let missing = EtcdOptions { etcd_ca: path("no such file"), ..user };
        assert!(missing.secrets().expect_err("missing").to_string().contains("no such file"));
    }
}
