//! Sessions whose text must follow a grammar: what each may draw next, and the end where nothing can follow. A grammar is
//! compiled before it comes here; see `moves/incoming.rs` for sessions that come from elsewhere.

use std::collections::BTreeSet;

use perigee_text::grammar::GrammarError;

use crate::request::FinishReason;
use crate::scheduler::{Plan, TaskId};
use crate::step::{EngineCore, Fatal, Session};

impl EngineCore {
    /// Finds what the sessions of a plan may draw. Returned are those that ended instead: their text is complete, or their
    /// grammar takes too much work.
    pub(crate) fn prepare_grammars(&mut self, plan: &Plan, lost: &BTreeSet<TaskId>) -> Result<BTreeSet<TaskId>, Fatal> {
        let mut ended = Vec::new();
        for row in plan.rows.iter().filter(|row| row.draws && !lost.contains(&row.task)) {
            let Some(session) = self.sessions.get_mut(&row.task) else { continue };
            let Some(grammar) = &mut session.grammar else { continue };
            match grammar.prepare(&session.sequence.end_tokens) {
                Ok(()) if grammar.is_finished() => ended.push((row.task, FinishReason::Stop, None)),
                Ok(()) => {}
                Err(error) => ended.push((row.task, FinishReason::Error, Some(error.to_string()))),
            }
        }
        let tasks = ended.iter().map(|(task, ..)| *task).collect();
        for (task, reason, error) in ended {
            self.end(task, reason, error)?;
        }
        Ok(tasks)
    }
}

/// Moves a session's grammar on by a token that was drawn; true where nothing can follow it.
pub(crate) fn follow(session: &mut Session, token: u32) -> Result<bool, GrammarError> {
    match &mut session.grammar {
        Some(grammar) if !session.sequence.is_end(token) => {
            grammar.accept(token)?;
            Ok(grammar.is_finished())
        }
        _ => Ok(false),
    }
}
