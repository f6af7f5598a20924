//! How groups over TCP form: strangers of every kind are kept out without harm, ranks that die or come twice while
//! joining are handled, and a rendezvous that cannot succeed says who is missing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use crate::conformance::on_threads;
use crate::sockets::{bound, config};
use perigee_collectives::{Collective, CollectiveError, Refusal, SocketCollective, SocketConfig};
use perigee_testkit::sandbox::free_port;

/// Forms a group of 3 while `intrude` runs against the leader's address, before rank 2 has come.
fn with_intruder<T>(intrude: impl FnOnce(SocketAddr) -> T) -> T {
    let (listener, leader) = bound();
    let first = thread::spawn(move || SocketCollective::join_with_listener(config(0, 3, leader), listener));
    let second = thread::spawn(move || SocketCollective::join(config(1, 3, leader)));
    let result = intrude(leader);
    let third = SocketCollective::join(config(2, 3, leader)).unwrap();
    let group = vec![first.join().unwrap().unwrap(), second.join().unwrap().unwrap(), third];
    on_threads(group, |mut rank| {
        let mut data = [rank.rank() as f32];
        rank.all_reduce(&mut data).unwrap();
        assert_eq!(data, [3.0]);
    });
    result
}

fn refused(adapt: impl FnOnce(&mut SocketConfig)) -> Refusal {
    let error = with_intruder(|leader| {
        let mut config = config(2, 3, leader);
        adapt(&mut config);
        SocketCollective::join(config).unwrap_err()
    });
    let CollectiveError::Refused { refusal, .. } = error else { panic!("{error}") };
    refusal
}

#[test]
fn ranks_of_other_groups_are_refused_by_name_and_harm_nobody() {
    assert_eq!(refused(|config| config.group = "other".to_owned()), Refusal::Group { found: "other".to_owned() });
    assert_eq!(refused(|config| config.incarnation = 8), Refusal::Incarnation);
    assert_eq!(refused(|config| config.size = 4), Refusal::Size { expected: 3, found: 4 });
}

#[test]
fn another_version_is_refused() {
    let answer = with_intruder(|leader| {
        let mut stream = TcpStream::connect(leader).unwrap();
        // The mark of a hello and version 999.
        stream.write_all(b"PRGh\xe7\x03").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    });
    // The mark of an answer, version 1, refused for the version.
    assert_eq!(answer[..7], *b"PRGa\x01\x00\x01");
}

#[test]
fn garbage_and_silence_are_dropped_and_harm_nobody() {
    let silent = with_intruder(|leader| {
        let mut garbage = TcpStream::connect(leader).unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // The leader hangs up without a word; unread bytes may turn that into a reset.
        assert!(!matches!(garbage.read(&mut [0]), Ok(count) if count > 0));
        drop(TcpStream::connect(leader).unwrap());
        TcpStream::connect(leader).unwrap()
    });
    drop(silent);
}

#[test]
fn a_rank_that_came_twice_is_refused() {
    // Of two ranks 1, whichever comes second is refused; the group forms with the other.
    let (listener, leader) = bound();
    let (sender, twins) = channel();
    for _ in 0..2 {
        let sender = sender.clone();
        thread::spawn(move || sender.send(SocketCollective::join(config(1, 3, leader))).unwrap());
    }
    let first = thread::spawn(move || SocketCollective::join_with_listener(config(0, 3, leader), listener));
    let error = twins.recv().unwrap().unwrap_err();
    let CollectiveError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!(refusal, Refusal::DuplicateRank { rank: 1 });
    let third = SocketCollective::join(config(2, 3, leader)).unwrap();
    let second = twins.recv().unwrap().unwrap();
    let group = vec![first.join().unwrap().unwrap(), second, third];
    on_threads(group, |mut rank| rank.or(&mut [0]).unwrap());
}

/// The hello with which a rank registers, byte by byte: README.md has the layout.
fn raw_hello(rank: u32) -> Vec<u8> {
    let mut hello = b"PRGh\x01\x00\x01\x09".to_vec();
    hello.extend(rank.to_le_bytes());
    hello.extend(3_u32.to_le_bytes());
    hello.extend(7_u64.to_le_bytes());
    hello.extend([4, 1, 0, 127, 0, 0, 1]);
    hello.extend([0; 12]);
    hello.extend(b"replica-0");
    hello
}

#[test]
fn a_rank_outside_the_group_is_refused() {
    for rank in [0, 3, u32::MAX] {
        let answer = with_intruder(|leader| {
            let mut stream = TcpStream::connect(leader).unwrap();
            stream.write_all(&raw_hello(rank)).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            answer
        });
        // The mark of an answer, version 1, refused for the rank in a group of 3.
        assert_eq!(answer[..9], *b"PRGa\x01\x00\x05\x00\x03", "rank {rank}");
    }
}

#[test]
fn a_rank_that_died_while_joining_makes_room_for_its_successor() {
    let (listener, leader) = bound();
    let first = thread::spawn(move || SocketCollective::join_with_listener(config(0, 3, leader), listener));
    // Rank 2 registers and is gone before rank 1, without which the group cannot form, has come.
    TcpStream::connect(leader).unwrap().write_all(&raw_hello(2)).unwrap();
    // With rank 1 the table would be complete, were the dead rank still counted; so nobody is answered.
    let mut unanswered = TcpStream::connect(leader).unwrap();
    unanswered.write_all(&raw_hello(1)).unwrap();
    unanswered.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(unanswered.read(&mut [0]).is_err());
    drop(unanswered);
    let second = thread::spawn(move || SocketCollective::join(config(1, 3, leader)));
    let third = SocketCollective::join(config(2, 3, leader)).unwrap();
    let group = vec![first.join().unwrap().unwrap(), second.join().unwrap().unwrap(), third];
    on_threads(group, |mut rank| rank.or(&mut [0]).unwrap());
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let (listener, leader) = bound();
    let mut alone = config(0, 3, leader);
    alone.join_timeout = Duration::from_millis(100);
    let error = SocketCollective::join_with_listener(alone, listener).unwrap_err();
    assert!(matches!(&error, CollectiveError::JoinTimeout { missing, .. } if *missing == [1, 2]), "{error}");

    let mut alone = config(1, 3, free_port().unwrap());
    alone.join_timeout = Duration::from_millis(100);
    let error = SocketCollective::join(alone).unwrap_err();
    assert!(matches!(error, CollectiveError::Unreachable { rank: 0, .. }), "{error}");
}

#[test]
fn configurations_that_contradict_themselves_are_refused() {
    let (listener, leader) = bound();
    let invalid = |adapt: fn(&mut SocketConfig), field: &str| {
        let mut config = config(1, 2, leader);
        adapt(&mut config);
        let error = SocketCollective::join(config).unwrap_err();
        assert!(matches!(&error, CollectiveError::InvalidConfig { problem } if problem.contains(field)), "{error}");
    };
    invalid(|config| config.size = 0, "size");
    invalid(|config| config.rank = 2, "rank");
    invalid(|config| config.group = "x".repeat(256), "group");
    invalid(|config| config.step_timeout = Duration::ZERO, "step_timeout");
    invalid(|config| config.join_timeout = Duration::MAX, "join_timeout");
    let error = SocketCollective::join_with_listener(config(1, 2, leader), listener).unwrap_err();
    assert!(matches!(error, CollectiveError::InvalidConfig { .. }), "{error}");
}
