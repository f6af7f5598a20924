//! Logs, metric names and request ids.
