//! How many tokens each running task may feed in a step: rule 2 of the README. It gives no pages.

use std::cmp::Reverse;

use perigee_backend::PAGE_TOKENS;

use super::Scheduler;
use super::task::Task;
use super::types::Rank;

/// Most tokens of a row whose earlier latents are elsewhere: queries go to a home in blocks of a page's length, so that
/// neither side has to hold more at once.
pub(super) const REMOTE_ROW_TOKENS: u64 = PAGE_TOKENS as u64;

/// A running task's part of the step, in order of rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) rank: Rank,
    /// Tokens of its row; for a task that forks now, of each session's row. 0: no row in this step.
    pub(super) tokens: u64,
}

/// A task with more than one token to go.
struct Prefill {
    /// Its index among the shares.
    index: usize,
    priority: Reverse<i32>,
    /// Most tokens that it can use.
    wants: u64,
}

impl Scheduler {
    /// Tokens for every running task, best first.
    pub(super) fn shares(&self) -> Vec<Share> {
        let mut tokens_left = self.limits.step_tokens;
        let mut logits_left = self.limits.step_rows;
        let mut shares = Vec::with_capacity(self.running.len());
        let mut prefills = Vec::new();
        for task in self.running_tasks() {
            // Each session may draw, and a position of prompt logits takes the place of a draw.
            logits_left = logits_left.saturating_sub(task.sessions());
            let one_each = task.decodes() || task.forks_now();
            if one_each {
                tokens_left = tokens_left.saturating_sub(task.sessions());
            }
            shares.push(Share { rank: task.rank(), tokens: u64::from(one_each) });
        }
        if self.decodes_prevail() {
            tokens_left = if self.prompts_wait { 0 } else { tokens_left.min(self.limits.beside_tokens) };
        }
        for (index, task) in self.running_tasks().enumerate().filter(|(index, _)| shares[*index].tokens == 0) {
            let wants = wanted(task, &mut logits_left);
            prefills.push(Prefill { index, priority: Reverse(task.priority), wants });
        }
        for class in prefills.chunk_by_mut(|left, right| left.priority == right.priority) {
            divide(class, &mut tokens_left, &mut shares);
        }
        for (share, task) in shares.iter_mut().zip(self.running_tasks()) {
            share.tokens = end_at_page(task, share.tokens);
        }
        shares
    }
}

impl Scheduler {
    /// Whether at least as many sessions decode as prompts are under way: the fewer wait for the more.
    pub fn decodes_prevail(&self) -> bool {
        let (mut decoding, mut prompts) = (0, 0);
        for task in self.running_tasks() {
            if task.decodes() || task.forks_now() {
                decoding += task.sessions();
            } else {
                prompts += 1;
            }
        }
        decoding > 0 && decoding >= prompts
    }
}

/// Most tokens that a prefill can use in this step; takes the logits which that needs beyond the task's own one.
fn wanted(task: &Task, logits_left: &mut u64) -> u64 {
    let at_most = if task.latents.is_remote() { REMOTE_ROW_TOKENS } else { u64::MAX };
    let left = (task.stop() - task.computed).min(at_most);
    if !task.prompt_logits || task.stop() == task.length {
        return left;
    }
    let free = task.free_of_logits();
    let wants = left.min(free + 1 + *logits_left);
    *logits_left -= wants.saturating_sub(free + 1);
    wants
}

/// Divides tokens among the prefills of a priority class, oldest first in `class`: at least half for the oldest, the rest
/// in order of need, and what nobody takes for the oldest again.
fn divide(class: &mut [Prefill], tokens_left: &mut u64, shares: &mut [Share]) {
    let Some((oldest, others)) = class.split_first_mut() else { return };
    let mut give = |prefill: &mut Prefill, at_most: u64, tokens_left: &mut u64| {
        let tokens = prefill.wants.min(at_most).min(*tokens_left);
        prefill.wants -= tokens;
        *tokens_left -= tokens;
        shares[prefill.index].tokens += tokens;
    };
    let first_part = if others.is_empty() { *tokens_left } else { tokens_left.div_ceil(2) };
    give(oldest, first_part, tokens_left);
    others.sort_by_key(|prefill| (prefill.wants, prefill.index));
    for prefill in others {
        give(prefill, u64::MAX, tokens_left);
    }
    give(oldest, u64::MAX, tokens_left);
}

/// Ends a chunk that does not reach the task's stop at a page boundary if it reaches one: later chunks are whole pages.
fn end_at_page(task: &Task, tokens: u64) -> u64 {
    let end = task.computed + tokens;
    let boundary = end - end % PAGE_TOKENS as u64;
    if end < task.stop() && boundary > task.computed { boundary - task.computed } else { tokens }
}
