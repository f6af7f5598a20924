//! The options of TLS on the command line: one set for processes that listen, one for commands that only connect. Faults
//! are reported before a port opens.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Tls, TlsError, TlsFiles};

/// Options of a process that listens.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct ServerTlsOptions {
    /// Certificate chain of this process, PEM; turns TLS on for every listener.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of that certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Certificates of the authority that signs this cluster's, PEM: with it, routers and replicas require each other's
    /// certificates, and operators need one.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Listen without TLS on other than loopback addresses.
    #[arg(long)]
    pub insecure: bool,
}

impl ServerTlsOptions {
    /// Everything that is wrong with them, given the listeners that they are for, each with the option that sets it.
    pub fn faults(&self, listeners: &[(&str, SocketAddr)]) -> Vec<String> {
        let mut faults = pair(self.tls_cert.is_some(), self.tls_key.is_some());
        if self.tls_ca.is_some() && self.tls_cert.is_none() {
            faults.push("--tls-ca: a process that listens needs --tls-cert and --tls-key with it".to_owned());
        }
        for (option, address) in listeners {
            if self.tls_cert.is_none() && !self.insecure && !address.ip().is_loopback() {
                faults.push(format!(
                    "{option}: {address} is not a loopback address; give --tls-cert and --tls-key, or --insecure"
                ));
            }
        }
        faults
    }

    /// Reads the files; none where TLS is off.
    ///
    /// # Errors
    /// [`TlsError`] for contradicting options and for files that cannot be used.
    pub fn load(&self) -> Result<Option<Arc<Tls>>, TlsError> {
        match self.faults(&[]) {
            faults if faults.is_empty() => {}
            faults => return Err(TlsError::Options(faults.join("\n"))),
        }
        let files = TlsFiles { cert: self.tls_cert.clone(), key: self.tls_key.clone(), ca: self.tls_ca.clone() };
        files.cert.is_some().then(|| Tls::load(files).map(Arc::new)).transpose()
    }

    /// The same options as arguments of another process on this machine.
    pub fn to_arguments(&self) -> Vec<String> {
        let files = [("tls-cert", &self.tls_cert), ("tls-key", &self.tls_key), ("tls-ca", &self.tls_ca)];
        let files = files.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?)));
        let mut arguments: Vec<String> = files.map(|(name, file)| format!("--{name}={}", file.display())).collect();
        arguments.extend(self.insecure.then(|| "--insecure".to_owned()));
        arguments
    }

    /// The options with which a client in this process reaches this process's own listeners.
    pub fn as_client(&self) -> ClientTlsOptions {
        ClientTlsOptions {
            tls_cert: self.tls_cert.clone(),
            tls_key: self.tls_key.clone(),
            tls_ca: self.tls_ca.clone(),
            insecure: self.insecure,
        }
    }
}

/// Options of a command that only connects.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct ClientTlsOptions {
    /// Certificates of the authority that signed the router's, PEM; turns TLS on. With an address https://HOST:PORT and
    /// without this option, the system's authorities count.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Certificate chain to show to the router, PEM; operators' commands need one where the router has --tls-ca.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of that certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Connect without TLS to other than loopback addresses.
    #[arg(long)]
    pub insecure: bool,
}

impl ClientTlsOptions {
    /// Whether the options alone turn TLS on.
    pub fn is_on(&self) -> bool {
        self.tls_ca.is_some() || self.tls_cert.is_some()
    }

    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`] for contradicting options and for files that cannot be used.
    pub fn load(&self) -> Result<Arc<Tls>, TlsError> {
        match pair(self.tls_cert.is_some(), self.tls_key.is_some()) {
            faults if faults.is_empty() => {}
            faults => return Err(TlsError::Options(faults.join("\n"))),
        }
        let files = TlsFiles { cert: self.tls_cert.clone(), key: self.tls_key.clone(), ca: self.tls_ca.clone() };
        Tls::load(files).map(Arc::new)
    }
}

fn pair(cert: bool, key: bool) -> Vec<String> {
    match (cert, key) {
        (true, false) => vec!["--tls-cert: the certificate needs its private key, --tls-key".to_owned()],
        (false, true) => vec!["--tls-key: the private key needs its certificate, --tls-cert".to_owned()],
        (true, true) | (false, false) => Vec::new(),
    }
}
