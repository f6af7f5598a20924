//! Chat templates: a conversation to the text that a model was trained on, by the checkpoint's own Jinja template. What
//! a user wrote can put no control token into the result, a template can read no file, and its work is bounded by fuel.
//! It encodes nothing.

mod functions;

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Deserialize;
use serde_json::Map;

use crate::error::TextError;
use crate::tokenizer::Tokenizer;

/// Work that one rendering may take: instructions, and one for each 64 bytes that the template makes. Some tenths of a
/// second and at most some hundred megabytes.
const FUEL: u64 = 5_000_000;
/// The template's name in errors.
const NAME: &str = "chat_template";

/// A template for models that have none, such as random ones: a line a message, and what tools there are.
pub const DEFAULT_TEMPLATE: &str = "\
{%- if tools %}tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %} {{ call.function.name }} {{ call.function.arguments }}{% endfor %}
{{- '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// What a template is rendered with. Values are as clients send them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatInput {
    /// The messages, each an object with at least `role`.
    pub messages: serde_json::Value,
    /// The tools that the model may call; null where there are none.
    pub tools: serde_json::Value,
    /// Whether the text ends with the beginning of the model's turn.
    pub add_generation_prompt: bool,
    /// Further variables of the template.
    pub variables: Map<String, serde_json::Value>,
}

/// A rendered conversation. In it, control tokens that the template wrote can be told from text that only looks like
/// them, which holds marks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub(crate) marked: String,
    pub(crate) mark: char,
}

impl Rendered {
    /// Bytes of the text, give or take those of the marks.
    pub fn bytes(&self) -> usize {
        self.marked.len()
    }

    /// The text, without marks.
    pub fn text(&self) -> String {
        self.marked.replace(self.mark, "")
    }
}

impl ChatTemplate {
    /// Reads a model directory: chat_template.jinja, else `chat_template` in tokenizer_config.json (a template, or a list
    /// of named ones of which `default` counts). None where there is none.
    ///
    /// # Errors
    /// [`TextError::Read`], and [`TextError::Malformed`] with the line where it is no template.
    pub fn load(dir: &Path) -> Result<Option<Self>, TextError> {
        let path = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(source) => return Self::parse(source, path).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(TextError::Read { path, source }),
        }
        let path = dir.join("tokenizer_config.json");
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TextError::Read { path, source }),
        };
        let config: TokenizerConfig = serde_json::from_slice(&json)
            .map_err(|error| TextError::Malformed { path: path.clone(), reason: error.to_string() })?;
        let source = match config.chat_template {
            None => return Ok(None),
            Some(Templates::One(source)) => source,
            Some(Templates::Named(templates)) => {
                match templates.into_iter().find(|template| template.name == "default") {
                    Some(template) => template.template,
                    None => return Ok(None),
                }
            }
        };
        Self::parse(source, path).map(Some)
    }

    /// Compiles a template; `path` is only named in errors.
    ///
    /// # Errors
    /// [`TextError::Malformed`] where it is no template.
    pub fn parse(source: String, path: PathBuf) -> Result<Self, TextError> {
        let malformed = |error: Error| TextError::Malformed { path: path.clone(), reason: told(&error) };
        // As transformers sets Jinja up. There is no loader, so no template can include a file.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(malformed)?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        functions::add_to(&mut environment);
        environment.add_template_owned(NAME, source).map_err(malformed)?;
        Ok(Self { environment })
    }

    /// The default template, for models that have none.
    ///
    /// # Errors
    /// None that is known of.
    pub fn fallback() -> Result<Self, TextError> {
        Self::parse(DEFAULT_TEMPLATE.to_owned(), PathBuf::from("the default chat template"))
    }

    /// Renders a conversation for `tokenizer`, whose control tokens are plain text where the input has them.
    ///
    /// # Errors
    /// [`TextError::Template`] where the template refuses the conversation, or takes too much work.
    pub fn render(&self, input: &ChatInput, tokenizer: &Tokenizer) -> Result<Rendered, TextError> {
        let refused = |error: Error| TextError::Template { reason: told(&error) };
        let mark = unused_mark(input)?;
        let guarded = |value: &serde_json::Value| guard(value, tokenizer, mark);
        let variables: Map<String, serde_json::Value> =
            input.variables.iter().map(|(name, value)| (name.clone(), guarded(value))).collect();
        let (messages, tools) = (guarded(&input.messages), guarded(&input.tools));
        let context = context! {
            messages => Value::from(Serde(&messages)),
            tools => Value::from(Serde(&tools)),
            add_generation_prompt => input.add_generation_prompt,
            ..Value::from(Serde(&variables)),
        };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        Ok(Rendered { marked: template.render(context).map_err(refused)?, mark })
    }
}

/// A noncharacter, which means nothing in any text, that is not in the input.
fn unused_mark(input: &ChatInput) -> Result<char, TextError> {
    let is_used = |mark: char| {
        has(&input.messages, mark) || has(&input.tools, mark) || input.variables.values().any(|value| has(value, mark))
    };
    ('\u{fdd0}'..='\u{fdef}').find(|&mark| !is_used(mark)).ok_or_else(|| TextError::Template {
        reason: "the conversation holds every character from U+FDD0 to U+FDEF; leave one of them out".to_owned(),
    })
}

fn has(value: &serde_json::Value, mark: char) -> bool {
    match value {
        serde_json::Value::String(text) => text.contains(mark),
        serde_json::Value::Array(values) => values.iter().any(|value| has(value, mark)),
        serde_json::Value::Object(fields) => fields.iter().any(|(name, value)| name.contains(mark) || has(value, mark)),
        _ => false,
    }
}

/// A value in whose strings no control token can be found.
fn guard(value: &serde_json::Value, tokenizer: &Tokenizer, mark: char) -> serde_json::Value {
    let text = |text: &str| tokenizer.control().break_names(text, mark);
    match value {
        serde_json::Value::String(string) => serde_json::Value::String(text(string)),
        serde_json::Value::Array(values) => values.iter().map(|value| guard(value, tokenizer, mark)).collect(),
        serde_json::Value::Object(fields) => {
            fields.iter().map(|(name, value)| (text(name), guard(value, tokenizer, mark))).collect()
        }
        other => other.clone(),
    }
}

/// An error with its line and its causes, in one.
fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The part of tokenizer_config.json that is read.
#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}
