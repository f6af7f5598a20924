//! The options of logs and traces, the same for every process that serves.

use std::str::FromStr;

use crate::logs::{DEFAULT_FILTER, LogFormat, LogOptions};

/// Options of a process's logs and traces.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct TelemetryOptions {
    /// What is logged to standard error: a level, or levels by module such as info,perigee_router=debug.
    #[arg(long, value_name = "FILTER", default_value = DEFAULT_FILTER)]
    pub log: String,
    /// How a log line looks: text, or json (one object a line).
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = LogFormat::from_str)]
    pub log_format: LogFormat,
    /// Where traces are sent: a collector's OTLP endpoint over gRPC, such as http://HOST:4317. Nothing waits for it; what it
    /// does not take in time is dropped.
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Share of requests to trace, from 0 to 1, where the client does not say by traceparent whether it wants that. The
    /// router decides for the whole request.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub otlp_sample: f64,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        let LogOptions { format, filter } = LogOptions::default();
        Self { log: filter, log_format: format, otlp_endpoint: None, otlp_sample: 1.0 }
    }
}

impl TelemetryOptions {
    /// How to log.
    pub fn logs(&self) -> LogOptions {
        LogOptions { format: self.log_format, filter: self.log.clone() }
    }

    /// Everything that is wrong with them.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> =
            self.logs().targets().err().map(|error| format!("--log: {error}")).into_iter().collect();
        if !(0.0..=1.0).contains(&self.otlp_sample) {
            faults.push(format!("--otlp-sample: expected 0 to 1, found {}", self.otlp_sample));
        }
        if let Some(endpoint) = &self.otlp_endpoint
            && !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme))
        {
            faults.push(format!("--otlp-endpoint: expected http://HOST:PORT or https://HOST:PORT, found {endpoint:?}"));
        }
        faults
    }

    /// The same options as arguments of another process on this machine.
    pub fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--log={}", self.log),
            format!("--log-format={}", self.log_format),
            format!("--otlp-sample={}", self.otlp_sample),
        ];
        arguments.extend(self.otlp_endpoint.as_ref().map(|endpoint| format!("--otlp-endpoint={endpoint}")));
        arguments
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        telemetry: TelemetryOptions,
    }

    #[test]
    fn options_pass_to_other_processes_whole() {
        let words = ["x", "--log=info", "--log-format=json", "--otlp-endpoint=http://h:4317", "--otlp-sample=0.25"];
        let options = Command::parse_from(words).telemetry;
        let again = ["x".to_owned()].into_iter().chain(options.to_arguments());
        assert_eq!(Command::parse_from(again).telemetry, options);
        assert_eq!(Command::parse_from(["x"]).telemetry, TelemetryOptions::default());
        assert!(options.faults().is_empty());
    }

    #[test]
    fn every_fault_names_its_option() {
        let words = ["x", "--log=perigee=loud", "--otlp-endpoint=h:4317", "--otlp-sample=1.5"];
        let faults = Command::parse_from(words).telemetry.faults();
        assert_eq!(faults.len(), 3, "{faults:?}");
        for (fault, option) in faults.iter().zip(["--log", "--otlp-sample", "--otlp-endpoint"]) {
            assert!(fault.starts_with(&format!("{option}: ")), "{fault}");
        }
        assert!(Command::try_parse_from(["x", "--log-format=xml"]).is_err());
    }
}
