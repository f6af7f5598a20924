//! The messages of a conversation: what a client may write, and the one form in which templates get it.

use serde_json::{Map, Value};

use super::error::HttpError;

/// Messages as templates read them: `content` given in parts is one text, for some templates know no parts, and those that do
/// write texts one behind the other.
///
/// # Errors
/// There are none, one has no role, or a content is something else than text.
pub(crate) fn conversation(mut messages: Vec<Map<String, Value>>) -> Result<Value, HttpError> {
    if messages.is_empty() {
        return Err(HttpError::invalid("messages", "there must be at least one"));
    }
    for (at, message) in messages.iter_mut().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            return Err(HttpError::invalid("messages", format!("messages[{at}] has no role")));
        }
        match message.get("content") {
            // An assistant's message may be nothing but calls of tools.
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                let text = parts
                    .iter()
                    .enumerate()
                    .map(|(number, part)| text(at, number, part))
                    .collect::<Result<String, _>>()?;
                message.insert("content".to_owned(), text.into());
            }
            Some(_) => {
                let error = format!("messages[{at}].content must be a text or a list of parts");
                return Err(HttpError::invalid("messages", error));
            }
        }
    }
    Ok(messages.into_iter().map(Value::Object).collect())
}

/// What part `number` of message `at` says.
fn text(at: usize, number: usize, part: &Value) -> Result<&str, HttpError> {
    let error = match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
        (Some("text"), Some(text)) => return Ok(text),
        (Some("text"), None) => "has no text".to_owned(),
        (Some(other), _) => format!("is of type {other:?}; the model reads text only"),
        (None, _) => "has no type".to_owned(),
    };
    Err(HttpError::invalid("messages", format!("messages[{at}].content[{number}] {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(messages: Value) -> Result<Value, String> {
        let messages = serde_json::from_value(messages).unwrap();
        conversation(messages).map_err(|error| error.body()["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn texts_in_parts_are_one_text_and_all_else_stays() {
        let parts = json!([{"type": "text", "text": "How is "}, {"type": "text", "text": "it?"}]);
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "a"}]});
        let told =
            read(json!([{"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "n"}, call]));
        let user = json!({"role": "user", "content": "How is it?", "name": "n"});
        assert_eq!(told, Ok(json!([{"role": "system", "content": "s"}, user, call])));
        assert_eq!(read(json!([{"role": "user", "content": []}])), Ok(json!([{"role": "user", "content": ""}])));
    }

    #[test]
    fn what_is_no_text_is_refused_by_its_place() {
        let image = json!({"type": "image_url", "image_url": {"url": "data:,"}});
        for (messages, says) in [
            (json!([]), "at least one"),
            (json!([{"role": "user"}, {"content": "a"}]), "messages[1] has no role"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content must be a text or a list of parts"),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]),
                "messages[0].content[1] is of type \"image_url\"; the model reads text only",
            ),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0] has no text"),
            (json!([{"role": "user", "content": ["a"]}]), "messages[0].content[0] has no type"),
        ] {
            let error = read(messages).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
