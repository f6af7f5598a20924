//! TLS of every listener and every client of Perigee: the options that name its files, the certificates read from them
//! (again when they change), who is let in, and connections that are plain TCP where no files were named. It knows no
//! service; who needs a client's certificate is told by whoever offers the service.

mod blocking;
mod client;
mod error;
mod http;
mod listener;
mod material;
mod options;
mod peer;
mod stream;
mod verify;

pub use blocking::{Reader, Writer};
pub use client::{Dialer, with_causes};
pub use error::TlsError;
pub use http::serve_http;
pub use listener::{Incoming, Listening, Purpose};
pub use material::{RankTls, Tls, TlsFiles};
pub use options::{ClientTlsOptions, ServerTlsOptions};
pub use peer::{Peer, require_certificate};
pub use stream::Stream;
