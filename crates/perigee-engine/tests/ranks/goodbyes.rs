//! How a follower ends whose answers nobody hears any more: well where its leader has said goodbye, else by the loss of it or
//! by what went wrong here.

use std::collections::VecDeque;

use perigee_backend::DType;
use perigee_collectives::thread_group;
use perigee_engine::link::{FollowerLink, LinkError};
use perigee_engine::protocol::{RankCommand, RankReply};

use crate::group::{Fed, feed, load, text};

/// Commands of a leader that is gone by the time they are answered.
struct Gone(VecDeque<RankCommand>);

impl FollowerLink for Gone {
    fn next(&mut self) -> Result<Option<RankCommand>, LinkError> {
        self.0.pop_front().map(Some).ok_or_else(|| LinkError::Lost("rank 0 hung up".to_owned()))
    }

    fn reply(&mut self, _: &RankReply) -> Result<(), LinkError> {
        Err(LinkError::Lost("nobody hears it".to_owned()))
    }
}

fn follow(commands: Vec<RankCommand>) -> Result<(), LinkError> {
    let seat = thread_group(2).pop().unwrap();
    load((1, 2), seat, DType::Fp32).follow(&mut Gone(commands.into()))
}

#[test]
fn a_goodbye_behind_an_answer_that_nobody_hears_is_an_end_in_order() {
    assert_eq!(follow(vec![RankCommand::WeightBytes, RankCommand::Shutdown]), Ok(()));
}

#[test]
fn a_leader_that_is_gone_without_one_is_named() {
    let lost = follow(vec![RankCommand::WeightBytes]).unwrap_err();
    assert!(lost.to_string().contains("rank 0 hung up"), "{lost}");
}

#[test]
fn a_broken_exchange_is_told_though_nobody_hears_of_it() {
    // Rank 0's seat is dropped: the first sum of the step finds nobody.
    let plan = feed(&[Fed::local(0, &[0], 0, &text(3, 0..4))]);
    let lost = follow(vec![RankCommand::Step { plan: plan.into(), forced: Default::default() }]).unwrap_err();
    assert!(lost.to_string().contains("rank 0") && !lost.to_string().contains("hung up"), "{lost}");
}
