//! Tool calls in output: the form, its damage, and that cuts between pieces of text change nothing.

use perigee_text::{ToolCallParser, ToolEvent};
use proptest::prelude::*;

/// Feeds a text cut at places; neighbouring events of the same kind are joined.
fn parse(text: &str, cuts: &[usize]) -> Vec<ToolEvent> {
    let mut cuts: Vec<usize> =
        cuts.iter().map(|cut| cut % (text.len() + 1)).filter(|&cut| text.is_char_boundary(cut)).collect();
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    let mut parser = ToolCallParser::new();
    let mut events: Vec<ToolEvent> = cuts.windows(2).flat_map(|pair| parser.push(&text[pair[0]..pair[1]])).collect();
    events.extend(parser.finish());
    let mut joined: Vec<ToolEvent> = Vec::new();
    for event in events {
        match (joined.last_mut(), event) {
            (Some(ToolEvent::Text(last)), ToolEvent::Text(more)) => last.push_str(&more),
            (Some(ToolEvent::Arguments { text, .. }), ToolEvent::Arguments { text: more, .. }) => text.push_str(&more),
            (_, event) => joined.push(event),
        }
    }
    joined
}

fn shown(events: &[ToolEvent]) -> String {
    let show = |event: &ToolEvent| match event {
        ToolEvent::Text(text) => format!("text({text})"),
        ToolEvent::Begin { call, id, name } => format!("begin({call} {id} {name})"),
        ToolEvent::Arguments { call, text } => format!("arguments({call} {text})"),
    };
    events.iter().map(show).collect::<Vec<_>>().join(" ")
}

const TWO_CALLS: &str = "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0\
    <|tool_call_argument_begin|>{\"city\": \"Zürich <|tool\"}<|tool_call_end|>\n<|tool_call_begin|>functions.a.b:11\
    <|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>";

#[test]
fn calls_are_found_with_their_ids_names_and_arguments() {
    let expected = "text(I look.) begin(0 functions.weather:0 weather) arguments(0 {\"city\": \"Zürich <|tool\"}) \
                    begin(1 functions.a.b:11 a.b) arguments(1 {})";
    assert_eq!(shown(&parse(TWO_CALLS, &[])), expected);
}

#[test]
fn arguments_and_text_come_out_as_soon_as_they_are_certain() {
    let mut parser = ToolCallParser::new();
    assert_eq!(shown(&parser.push("ab<|tool")), "text(ab)");
    assert_eq!(shown(&parser.push("_x")), "text(<|tool_x)");
    let begun = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"k\"";
    assert_eq!(shown(&parser.push(begun)), "begin(0 functions.f:0 f) arguments(0 {\"k\")");
    assert_eq!(shown(&parser.push(":1}<|tool_call")), "arguments(0 :1})");
    assert_eq!(shown(&parser.push("_end|>")), "");
    assert_eq!((parser.calls(), shown(&parser.finish()).as_str()), (1, ""));
}

#[test]
fn what_does_not_follow_the_form_is_text_or_nothing() {
    for (text, expected) in [
        ("plain < text <|im_end|>", "text(plain < text <|im_end|>)"),
        ("<|tool_calls_section_begin|> nothing <|tool_calls_section_end|>after", "text(after)"),
        ("a<|tool_calls_section_begin|><|tool_call_begin|>cut", "text(a)"),
        (
            "<|tool_calls_section_begin|><|tool_call_begin|><|tool_call_argument_begin|>{}",
            "text(<|tool_call_begin|><|tool_call_argument_begin|>{})",
        ),
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_argument_begin|>{\"un",
            "begin(0 f f) arguments(0 {\"un)",
        ),
        ("ends in <|tool_calls_sec", "text(ends in <|tool_calls_sec)"),
    ] {
        assert_eq!(shown(&parse(text, &[])), expected, "{text}");
    }
    let endless = format!("<|tool_calls_section_begin|><|tool_call_begin|>{}", "x".repeat(10_000));
    let events = parse(&endless, &[5000]);
    assert!(matches!(&events[..], [ToolEvent::Text(text)] if text.ends_with(&"x".repeat(10_000))));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn cuts_change_nothing(cuts in prop::collection::vec(0usize..1000, 0..40)) {
        prop_assert_eq!(parse(TWO_CALLS, &cuts), parse(TWO_CALLS, &[]));
    }

    /// Any order of marks and text: no cut changes what comes out, and nothing panics.
    #[test]
    fn cuts_change_nothing_in_damaged_output(
        parts in prop::collection::vec(prop_oneof![
            Just("<|tool_calls_section_begin|>"), Just("<|tool_calls_section_end|>"), Just("<|tool_call_begin|>"),
            Just("<|tool_call_argument_begin|>"), Just("<|tool_call_end|>"), Just("functions.f:0"), Just("{\"é\"}"),
            Just("<|tool_c"), Just("<"),
        ], 0..16),
        cuts in prop::collection::vec(0usize..1000, 0..40),
    ) {
        let text = parts.concat();
        prop_assert_eq!(parse(&text, &cuts), parse(&text, &[]));
    }
}
