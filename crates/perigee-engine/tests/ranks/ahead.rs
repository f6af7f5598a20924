//! Steps that are launched behind one another on every rank: fed with draws that nobody has read, they give what the same tokens
//! give step by step; other commands may come in between.

use perigee_backend::{StateKind, StatePart};
use perigee_engine::executor::{Executor, StepPlan};
use perigee_sampling::{Draw, Sampled, SamplingParams, TokenCounts};

use crate::group::{Fed, Group, feed, text};

const ROWS: u32 = 3;
const PROMPT: u64 = 70;
const TOKENS: u64 = 8;

/// A decode step of these rows at a position.
fn decode(rows: &[u32], position: u64, tokens: &[u32]) -> StepPlan {
    let pages: Vec<[u32; 2]> = rows.iter().map(|row| [2 * row, 2 * row + 1]).collect();
    let fed: Vec<Fed<'_>> = rows
        .iter()
        .zip(&pages)
        .zip(tokens.chunks(1))
        .map(|((&row, pages), token)| Fed::local(row, pages, position, token))
        .collect();
    feed(&fed)
}

fn begin(group: &mut Group) {
    for row in 0..ROWS {
        group.begin(row, &[2 * row, 2 * row + 1], &text(row + 1, 0..PROMPT as u32));
    }
}

/// What every row draws in a step.
fn draws<'a>(params: &'a SamplingParams, counts: &'a TokenCounts, rows: usize, position: u64) -> Vec<Draw<'a>> {
    let draw = |choice| Draw { params, choice, position, counts, banned: &[], allowed: None };
    (0..rows as u32).map(draw).collect()
}

fn tokens(sampled: &[Option<Sampled>]) -> Vec<u32> {
    sampled.iter().map(|sampled| sampled.as_ref().unwrap().token).collect()
}

#[test]
fn steps_fed_with_draws_give_what_their_tokens_give() {
    let params = SamplingParams { temperature: 0.8, seed: 5, ..SamplingParams::default() };
    let counts = TokenCounts::new();
    for tp in [1, 2] {
        let all: Vec<u32> = (0..ROWS).collect();
        let first: Vec<u32> = all.iter().map(|row| row + 9).collect();

        let mut stepwise = Group::new(tp);
        begin(&mut stepwise);
        let (mut fed, mut expected) = (first.clone(), Vec::new());
        for position in PROMPT..PROMPT + TOKENS {
            let drawn = draws(&params, &counts, fed.len(), position);
            fed = tokens(&stepwise.ranks.step(&decode(&all, position, &fed), &drawn, false).unwrap().sampled);
            expected.push(fed.clone());
        }

        let mut ahead = Group::new(tp);
        begin(&mut ahead);
        assert!(ahead.ranks.runs_ahead());
        let mut found = Vec::new();
        for position in PROMPT..PROMPT + TOKENS {
            let mut plan = decode(&all, position, &first);
            if position > PROMPT {
                plan.feed = all.clone();
            }
            ahead.ranks.launch(&plan, &draws(&params, &counts, all.len(), position)).unwrap();
            if position > PROMPT {
                found.push(tokens(&ahead.ranks.collect().unwrap().sampled));
            }
            // Another command finds the ranks in order.
            let part = StatePart { layer: 0, kind: StateKind::Recurrent, first_head: 0, heads: 1 };
            assert!(!ahead.ranks.export_state(0, &part).unwrap().is_empty());
        }
        found.push(tokens(&ahead.ranks.collect().unwrap().sampled));
        assert_eq!(found, expected, "{tp} ranks");
        assert!(ahead.ranks.collect().unwrap_err().fatal, "nothing is in flight");
    }
}

#[test]
fn a_row_may_go_on_while_another_ends() {
    let (params, counts) = (SamplingParams::greedy(), TokenCounts::new());
    let mut group = Group::new(2);
    begin(&mut group);
    let plan = decode(&[0, 1, 2], PROMPT, &[9, 10, 11]);
    group.ranks.launch(&plan, &draws(&params, &counts, 3, PROMPT)).unwrap();
    let mut next = decode(&[2, 0], PROMPT + 1, &[0, 0]);
    next.feed = vec![2, 0];
    group.ranks.launch(&next, &draws(&params, &counts, 2, PROMPT + 1)).unwrap();
    let first = tokens(&group.ranks.collect().unwrap().sampled);
    let second = tokens(&group.ranks.collect().unwrap().sampled);

    let mut stepwise = Group::new(2);
    begin(&mut stepwise);
    let output = stepwise.ranks.step(&plan, &draws(&params, &counts, 3, PROMPT), false).unwrap();
    assert_eq!(tokens(&output.sampled), first);
    let plan = decode(&[2, 0], PROMPT + 1, &[first[2], first[0]]);
    let output = stepwise.ranks.step(&plan, &draws(&params, &counts, 2, PROMPT + 1), false).unwrap();
    assert_eq!(tokens(&output.sampled), second);
}

#[test]
fn a_step_that_is_fed_too_little_is_refused_on_every_rank() {
    let (params, counts) = (SamplingParams::greedy(), TokenCounts::new());
    let mut group = Group::new(2);
    begin(&mut group);
    group.ranks.launch(&decode(&[0, 1], PROMPT, &[9, 10]), &draws(&params, &counts, 2, PROMPT)).unwrap();
    let mut next = decode(&[0, 1], PROMPT + 1, &[0, 0]);
    next.feed = vec![0];
    let refused = group.ranks.launch(&next, &draws(&params, &counts, 2, PROMPT + 1)).unwrap_err();
    assert!(!refused.fatal && refused.message.contains("1 draws feed 2 tokens"), "{refused}");
    // The step before is not touched by that.
    assert_eq!(group.ranks.collect().unwrap().sampled.len(), 2);
}
