//! `response_format`: text, any JSON object, JSON of a schema; and beside OpenAI's, a regular expression or a grammar.

use perigee_proto::v1;
use perigee_text::grammar::GrammarSource;
use serde_json::Value;

use super::error::HttpError;

/// The grammar of a format; none for text.
///
/// # Errors
/// A type that is not known, or without what it needs.
pub(crate) fn grammar(format: Option<&Value>) -> Result<Option<v1::Grammar>, HttpError> {
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    let invalid = |message: &str| HttpError::invalid("response_format", message);
    let text = |field: &str| format.get(field).and_then(Value::as_str).map(str::to_owned);
    let source = match format.get("type").and_then(Value::as_str) {
        Some("text") => return Ok(None),
        Some("json_object") => GrammarSource::json_object(),
        Some("json_schema") => {
            let schema = format.get("json_schema").and_then(|named| named.get("schema"));
            GrammarSource::JsonSchema(schema.ok_or_else(|| invalid("json_schema has no schema"))?.to_string())
        }
        Some("regex") => GrammarSource::Regex(text("regex").ok_or_else(|| invalid("regex is missing"))?),
        Some("lark") => GrammarSource::Lark(text("lark").ok_or_else(|| invalid("lark is missing"))?),
        _ => return Err(invalid("the type must be text, json_object, json_schema, regex or lark")),
    };
    Ok(Some(wire(source)))
}

/// A grammar as requests carry it.
pub(crate) fn wire(source: GrammarSource) -> v1::Grammar {
    use v1::grammar::Source;
    let source = match source {
        GrammarSource::JsonSchema(schema) => Source::JsonSchema(schema),
        GrammarSource::Regex(expression) => Source::Regex(expression),
        GrammarSource::Lark(grammar) => Source::Lark(grammar),
    };
    v1::Grammar { source: Some(source) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn formats_are_grammars() {
        let read = |format: Value| grammar(Some(&format)).map(|found| found.and_then(|found| found.source));
        use v1::grammar::Source;
        assert_eq!(grammar(None), Ok(None));
        assert_eq!(read(json!({"type": "text"})), Ok(None));
        assert_eq!(read(json!({"type": "json_object"})), Ok(Some(Source::JsonSchema(r#"{"type":"object"}"#.into()))));
        let schema = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"b": 1, "a": 2}}});
        assert_eq!(read(schema), Ok(Some(Source::JsonSchema(r#"{"b":1,"a":2}"#.into()))), "in the order given");
        assert_eq!(read(json!({"type": "regex", "regex": "a+"})), Ok(Some(Source::Regex("a+".into()))));
        for bad in
            [json!({}), json!("x"), json!({"type": "xml"}), json!({"type": "json_schema"}), json!({"type": "regex"})]
        {
            assert!(read(bad).is_err());
        }
    }
}
