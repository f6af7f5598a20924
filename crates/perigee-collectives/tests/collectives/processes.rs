//! Groups whose ranks are real processes: the test starts itself again for every follower and is rank 0. It covers what
//! threads cannot show, a follower started before its leader listens, and a process killed in the middle of a call.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::conformance::conform;
use perigee_collectives::{Collective, CollectiveError, SocketCollective, SocketConfig};
use perigee_testkit::sandbox::free_port;

const RANK: &str = "PERIGEE_TEST_RANK";
const LEADER: &str = "PERIGEE_TEST_LEADER";

/// Exit status of a follower that saw rank 2 die.
const SAW_RANK_2_DIE: i32 = 42;

fn config(rank: usize, size: usize, leader: SocketAddr) -> SocketConfig {
    SocketConfig {
        rank,
        size,
        leader,
        bind: Ipv4Addr::LOCALHOST.into(),
        group: "processes".to_owned(),
        incarnation: 1,
        join_timeout: Duration::from_secs(60),
        step_timeout: Duration::from_secs(60),
        tls: None,
    }
}

/// The rank and leader of this process, if it was started as a follower.
fn follower() -> Option<(usize, SocketAddr)> {
    let rank = std::env::var(RANK).ok()?.parse().unwrap();
    Some((rank, std::env::var(LEADER).unwrap().parse().unwrap()))
}

/// Starts `test` again as ranks 1 and up.
fn followers(test: &str, size: usize, leader: SocketAddr) -> Vec<Child> {
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args([&format!("processes::{test}"), "--exact"])
            .env(RANK, rank.to_string())
            .env(LEADER, leader.to_string())
            .spawn()
            .unwrap()
    };
    (1..size).map(start).collect()
}

fn bound() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn processes_conform() {
    let size = 4;
    if let Some((rank, leader)) = follower() {
        return conform(&mut SocketCollective::join(config(rank, size, leader)).unwrap());
    }
    // The followers start while nobody listens and must try again until the leader does.
    let leader = free_port().unwrap();
    let children = followers("processes_conform", size, leader);
    conform(&mut SocketCollective::join(config(0, size, leader)).unwrap());
    let statuses: Vec<ExitStatus> = children.into_iter().map(|mut child| child.wait().unwrap()).collect();
    assert!(statuses.iter().all(ExitStatus::success), "{statuses:?}");
}

#[test]
fn a_killed_process_fails_the_call_everywhere_within_a_second() {
    let size = 4;
    let call_until_error = |rank: &mut SocketCollective| loop {
        if let Err(error) = rank.all_reduce(&mut [1.0; 3000]) {
            return error;
        }
    };
    if let Some((rank, leader)) = follower() {
        let mut collective = SocketCollective::join(config(rank, size, leader)).unwrap();
        let error = call_until_error(&mut collective);
        assert!(matches!(error, CollectiveError::PeerLost { rank: 2 }), "rank {rank}: {error}");
        std::process::exit(SAW_RANK_2_DIE);
    }
    let (listener, leader) = bound();
    let mut children = followers("a_killed_process_fails_the_call_everywhere_within_a_second", size, leader);
    let mut collective = SocketCollective::join_with_listener(config(0, size, leader), listener).unwrap();
    for _ in 0..100 {
        collective.all_reduce(&mut [1.0; 3000]).unwrap();
    }
    children[1].kill().unwrap();
    let killed = Instant::now();
    let error = call_until_error(&mut collective);
    assert!(matches!(error, CollectiveError::PeerLost { rank: 2 }), "{error}");
    assert_eq!(children[0].wait().unwrap().code(), Some(SAW_RANK_2_DIE));
    assert_eq!(children[2].wait().unwrap().code(), Some(SAW_RANK_2_DIE));
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    assert!(!children[1].wait().unwrap().success());
}
