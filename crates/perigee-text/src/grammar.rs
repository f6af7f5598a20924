//! Grammars: which tokens may come next so that the text is JSON of a schema, or matches an expression. Over the
//! `llguidance` crate. A grammar is made from its source, which is small and serialises, and follows the tokens that were
//! accepted; so it can be made anew anywhere from both. It draws nothing.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use serde::{Deserialize, Serialize};
use serde_json::json;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use crate::tokenizer::Tokenizer;

/// The most bytes of a source.
pub const MAX_SOURCE_BYTES: usize = 128 << 10;

/// What the text must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrammarSource {
    /// JSON that meets a JSON schema.
    JsonSchema(String),
    /// A match of a regular expression from beginning to end, in the syntax of the `regex` crate.
    Regex(String),
    /// A word of a context-free grammar in llguidance's form of Lark.
    Lark(String),
}

/// Why a grammar cannot be made or followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The source is too long.
    #[error("a grammar of {found} bytes, but at most {MAX_SOURCE_BYTES} are taken")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// The source is wrong, or takes more work than it may.
    #[error("the grammar cannot be used: {0}")]
    Refused(String),
    /// Tokens of this vocabulary have no bytes of their own.
    #[error("grammars need a byte-level tokenizer, and this model has another one")]
    Tokenizer,
    /// A token that the grammar does not allow, or too much work in one step.
    #[error("the grammar cannot go on: {0}")]
    Broken(String),
}

impl GrammarSource {
    /// JSON whose outermost value is an object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}).to_string())
    }

    fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }

    /// Checks its length.
    ///
    /// # Errors
    /// [`GrammarError::TooLong`].
    pub fn check(&self) -> Result<(), GrammarError> {
        let found = self.text().len();
        if found > MAX_SOURCE_BYTES { Err(GrammarError::TooLong { found }) } else { Ok(()) }
    }

    fn grammar(&self) -> Result<TopLevelGrammar, GrammarError> {
        self.check()?;
        Ok(match self {
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Self::JsonSchema(text) => {
                let mut schema: serde_json::Value = serde_json::from_str(text)
                    .map_err(|error| GrammarError::Refused(format!("the schema is no JSON: {error}")))?;
                if let Some(fields) = schema.as_object_mut() {
                    // Enough for one space and for indentation. Without an end, a model that likes whitespace would write
                    // nothing else.
                    fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": r"[ \n]{0,16}"}));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
        })
    }
}

/// Makes grammars for one vocabulary. Shareable between threads.
pub struct GrammarCompiler {
    factory: ParserFactory,
    vocab: usize,
}

impl GrammarCompiler {
    /// For the tokens of a tokenizer, in a model of `vocab` tokens.
    ///
    /// # Errors
    /// [`GrammarError::Tokenizer`].
    pub fn new(tokenizer: &Tokenizer, vocab: usize) -> Result<Self, GrammarError> {
        if !tokenizer.is_byte_level() {
            return Err(GrammarError::Tokenizer);
        }
        let word = |id: u32| match tokenizer.control().get(id) {
            Some(token) => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.name.as_bytes()].concat(),
            None => tokenizer.token_bytes(id),
        };
        let mut words: Vec<Vec<u8>> = (0..vocab as u32).map(word).collect();
        // What ends a text is decided here by the session's own end tokens. llguidance needs a token for that: one behind
        // the vocabulary.
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], b"<|end|>".as_slice()].concat());
        let info = TokRxInfo::new(words.len() as u32, vocab as u32);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Refused(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, vocab })
    }

    /// Makes a grammar and has it follow tokens that were drawn before.
    ///
    /// # Errors
    /// As [`GrammarCompiler::compile`] and [`Grammar::accept`].
    pub fn compile_after(&self, source: &GrammarSource, drawn: &[u32]) -> Result<Grammar, GrammarError> {
        let mut grammar = self.compile(source)?;
        drawn.iter().try_for_each(|&token| grammar.accept(token))?;
        Ok(grammar)
    }

    /// Makes a grammar, before its first token. Takes up to some seconds where a source is made to take long, so it is not
    /// for a thread that others wait for.
    ///
    /// # Errors
    /// [`GrammarError`] for a source that is wrong, or beyond the limits of size and work.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, GrammarError> {
        let grammar = source.grammar()?;
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Refused(told(&error)));
        }
        // The first mask builds what later ones use; a source beyond the limits is told now.
        matcher.compute_mask_or_eos().map_err(|error| GrammarError::Refused(told(&error.to_string())))?;
        Ok(Grammar { matcher, mask: vec![0; self.vocab.div_ceil(64)], only_ends: false, vocab: self.vocab })
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GrammarCompiler").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}

/// An error of llguidance without the mark of what it leaves out.
fn told(error: &str) -> String {
    error.replace("<non-verbose/>", "").trim_end().to_owned()
}

/// What one session may, and how much of it, is bounded; see [`ParserLimits`] for the units. A mask stays within tens of
/// milliseconds, a source within a second.
fn limits() -> ParserLimits {
    ParserLimits {
        max_grammar_size: 200_000,
        max_lexer_states: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// A grammar and how far a text has followed it.
pub struct Grammar {
    matcher: Matcher,
    mask: Vec<u64>,
    /// Whether nothing but an end may come next.
    only_ends: bool,
    vocab: usize,
}

impl Grammar {
    /// The same for another choice, from here on.
    pub fn fork(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), mask: self.mask.clone(), ..*self }
    }

    /// Finds the tokens that may come next, for [`Grammar::allowed`]. `ends` are those that end the text: they may come
    /// where it is complete, and nowhere else.
    ///
    /// # Errors
    /// [`GrammarError::Broken`].
    pub fn prepare(&mut self, ends: &[u32]) -> Result<(), GrammarError> {
        let broken = |error: anyhow::Error| GrammarError::Broken(told(&error.to_string()));
        let allowed = self.matcher.compute_mask_or_eos().map_err(broken)?;
        let is_accepting = self.matcher.is_accepting().map_err(broken)?;
        self.fill(&allowed);
        self.only_ends = is_accepting && self.mask.iter().all(|&word| word == 0);
        for &end in ends {
            let Some(word) = self.mask.get_mut(end as usize / 64) else { continue };
            let bit = 1 << (end % 64);
            *word = if is_accepting { *word | bit } else { *word & !bit };
        }
        Ok(())
    }

    /// What [`Grammar::prepare`] found: token t may come if bit t % 64 of word t / 64 is set.
    pub fn allowed(&self) -> &[u64] {
        &self.mask
    }

    /// Takes in a token of the text.
    ///
    /// # Errors
    /// [`GrammarError::Broken`] where it does not allow the token.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(token).map_err(|error| GrammarError::Broken(told(&error.to_string())))
    }

    /// Whether the text is complete and nothing can follow, as far as [`Grammar::prepare`] or [`Grammar::accept`] saw.
    pub fn is_finished(&self) -> bool {
        self.only_ends || (self.matcher.is_stopped() && !self.matcher.is_error())
    }

    /// Words of 32 bits to words of 64, without what is behind the vocabulary.
    fn fill(&mut self, allowed: &SimpleVob) {
        self.mask.fill(0);
        for (half, &word) in allowed.as_slice().iter().enumerate() {
            if let Some(whole) = self.mask.get_mut(half / 2) {
                *whole |= u64::from(word) << (32 * (half % 2));
            }
        }
        let behind = self.vocab % 64;
        if behind > 0
            && let Some(last) = self.mask.last_mut()
        {
            *last &= (1 << behind) - 1;
        }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Grammar").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}
