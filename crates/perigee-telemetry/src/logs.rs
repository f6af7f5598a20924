//! Log lines on standard error, as text or JSON, filtered by level and module. Standard output belongs to commands'
//! results. Log texts are lower case, values are fields, and one request id goes from the client to the ranks.

use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = LogsError;

    fn from_str(text: &str) -> Result<Self, LogsError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogsError::Format { found: text.to_owned() }),
        }
    }
}

/// What to log, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// How a line looks.
    pub format: LogFormat,
    /// Levels by module, such as `info,perigee_router=debug`; empty is `info`.
    pub filter: String,
}

/// Logs that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// An unknown format.
    #[error("log format is {found:?}, but it must be text or json")]
    Format {
        /// What was given.
        found: String,
    },
    /// A filter that does not parse.
    #[error("log filter {found:?}: {reason}")]
    Filter {
        /// What was given.
        found: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Logs were set up before.
    #[error("logs are set up twice: {reason}")]
    Twice {
        /// What the library said.
        reason: String,
    },
}

impl LogOptions {
    fn env_filter(&self) -> Result<EnvFilter, LogsError> {
        let directives = if self.filter.is_empty() { "info" } else { &self.filter };
        EnvFilter::try_new(directives)
            .map_err(|error| LogsError::Filter { found: self.filter.clone(), reason: error.to_string() })
    }

    /// Sends the logs of this process to standard error. Once a process.
    ///
    /// # Errors
    /// [`LogsError::Filter`] for a filter that does not parse, [`LogsError::Twice`] for a second call.
    pub fn install(&self) -> Result<(), LogsError> {
        let registry = tracing_subscriber::registry().with(self.env_filter()?);
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let installed = match self.format {
            LogFormat::Text => registry.with(lines.with_ansi(false)).try_init(),
            LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
        };
        installed.map_err(|error| LogsError::Twice { reason: error.to_string() })
    }
}

/// The span that puts a request's id on every log line about it.
pub fn request_span(request_id: &str) -> tracing::Span {
    tracing::info_span!("request", request_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_and_filters_are_checked() {
        assert_eq!("json".parse::<LogFormat>().ok(), Some(LogFormat::Json));
        assert_eq!("text".parse::<LogFormat>().ok(), Some(LogFormat::Text));
        assert!("xml".parse::<LogFormat>().is_err());
        for filter in ["", "debug", "info,perigee_router=trace"] {
            assert!(LogOptions { filter: filter.to_owned(), ..LogOptions::default() }.env_filter().is_ok());
        }
        let bad = LogOptions { filter: "perigee=loud".to_owned(), ..LogOptions::default() };
        assert!(matches!(bad.env_filter(), Err(LogsError::Filter { .. })));
    }
}
