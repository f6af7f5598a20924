//! Groups over TCP, each rank a thread of the test so that every rank's view can be checked: conformance and failures.
//! `rendezvous.rs` has what happens before a group has formed, `processes.rs` the groups of real processes.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use crate::conformance::{conform, conform_on_divergence, conform_on_loss, conform_on_misuse, on_threads};
use perigee_collectives::{Collective, CollectiveError, SocketCollective, SocketConfig};

type Joined = Result<SocketCollective, CollectiveError>;

pub(crate) fn config(rank: usize, size: usize, leader: SocketAddr) -> SocketConfig {
    SocketConfig {
        rank,
        size,
        leader,
        bind: Ipv4Addr::LOCALHOST.into(),
        group: "replica-0".to_owned(),
        incarnation: 7,
        join_timeout: Duration::from_secs(20),
        step_timeout: Duration::from_secs(20),
        tls: None,
    }
}

pub(crate) fn bound() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Joins one rank with each configuration, the first of which is the leader's.
fn join(listener: TcpListener, configs: Vec<SocketConfig>) -> Vec<Joined> {
    let mut listener = Some(listener);
    let threads: Vec<_> = configs
        .into_iter()
        .map(|config| {
            let listener = listener.take();
            thread::spawn(move || match listener {
                Some(listener) => SocketCollective::join_with_listener(config, listener),
                None => SocketCollective::join(config),
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

pub(crate) fn group_with(size: usize, adapt: impl Fn(&mut SocketConfig)) -> Vec<SocketCollective> {
    let (listener, leader) = bound();
    let configs = (0..size).map(|rank| {
        let mut config = config(rank, size, leader);
        adapt(&mut config);
        config
    });
    join(listener, configs.collect()).into_iter().map(Result::unwrap).collect()
}

fn group(size: usize) -> Vec<SocketCollective> {
    group_with(size, |_| ())
}

#[test]
fn groups_over_sockets_conform() {
    for size in 1..=4 {
        let ranks = on_threads(group(size), |mut rank| {
            conform(&mut rank);
            (rank.rank(), rank.size())
        });
        assert_eq!(ranks, (0..size).map(|rank| (rank, size)).collect::<Vec<_>>());
    }
}

#[test]
fn a_rank_that_listens_everywhere_is_found() {
    let ranks = group_with(3, |config| config.bind = Ipv4Addr::UNSPECIFIED.into());
    on_threads(ranks, |mut rank| {
        let mut data = [1.0];
        rank.all_reduce(&mut data).unwrap();
        assert_eq!(data, [3.0]);
    });
}

#[test]
fn a_lost_rank_is_named_by_all() {
    for size in 2..=4 {
        conform_on_loss(group(size));
    }
}

#[test]
fn a_rank_that_diverges_is_noticed() {
    conform_on_divergence(group(2));
    conform_on_divergence(group(4));
}

#[test]
fn wrong_arguments_on_one_rank_end_the_group_for_all() {
    conform_on_misuse(group(3));
}

#[test]
fn a_lost_rank_is_noticed_while_another_is_slow() {
    let mut ranks = group(3).into_iter();
    let (mut waiting, slow, dead) = (ranks.next().unwrap(), ranks.next().unwrap(), ranks.next().unwrap());
    drop(dead);
    let started = Instant::now();
    let error = waiting.all_reduce(&mut [1.0]).unwrap_err();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 2 }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1));
    drop(slow);
}

#[test]
fn a_silent_rank_is_named_within_the_timeout() {
    let timeout = Duration::from_millis(200);
    let mut ranks = group_with(3, |config| config.step_timeout = timeout);
    let silent = ranks.pop().unwrap();
    let started = Instant::now();
    on_threads(ranks, move |mut rank| {
        let error = rank.all_reduce(&mut [1.0]).unwrap_err();
        let elapsed = started.elapsed();
        // Rank 2 is named by both, by the one that noticed first and by the one that it told.
        let CollectiveError::PeerSilent { rank: 2, waited } = error else { panic!("{error}") };
        assert!(waited >= timeout && elapsed >= timeout, "{waited:?} {elapsed:?}");
        assert!(elapsed < timeout + Duration::from_secs(1), "{elapsed:?}");
    });
    drop(silent);
}

#[test]
fn a_root_whose_peer_reads_nothing_is_not_stuck() {
    let timeout = Duration::from_millis(200);
    let mut ranks = group_with(2, |config| config.step_timeout = timeout);
    let mut large = vec![0; 64 << 20];
    let error = ranks[0].broadcast(0, &mut large).unwrap_err();
    assert!(matches!(error, CollectiveError::PeerSilent { rank: 1, .. }), "{error}");
}

#[test]
fn an_abort_ends_a_waiting_call_and_the_group() {
    let mut ranks = group(2).into_iter();
    let (mut first, mut second) = (ranks.next().unwrap(), ranks.next().unwrap());
    let handle = first.abort_handle();
    let (about_to_wait, waits) = channel();
    let waiting = thread::spawn(move || {
        about_to_wait.send(()).unwrap();
        first.all_reduce(&mut [1.0]).unwrap_err()
    });
    waits.recv().unwrap();
    handle.abort();
    handle.abort();
    assert!(matches!(waiting.join().unwrap(), CollectiveError::Aborted));
    // The first rank may have given its part before it was aborted; the call after that needs another.
    let error = second.all_reduce(&mut [1.0]).and_then(|()| second.all_reduce(&mut [1.0])).unwrap_err();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 0 }), "{error}");
}

#[test]
fn dropping_a_rank_is_seen_while_its_abort_handle_lives() {
    let mut ranks = group(2);
    let dropped = ranks.pop().unwrap();
    let handle = dropped.abort_handle();
    drop(dropped);
    let error = ranks[0].or(&mut [1]).unwrap_err();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 1 }), "{error}");
    handle.abort();
}
