//! Calls of tools in a model's output, in the form of the Kimi checkpoints, as the text comes in: plain text, then
//! `<|tool_calls_section_begin|>`, for each call `<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>`, its
//! arguments in JSON and `<|tool_call_end|>`, then `<|tool_calls_section_end|>`. What does not follow that form comes out
//! as text. It does not check that arguments are JSON: they are passed on as they come.

use crate::grammar::GrammarSource;

/// The marks of the form.
pub const MARKS: [&str; 5] = [SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END];

/// Opens a section of calls.
pub const SECTION_BEGIN: &str = "<|tool_calls_section_begin|>";
/// Closes it.
pub const SECTION_END: &str = "<|tool_calls_section_end|>";
/// Opens a call.
pub const CALL_BEGIN: &str = "<|tool_call_begin|>";
/// Between a call's id and its arguments.
pub const ARGUMENT_BEGIN: &str = "<|tool_call_argument_begin|>";
/// Closes a call.
pub const CALL_END: &str = "<|tool_call_end|>";

/// A tool as far as a grammar of its calls needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallableTool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: serde_json::Value,
}

/// A grammar of calls and nothing else: one, or up to eight where `parallel`, of any of the tools, with arguments that
/// meet its schema. `is_token` says which marks are tokens of the vocabulary.
pub fn calls_grammar(tools: &[CallableTool], parallel: bool, is_token: impl Fn(&str) -> bool) -> GrammarSource {
    // A string of JSON is one of Lark.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mark = |mark: &str| if is_token(mark) { mark.to_owned() } else { quoted(mark) };
    let more = if parallel { " call{0,7}" } else { "" };
    let [section_begin, section_end, call_begin, argument_begin, call_end] = MARKS.map(mark);
    let mut lark = format!("start: {section_begin} call{more} {section_end}\ncall: {call_begin} (");
    let alternatives: Vec<String> = (0..tools.len()).map(|at| format!("tool{at}")).collect();
    lark.push_str(&alternatives.join(" | "));
    lark.push_str(&format!(") {call_end}\nINDEX: /[0-9]{{1,2}}/\n"));
    for (at, tool) in tools.iter().enumerate() {
        let name = quoted(&format!("functions.{}:", tool.name));
        lark.push_str(&format!("tool{at}: {name} INDEX {argument_begin} %json {}\n", tool.parameters));
    }
    GrammarSource::Lark(lark)
}

/// Bytes of a call's id; a longer one is none.
const LONGEST_ID: usize = 256;

/// What a piece of output led to, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text of the answer.
    Text(String),
    /// A call begins.
    Begin {
        /// Which call of the answer, from 0.
        call: usize,
        /// Its id as the model wrote it, `functions.NAME:INDEX`.
        id: String,
        /// The tool's name.
        name: String,
    },
    /// More of its arguments.
    Arguments {
        /// Which call.
        call: usize,
        /// Text to append.
        text: String,
    },
}

/// Finds calls in a stream of text, however it is cut.
#[derive(Clone, Debug, Default)]
pub struct ToolCallParser {
    place: Place,
    /// Text whose meaning is not certain yet.
    held: String,
    calls: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Outside a section.
    #[default]
    Text,
    /// In a section, between calls.
    Section,
    /// In a call's id.
    Id,
    /// In its arguments.
    Arguments,
}

impl ToolCallParser {
    /// A parser before its first text.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many calls have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes in text and returns what is certain.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        self.held.push_str(text);
        let mut events = Vec::new();
        while self.step(&mut events) {}
        events
    }

    /// Ends the stream and returns what was held back.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let held = std::mem::take(&mut self.held);
        match std::mem::take(&mut self.place) {
            _ if held.is_empty() => Vec::new(),
            Place::Text => vec![ToolEvent::Text(held)],
            Place::Arguments => vec![ToolEvent::Arguments { call: self.calls.saturating_sub(1), text: held }],
            // A call that was cut off in its id is none, and neither is it an answer.
            Place::Section | Place::Id => Vec::new(),
        }
    }

    /// Takes one part off the held text; false where more is needed.
    fn step(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        match self.place {
            Place::Text => {
                let found = self.take_until(SECTION_BEGIN);
                self.emit(events, found.text, ToolEvent::Text);
                if found.complete {
                    self.place = Place::Section;
                }
                found.complete
            }
            Place::Section => {
                let next = [CALL_BEGIN, SECTION_END].into_iter().filter_map(|mark| Some((self.held.find(mark)?, mark)));
                let Some((start, mark)) = next.min() else {
                    // What is between calls is no part of any; only what may become a mark is kept.
                    let kept = possible_start(&self.held, CALL_BEGIN).max(possible_start(&self.held, SECTION_END));
                    self.held.drain(..self.held.len() - kept);
                    return false;
                };
                self.held.drain(..start + mark.len());
                self.place = if mark == CALL_BEGIN { Place::Id } else { Place::Text };
                true
            }
            Place::Id => {
                let found = self.held.find(ARGUMENT_BEGIN);
                let Some(end) = found.filter(|&end| end <= LONGEST_ID) else {
                    let may_come = found.is_none() && self.held.len() <= LONGEST_ID + ARGUMENT_BEGIN.len();
                    return !may_come && self.reject(events);
                };
                let id = self.held[..end].trim().to_owned();
                let Some(name) = tool_name(&id).map(str::to_owned) else { return self.reject(events) };
                self.held.drain(..end + ARGUMENT_BEGIN.len());
                self.place = Place::Arguments;
                events.push(ToolEvent::Begin { call: self.calls, id, name });
                self.calls += 1;
                true
            }
            Place::Arguments => {
                let found = self.take_until(CALL_END);
                let call = self.calls.saturating_sub(1);
                self.emit(events, found.text, |text| ToolEvent::Arguments { call, text });
                if found.complete {
                    self.place = Place::Section;
                }
                found.complete
            }
        }
    }

    fn emit(&self, events: &mut Vec<ToolEvent>, text: String, event: impl Fn(String) -> ToolEvent) {
        if !text.is_empty() {
            events.push(event(text));
        }
    }

    /// What began like a call is text, and what follows is read as such.
    fn reject(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        events.push(ToolEvent::Text(CALL_BEGIN.to_owned()));
        self.place = Place::Text;
        true
    }

    /// Takes the text before a mark, and the mark; without one, the text that cannot be the beginning of it.
    fn take_until(&mut self, mark: &str) -> Until {
        if let Some(start) = self.held.find(mark) {
            let rest = self.held.split_off(start + mark.len());
            self.held.truncate(start);
            return Until { text: std::mem::replace(&mut self.held, rest), complete: true };
        }
        let kept = self.held.split_off(self.held.len() - possible_start(&self.held, mark));
        Until { text: std::mem::replace(&mut self.held, kept), complete: false }
    }
}

struct Until {
    text: String,
    complete: bool,
}

/// Bytes at the end of a text that may be the beginning of a mark.
fn possible_start(text: &str, mark: &str) -> usize {
    let most = text.len().min(mark.len() - 1);
    (1..=most).rev().find(|&length| text.as_bytes().ends_with(&mark.as_bytes()[..length])).unwrap_or(0)
}

/// The name in `functions.NAME:INDEX`; a name without that around it is taken as it is.
fn tool_name(id: &str) -> Option<&str> {
    let name = id.strip_prefix("functions.").unwrap_or(id);
    let name = match name.rsplit_once(':') {
        Some((name, index)) if !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => name,
    };
    (!name.is_empty()).then_some(name)
}
