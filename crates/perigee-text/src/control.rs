//! Control tokens: the added tokens of a vocabulary, such as `<|im_end|>`. Where their names stand in a text, and which
//! of them decoding may skip. What becomes of a name that was found is the caller's decision.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};

/// One control token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlToken {
    /// Its exact text.
    pub(crate) name: String,
    /// Whether the checkpoint flags it as special: decoding may skip it.
    pub(crate) special: bool,
    /// Whether it takes the whitespace before it along.
    pub(crate) strips_left: bool,
    /// Whether it takes the whitespace after it along.
    pub(crate) strips_right: bool,
}

/// All control tokens of a vocabulary. Checkpoints flag only some of them as special (markers of tool calls often are not,
/// so that they survive decoding), but none of them is text.
#[derive(Debug)]
pub(crate) struct ControlTokens {
    tokens: BTreeMap<u32, ControlToken>,
    special: BTreeSet<u32>,
    /// Ids of the names that are searched for, in the order of the automata's patterns.
    searched: Vec<u32>,
    /// The longest name at each place, for reading.
    longest: AhoCorasick,
    /// Every name at every place, for guarding.
    every: AhoCorasick,
    /// Bytes of the longest name.
    longest_bytes: usize,
}

impl ControlTokens {
    pub(crate) fn new(tokens: BTreeMap<u32, ControlToken>) -> Result<Self, BuildError> {
        // A name of one character could not be told from that character, and one of none is everywhere.
        let is_searched = |token: &ControlToken| token.name.chars().nth(1).is_some();
        let searched: Vec<u32> = tokens.iter().filter(|(_, token)| is_searched(token)).map(|(&id, _)| id).collect();
        let names: Vec<&str> = searched.iter().filter_map(|id| Some(tokens.get(id)?.name.as_str())).collect();
        Ok(Self {
            longest: AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&names)?,
            every: AhoCorasick::new(&names)?,
            longest_bytes: names.iter().map(|name| name.len()).max().unwrap_or(0),
            special: tokens.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect(),
            searched,
            tokens,
        })
    }

    pub(crate) fn get(&self, id: u32) -> Option<&ControlToken> {
        self.tokens.get(&id)
    }

    /// True for a token that decoding may skip.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The id of a name.
    pub(crate) fn id(&self, name: &str) -> Option<u32> {
        self.tokens.iter().find(|(_, token)| token.name == name).map(|(&id, _)| id)
    }

    /// Cuts a text at the names in it: the leftmost first, the longest of those.
    pub(crate) fn cut<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Piece<'a>> {
        let mut at = 0;
        let mut found = self.longest.find_iter(text).map(|found| (found.pattern(), found.range()));
        let mut next: Option<(u32, Range<usize>)> = None;
        std::iter::from_fn(move || {
            if let Some((id, range)) = next.take() {
                at = range.end;
                return Some(Piece::Control(id));
            }
            let rest = at..text.len();
            let plain = match found.next() {
                Some((pattern, range)) => {
                    let plain = at..range.start;
                    next = Some((self.searched.get(pattern.as_usize()).copied()?, range));
                    plain
                }
                None if rest.is_empty() => return None,
                None => rest,
            };
            at = plain.end;
            Some(Piece::Text(text.get(plain).unwrap_or_default()))
        })
    }

    /// Puts `mark`, which is in no name, behind the first character of every name in a text, and of every beginning of a
    /// name at its end: then no name is in it, and none that starts in it can be completed by what follows.
    pub(crate) fn break_names(&self, text: &str, mark: char) -> String {
        let mut starts: BTreeSet<usize> = self.every.find_overlapping_iter(text).map(|found| found.start()).collect();
        let first = text.len().saturating_sub(self.longest_bytes);
        let ends = (first..text.len()).filter(|&start| text.get(start..).is_some_and(|end| self.begins_name(end)));
        starts.extend(ends);
        let mut broken = String::with_capacity(text.len() + starts.len() * mark.len_utf8());
        let mut at = 0;
        for start in starts {
            let behind = start + text.get(start..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8);
            broken.push_str(text.get(at..behind).unwrap_or_default());
            broken.push(mark);
            at = behind;
        }
        broken.push_str(text.get(at..).unwrap_or_default());
        broken
    }

    fn begins_name(&self, text: &str) -> bool {
        self.searched.iter().any(|id| self.tokens.get(id).is_some_and(|token| token.name.starts_with(text)))
    }
}

/// A part of a text that was cut at control tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// What is between two of them; may be empty.
    Text(&'a str),
    /// One of them.
    Control(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(names: &[&str]) -> ControlTokens {
        let token = |name: &&str| ControlToken {
            name: (*name).to_owned(),
            special: true,
            strips_left: false,
            strips_right: false,
        };
        ControlTokens::new((0..).zip(names.iter().map(token)).collect()).unwrap()
    }

    fn cut(tokens: &ControlTokens, text: &str) -> String {
        let told = |piece: Piece<'_>| match piece {
            Piece::Text(text) => text.to_owned(),
            Piece::Control(id) => format!("[{id}]"),
        };
        tokens.cut(text).map(told).collect()
    }

    #[test]
    fn texts_are_cut_at_the_longest_names() {
        let tokens = tokens(&["<a>", "<a><b>", "é!"]);
        assert_eq!(cut(&tokens, "x<a>y<a><b>é!"), "x[0]y[1][2]");
        assert_eq!(cut(&tokens, "<a"), "<a");
        assert_eq!(cut(&tokens, ""), "");
        assert_eq!(tokens.cut("").next(), None);
    }

    #[test]
    fn broken_names_are_found_by_nobody() {
        let tokens = tokens(&["<|end|>", "|end|><", "ééé", "<|en", "x"]);
        for text in ["<|end|>", "a<|end|><b", "<|end|><|end|>", "éééé", "plain", "", "x", "<", "a<|e", "éé"] {
            let broken = tokens.break_names(text, '\u{fdd0}');
            assert_eq!(broken.replace('\u{fdd0}', ""), text);
            for rest in ["", "nd|>", "|end|>", "é", "éé", "><"] {
                assert_eq!(tokens.cut(&(broken.clone() + rest)).filter(|piece| matches!(piece, Piece::Control(id) if tokens.get(*id).is_some_and(|token| !rest.contains(&token.name)))).count(), 0, "{text:?} {rest:?}");
            }
        }
        assert_eq!(tokens.break_names("a < b", '\u{fdd0}'), "a < b");
    }
}
