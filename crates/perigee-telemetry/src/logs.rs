//! What is logged, and how a line looks. Lines go to standard error; standard output belongs to commands' results. Log texts
//! are lower case, values are fields, and one trace id goes from the client to the ranks.

use tracing_subscriber::filter::{ParseError, Targets};

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

impl std::fmt::Display for LogFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// What to log, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// How a line looks.
    pub format: LogFormat,
    /// Levels by module, such as `info,perigee_router=debug`.
    pub filter: String,
}

/// What is logged where nothing else is said: warnings, and the balancer's moves. A person at a terminal came for the answer.
pub const DEFAULT_FILTER: &str = "warn,perigee_router::balance=info";

impl Default for LogOptions {
    fn default() -> Self {
        Self { format: LogFormat::default(), filter: DEFAULT_FILTER.to_owned() }
    }
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
}

impl LogOptions {
    pub(crate) fn targets(&self) -> Result<Targets, LogsError> {
        self.filter
            .parse()
            .map_err(|error: ParseError| LogsError::Filter { found: self.filter.clone(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_and_filters_are_checked() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().ok(), Some(format));
        }
        assert!("xml".parse::<LogFormat>().is_err());
        for filter in ["debug", "info,perigee_router=trace"] {
            assert!(LogOptions { filter: filter.to_owned(), ..LogOptions::default() }.targets().is_ok());
        }
        let bad = LogOptions { filter: "perigee=loud".to_owned(), ..LogOptions::default() };
        assert!(matches!(bad.targets(), Err(LogsError::Filter { .. })));
    }
}
