//! Certificates for tests: an authority made on the spot, and what it signs, as files for the options of TLS. Nothing of
//! it leaves the folder it is written to.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::error::{Result, TestkitError};

/// An authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    /// Its own certificate.
    pub certificate: PathBuf,
}

/// A certificate with its private key.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The private key's file.
    pub key: PathBuf,
}

impl Authority {
    /// Makes one whose files are in `folder` and begin with `name`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn new(folder: &Path, name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::<String>::new()).map_err(fault)?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().map_err(fault)?;
        let certificate = folder.join(format!("{name}.pem"));
        write(&certificate, &params.self_signed(&key).map_err(fault)?.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), certificate })
    }

    /// Signs a certificate for host names and IP addresses, good for servers and clients; its files begin with `name` and
    /// take the place of former ones.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn issue(&self, name: &str, hosts: &[&str]) -> Result<Identity> {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).map_err(fault)?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().map_err(fault)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(fault)?;
        let identity = Identity {
            certificate: self.folder.join(format!("{name}.pem")),
            key: self.folder.join(format!("{name}.key")),
        };
        write(&identity.certificate, &signed.pem())?;
        write(&identity.key, &key.serialize_pem())?;
        Ok(identity)
    }

    /// The options of a listener or client with this identity and this authority.
    pub fn options(&self, identity: &Identity) -> Vec<String> {
        vec![
            format!("--tls-ca={}", self.certificate.display()),
            format!("--tls-cert={}", identity.certificate.display()),
            format!("--tls-key={}", identity.key.display()),
        ]
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(TestkitError::file(path))
}

fn fault(error: rcgen::Error) -> TestkitError {
    TestkitError::Process { what: "a certificate".into(), message: error.to_string() }
}
