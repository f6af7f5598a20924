//! Where a router's random numbers come from: the system's generator, or another source under a simulation. Session names
//! are made of them and must not be guessed.

use std::fmt;
use std::sync::Arc;

use perigee_proto::status::{ErrorKind, WireError};

use crate::error::RouterError;

type Source = dyn Fn() -> Result<u64, String> + Send + Sync;

/// A source of random numbers.
#[derive(Clone)]
pub struct Random(Arc<Source>);

impl Random {
    /// The system's generator.
    ///
    /// # Errors
    /// [`RouterError::Random`] where it gives nothing.
    pub fn system() -> Result<Self, RouterError> {
        getrandom::u64().map_err(|error| RouterError::Random(error.to_string()))?;
        Ok(Self(Arc::new(|| getrandom::u64().map_err(|error| error.to_string()))))
    }

    /// Another source, for simulations.
    pub fn from_source(source: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(move || Ok(source())))
    }

    pub(crate) fn next(&self) -> Result<u64, WireError> {
        (self.0)().map_err(|reason| WireError::new(ErrorKind::Internal, format!("random numbers: {reason}")))
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Random")
    }
}
