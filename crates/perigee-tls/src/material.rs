//! What the files hold, made ready for use: an identity, the authorities that are trusted, and the settings of handshakes
//! made of both. Files that change while a process runs are read again; a bad new file leaves the former content in force.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::error::TlsError;
use crate::listener::Purpose;
use crate::verify::{OwnCertificate, ServerVerifier};

/// How old the knowledge of the files may be when a connection is made.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// The files that were named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, the own certificate first.
    pub cert: Option<PathBuf>,
    /// Private key of the own certificate.
    pub key: Option<PathBuf>,
    /// Certificates of authorities.
    pub ca: Option<PathBuf>,
}

/// TLS that is on: the files and what was last read from them.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    material: Arc<Material>,
    stamps: Stamps,
    looked: Instant,
}

/// When each file was last written, and its length.
type Stamps = Vec<Option<(SystemTime, u64)>>;

/// Everything that handshakes need.
#[derive(Debug)]
pub(crate) struct Material {
    /// None without an own certificate.
    pub(crate) servers: Option<Servers>,
    pub(crate) client: Arc<ClientConfig>,
    /// None without an own certificate.
    ranks: Option<RankTls>,
}

/// TLS among the ranks of one replica: both sides show a certificate, of the authority where one was named, else the same one.
#[derive(Debug, Clone)]
pub struct RankTls {
    /// For the rank that listens.
    pub server: Arc<ServerConfig>,
    /// For the rank that connects.
    pub client: Arc<ClientConfig>,
}

/// What ranks speak over TLS, so that no other service's connection is taken for theirs.
const RANK_PROTOCOL: &[u8] = b"perigee-ranks";

/// Settings by what a listener is for.
#[derive(Debug)]
pub(crate) struct Servers {
    public: Arc<ServerConfig>,
    internal: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

impl Servers {
    pub(crate) fn of(&self, purpose: Purpose) -> &Arc<ServerConfig> {
        match purpose {
            Purpose::Public => &self.public,
            Purpose::Internal => &self.internal,
            Purpose::Http => &self.http,
        }
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`] names the option and the file that cannot be used.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let stamps = files.stamps();
        let material = Arc::new(files.read()?);
        Ok(Self { files, state: Mutex::new(State { material, stamps, looked: Instant::now() }) })
    }

    /// Whether an authority was named: then whoever connects to the internal service must show a certificate of it.
    pub fn has_authority(&self) -> bool {
        self.files.ca.is_some()
    }

    /// What a client of an HTTP server needs: the same certificates, and no protocol chosen.
    pub fn https_client(&self) -> ClientConfig {
        let mut config = ClientConfig::clone(&self.material().client);
        config.alpn_protocols.clear();
        config
    }

    /// TLS among ranks; none without an own certificate.
    pub fn ranks(&self) -> Option<RankTls> {
        self.material().ranks.clone()
    }

    /// Reads the files again if they have changed. Connections do this by themselves, but not more often than every 10 s.
    pub fn refresh(&self) {
        self.state.lock().refresh(&self.files);
    }

    /// What is in force, after a look at the files where the last one is long ago.
    pub(crate) fn material(&self) -> Arc<Material> {
        let mut state = self.state.lock();
        if state.looked.elapsed() >= LOOK_AGAIN {
            state.refresh(&self.files);
        }
        state.material.clone()
    }
}

impl State {
    fn refresh(&mut self, files: &TlsFiles) {
        self.looked = Instant::now();
        let stamps = files.stamps();
        if stamps == self.stamps {
            return;
        }
        // Remembered even where the reading fails: the same bad files are told of once.
        self.stamps = stamps;
        match files.read() {
            Ok(material) => {
                tracing::info!("the TLS files changed and were read again");
                self.material = Arc::new(material);
            }
            Err(error) => tracing::warn!(%error, "the TLS files changed and cannot be used; the former stay"),
        }
    }
}

impl TlsFiles {
    fn stamps(&self) -> Stamps {
        let stamp = |path: &PathBuf| {
            let facts = std::fs::metadata(path).ok()?;
            Some((facts.modified().ok()?, facts.len()))
        };
        [&self.cert, &self.key, &self.ca].into_iter().map(|path| path.as_ref().and_then(stamp)).collect()
    }

    fn read(&self) -> Result<Material, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((certificates("--tls-cert", cert)?, private_key(key)?)),
            _ => None,
        };
        let authority = self.ca.as_deref().map(authorities).transpose()?;
        let own = identity.as_ref().and_then(|(chain, _)| chain.first().cloned());
        let servers = match &identity {
            Some((chain, key)) => Some(Servers::new(&provider, chain, key, authority.as_ref())?),
            None => None,
        };
        let roots = authority.clone().unwrap_or_else(|| Arc::new(system_authorities()));
        let verifier = Arc::new(ServerVerifier::new(provider.clone(), roots, own)?);
        let ranks = match &identity {
            Some((chain, key)) => Some(RankTls::new(&provider, chain, key, authority.as_ref(), verifier.clone())?),
            None => None,
        };
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut client = match identity {
            Some((chain, key)) => client.with_client_auth_cert(chain, key)?,
            None => client.with_no_client_auth(),
        };
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Material { servers, client: Arc::new(client), ranks })
    }
}

impl RankTls {
    fn new(
        provider: &Arc<CryptoProvider>,
        chain: &[CertificateDer<'static>],
        key: &PrivateKeyDer<'static>,
        authority: Option<&Arc<RootCertStore>>,
        verifier: Arc<ServerVerifier>,
    ) -> Result<Self, TlsError> {
        let clients: Arc<dyn ClientCertVerifier> = match (authority, chain.first()) {
            (Some(roots), _) => WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?,
            (None, Some(own)) => Arc::new(OwnCertificate::new(provider.clone(), own.clone())),
            (None, None) => return Err(rustls::Error::NoCertificatesPresented.into()),
        };
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.to_vec(), key.clone_key())?;
        // A group is formed once: nobody comes back with a ticket.
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![RANK_PROTOCOL.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(chain.to_vec(), key.clone_key())?;
        client.alpn_protocols = vec![RANK_PROTOCOL.to_vec()];
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }
}

impl Servers {
    fn new(
        provider: &Arc<CryptoProvider>,
        chain: &[CertificateDer<'static>],
        key: &PrivateKeyDer<'static>,
        authority: Option<&Arc<RootCertStore>>,
    ) -> Result<Self, TlsError> {
        let server = |purpose: Purpose| -> Result<Arc<ServerConfig>, TlsError> {
            let builder =
                ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
            let builder = match (purpose, authority) {
                (Purpose::Http, _) | (_, None) => builder.with_no_client_auth(),
                (_, Some(roots)) => {
                    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
                    let verifier = match purpose {
                        Purpose::Internal => verifier,
                        Purpose::Public | Purpose::Http => verifier.allow_unauthenticated(),
                    };
                    let verifier = verifier.build().map_err(|error| rustls::Error::General(error.to_string()))?;
                    builder.with_client_cert_verifier(verifier)
                }
            };
            let mut config = builder.with_single_cert(chain.to_vec(), key.clone_key())?;
            let protocol: &[u8] = if purpose == Purpose::Http { b"http/1.1" } else { b"h2" };
            config.alpn_protocols = vec![protocol.to_vec()];
            Ok(Arc::new(config))
        };
        Ok(Self {
            public: server(Purpose::Public)?,
            internal: server(Purpose::Internal)?,
            http: server(Purpose::Http)?,
        })
    }
}

fn bytes(option: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { option, path: path.to_owned(), source })
}

fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |reason: String| TlsError::Content { option, path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes(option, path)?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(content("it holds no PEM certificate".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(content(format!("it is not PEM: {error}"))),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let option = "--tls-key";
    PrivateKeyDer::from_pem_slice(&bytes(option, path)?).map_err(|error| {
        let reason = format!("it holds no PEM private key: {error}");
        TlsError::Content { option, path: path.to_owned(), reason }
    })
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let option = "--tls-ca";
    let mut roots = RootCertStore::empty();
    for certificate in certificates(option, path)? {
        roots.add(certificate).map_err(|error| {
            let reason = format!("a certificate cannot be an authority: {error}");
            TlsError::Content { option, path: path.to_owned(), reason }
        })?;
    }
    Ok(Arc::new(roots))
}

/// The authorities that this machine trusts; perhaps none.
fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "an authority of this machine cannot be read");
    }
    // Old roots that today's rules refuse are left out.
    roots.add_parsable_certificates(found.certs);
    roots
}
