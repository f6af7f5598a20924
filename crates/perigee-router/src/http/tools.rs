//! `tools` and `tool_choice`: which calls a model may or must make. A forced call is a grammar, so that any model makes it.

use std::sync::Arc;

use perigee_proto::v1;
use perigee_text::Tokenizer;
use perigee_text::tool_calls::{CallableTool, calls_grammar};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::HttpError;

/// A tool, as the template gets it.
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub(crate) struct Tool(Map<String, Value>);

impl Tool {
    /// The whole object.
    pub(crate) fn object(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// What a call of it must be; none where it has no function with a name.
    fn callable(&self) -> Option<CallableTool> {
        let function = self.0.get("function")?;
        let name = function.get("name")?.as_str()?.to_owned();
        let parameters = function.get("parameters").filter(|parameters| parameters.is_object());
        Some(CallableTool { name, parameters: parameters.cloned().unwrap_or_else(|| json!({"type": "object"})) })
    }
}

/// What a model may do with tools.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ToolChoice {
    /// Nothing.
    None,
    /// As it likes.
    Auto,
    /// It must call these, and say nothing else.
    Calls(Vec<CallableTool>),
}

/// Reads both fields.
///
/// # Errors
/// A tool without a name, or a choice that names none of them.
pub(crate) fn choice(tools: &[Tool], choice: Option<&Value>) -> Result<ToolChoice, HttpError> {
    let callable = |(at, tool): (usize, &Tool)| {
        tool.callable().ok_or_else(|| HttpError::invalid("tools", format!("tools[{at}] has no function with a name")))
    };
    let callable = tools.iter().enumerate().map(callable).collect::<Result<Vec<_>, _>>()?;
    let default = if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto };
    let Some(choice) = choice.filter(|choice| !choice.is_null()) else { return Ok(default) };
    match choice.as_str() {
        Some("none") => return Ok(ToolChoice::None),
        Some("auto") => return Ok(default),
        Some("required") if !tools.is_empty() => return Ok(ToolChoice::Calls(callable)),
        Some("required") => return Err(HttpError::invalid("tool_choice", "required needs tools")),
        _ => {}
    }
    let named = choice.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
    let named = named.and_then(|name| callable.into_iter().find(|tool| tool.name == name));
    match named {
        Some(tool) => Ok(ToolChoice::Calls(vec![tool])),
        None => {
            let message = "it must be none, auto, required, or name the function of one of the tools";
            Err(HttpError::invalid("tool_choice", message))
        }
    }
}

/// The grammar of forced calls.
pub(crate) fn grammar(tools: &[CallableTool], parallel: bool, tokenizer: Option<&Arc<Tokenizer>>) -> v1::Grammar {
    let is_token = |mark: &str| tokenizer.is_some_and(|tokenizer| tokenizer.token_id(mark).is_some());
    super::response_format::wire(calls_grammar(tools, parallel, is_token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Tool {
        let object = json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
        serde_json::from_value(object).expect("a tool")
    }

    #[test]
    fn choices_are_read() {
        let tools = [tool("f"), tool("g")];
        let read = |value: Value| choice(&tools, Some(&value));
        assert_eq!(choice(&[], None), Ok(ToolChoice::None));
        assert_eq!(choice(&tools, None), Ok(ToolChoice::Auto));
        assert_eq!(read(json!("none")), Ok(ToolChoice::None));
        assert_eq!(read(Value::Null), Ok(ToolChoice::Auto));
        let names = |choice| match choice {
            Ok(ToolChoice::Calls(tools)) => tools.into_iter().map(|tool| tool.name).collect(),
            other => vec![format!("{other:?}")],
        };
        assert_eq!(names(read(json!("required"))), ["f", "g"]);
        assert_eq!(names(read(json!({"type": "function", "function": {"name": "g"}}))), ["g"]);
        for bad in [json!("always"), json!({"function": {"name": "h"}}), json!({"type": "function"}), json!(1)] {
            assert!(read(bad).is_err());
        }
        assert!(choice(&[], Some(&json!("required"))).is_err());
    }
}
