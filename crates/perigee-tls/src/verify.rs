//! Which servers a client of this process trusts: those with a certificate of a trusted authority for the name or address
//! that was dialled, and any process that holds this process's own certificate. Clients are judged by rustls alone, but for ranks
//! without an authority, which take each other's own.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

/// A verifier of servers. A cluster may give one certificate to all of its processes; their addresses change with every
/// start and stand in no certificate, but only they hold its private key, so its presenter is one of them.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    provider: Arc<CryptoProvider>,
    /// None where nobody is trusted to name a server.
    by_name: Option<Arc<WebPkiServerVerifier>>,
    own: Option<CertificateDer<'static>>,
}

impl ServerVerifier {
    pub(crate) fn new(
        provider: Arc<CryptoProvider>,
        roots: Arc<RootCertStore>,
        own: Option<CertificateDer<'static>>,
    ) -> Result<Self, Error> {
        let by_name = match roots.is_empty() {
            true => None,
            false => Some(
                WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                    .build()
                    .map_err(|error| Error::General(error.to_string()))?,
            ),
        };
        Ok(Self { provider, by_name, own })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The handshake proves afterwards that the presenter has its private key.
        if self.own.as_ref().is_some_and(|own| own.as_ref() == certificate.as_ref()) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.by_name {
            Some(by_name) => by_name.verify_server_cert(certificate, chain, name, ocsp, now),
            None => Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A verifier of clients that takes this process's own certificate and no other, for ranks that were named no authority.
#[derive(Debug)]
pub(crate) struct OwnCertificate {
    provider: Arc<CryptoProvider>,
    own: CertificateDer<'static>,
}

impl OwnCertificate {
    pub(crate) fn new(provider: Arc<CryptoProvider>, own: CertificateDer<'static>) -> Self {
        Self { provider, own }
    }
}

impl ClientCertVerifier for OwnCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        // The handshake proves afterwards that the presenter has its private key.
        if self.own.as_ref() == certificate.as_ref() {
            return Ok(ClientCertVerified::assertion());
        }
        Err(Error::InvalidCertificate(CertificateError::UnknownIssuer))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
