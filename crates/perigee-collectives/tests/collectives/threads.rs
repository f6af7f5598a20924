//! Groups of threads, and the group of one, held to the conformance of every group.

use crate::conformance::{conform, conform_on_divergence, conform_on_loss, conform_on_misuse, on_threads};
use perigee_collectives::{Collective, CollectiveError, Solo, thread_group};

#[test]
fn groups_of_threads_conform() {
    for size in 1..=4 {
        let ranks = on_threads(thread_group(size), |mut rank| {
            conform(&mut rank);
            (rank.rank(), rank.size())
        });
        assert_eq!(ranks, (0..size).map(|rank| (rank, size)).collect::<Vec<_>>());
    }
}

#[test]
fn a_rank_alone_conforms() {
    conform(&mut Solo);
}

#[test]
fn a_rank_alone_still_checks_its_arguments() {
    assert!(matches!(Solo.broadcast(1, &mut []), Err(CollectiveError::RootOutOfRange { root: 1, size: 1 })));
    assert!(matches!(Solo.all_gather(&[1.0], &[2], &mut [0.0; 2]), Err(CollectiveError::WrongLength { .. })));
    assert!(matches!(Solo.all_gather(&[1.0], &[1, 0], &mut [0.0]), Err(CollectiveError::WrongCounts { .. })));
}

#[test]
fn a_lost_thread_is_named_by_all() {
    for size in 2..=4 {
        conform_on_loss(thread_group(size));
    }
}

#[test]
fn a_thread_that_diverges_is_noticed() {
    conform_on_divergence(thread_group(2));
    conform_on_divergence(thread_group(4));
}

#[test]
fn wrong_arguments_on_one_thread_end_the_group_for_all() {
    conform_on_misuse(thread_group(3));
}
