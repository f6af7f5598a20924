//! A log line as one JSON object: time, level, message, the event's fields, and those of the spans that it is in, so that
//! `trace_id` and `request_id` stand where collectors look for them.

use std::fmt;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Writes lines; spans' fields must be [`JsonFields`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct JsonLines;

impl<S> FormatEvent<S, JsonFields> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    JsonFields: for<'a> FormatFields<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut line = Map::new();
        line.insert("timestamp".into(), time.into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        event.record(&mut Fields(&mut line));
        line.insert("target".into(), event.metadata().target().into());
        // From the innermost span outwards: the nearest field of a name counts.
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let Some(fields) = extensions.get::<FormattedFields<JsonFields>>() else { continue };
            let Ok(fields) = serde_json::from_str::<Map<String, Value>>(fields) else { continue };
            // What is meant for exporters alone is none of a reader's business.
            for (name, value) in fields.into_iter().filter(|(name, _)| !name.starts_with("otel.")) {
                line.entry(name).or_insert(value);
            }
        }
        writeln!(writer, "{}", Value::from(line))
    }
}

/// Takes an event's fields into a line.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no other writer failed").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn lines(body: impl FnOnce()) -> Vec<Value> {
        let written = Written::default();
        let writer = written.clone();
        let layer = tracing_subscriber::fmt::layer()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), body);
        let bytes = written.0.lock().expect("no writer failed").clone();
        let text = String::from_utf8(bytes).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    #[test]
    fn a_line_has_its_fields_and_those_of_its_spans() {
        let lines = lines(|| {
            let outer =
                tracing::error_span!("request", trace_id = tracing::field::Empty, tokens = 1, otel.kind = "server");
            outer.record("trace_id", "abc");
            let inner = tracing::error_span!(parent: &outer, "session", session = "s", tokens = 2);
            tracing::info!(parent: &inner, tokens = 3, share = 0.5, done = true, left = -1, what = ?Some("x"), "said \"so\"");
            tracing::warn!(parent: &inner, "more");
            tracing::error!("alone");
        });
        let [said, more, alone] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(said["message"], "said \"so\"");
        assert_eq!(said["level"], "INFO");
        assert_eq!((&said["trace_id"], &said["session"]), (&"abc".into(), &"s".into()));
        assert_eq!((&said["tokens"], &more["tokens"]), (&3.into(), &2.into()), "the nearest counts");
        assert_eq!((&said["share"], &said["done"], &said["left"]), (&0.5.into(), &true.into(), &(-1).into()));
        assert_eq!(said["what"], "Some(\"x\")");
        assert!(said["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{said}");
        assert!(said.get("otel.kind").is_none());
        assert!(alone.get("trace_id").is_none() && alone["target"].is_string());
    }
}
