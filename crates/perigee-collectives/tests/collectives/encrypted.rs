//! Groups over TCP with TLS: everything that plain ones do, and who is kept out.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::thread;
use std::time::Duration;

use perigee_collectives::{Collective, CollectiveError, SocketCollective, SocketTls};
use perigee_testkit::certificates::{Authority, Identity};
use perigee_tls::{RankTls, Tls, TlsFiles};

use crate::conformance::{conform, conform_on_divergence, conform_on_loss, conform_on_misuse, on_threads};
use crate::sockets::{bound, config, group_with};

/// How long a rank that is kept out tries.
const TRIES: Duration = Duration::from_millis(500);

fn tls(authority: Option<&Authority>, identity: &Identity) -> SocketTls {
    let files = TlsFiles {
        cert: Some(identity.certificate.clone()),
        key: Some(identity.key.clone()),
        ca: authority.map(|authority| authority.certificate.clone()),
    };
    let RankTls { server, client } = Tls::load(files).unwrap().ranks().unwrap();
    SocketTls { server, client }
}

/// An authority and a certificate of it for this machine.
fn issued(folder: &Path, name: &str) -> (Authority, Identity) {
    let authority = Authority::new(folder, &format!("{name}-authority")).unwrap();
    let identity = authority.issue(name, &["127.0.0.1"]).unwrap();
    (authority, identity)
}

fn groups(check: impl Fn(&dyn Fn(usize) -> Vec<SocketCollective>)) {
    let folder = tempfile::tempdir().unwrap();
    let (authority, identity) = issued(folder.path(), "rank");
    // A certificate that names nobody, without an authority: the ranks know each other by its key.
    let nameless = authority.issue("nameless", &["gpu.example"]).unwrap();
    for tls in [tls(Some(&authority), &identity), tls(None, &nameless)] {
        check(&|size| group_with(size, |config| config.tls = Some(tls.clone())));
    }
}

#[test]
fn encrypted_groups_conform() {
    groups(|group| {
        for size in 1..=4 {
            let ranks = on_threads(group(size), |mut rank| {
                conform(&mut rank);
                (rank.rank(), rank.size())
            });
            assert_eq!(ranks, (0..size).map(|rank| (rank, size)).collect::<Vec<_>>());
        }
    });
}

#[test]
fn encrypted_groups_fail_as_plain_ones_do() {
    groups(|group| {
        for size in 2..=4 {
            conform_on_loss(group(size));
        }
        conform_on_divergence(group(4));
        conform_on_misuse(group(3));
    });
}

#[test]
fn an_encrypted_root_whose_peer_reads_nothing_is_not_stuck() {
    groups(|group| {
        let mut ranks = group(2);
        ranks[0].set_patience(Duration::from_millis(200));
        let mut large = vec![0; 64 << 20];
        let error = ranks[0].broadcast(0, &mut large).unwrap_err();
        assert!(matches!(error, CollectiveError::PeerSilent { rank: 1, .. }), "{error}");
    });
}

#[test]
fn ranks_that_cannot_prove_who_they_are_stay_out_and_harm_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, identity) = issued(folder.path(), "rank");
    let (other, foreign) = issued(folder.path(), "foreign");
    let ours = Some(tls(Some(&authority), &identity));
    let mut known_by_key = tls(None, &identity);
    // It trusts this group, but has nothing that this group trusts.
    known_by_key.client = tls(Some(&authority), &foreign).client;
    let strangers =
        [("plain", None), ("of another authority", Some(tls(Some(&other), &foreign))), ("foreign", Some(known_by_key))];
    for (what, stranger) in strangers {
        let (listener, leader) = bound();
        let with = |rank, tls: Option<SocketTls>| {
            let mut config = config(rank, 2, leader);
            config.tls = tls;
            config
        };
        let first = with(0, ours.clone());
        let first = thread::spawn(move || SocketCollective::join_with_listener(first, listener));
        let mut refused = with(1, stranger);
        refused.join_timeout = TRIES;
        let error = SocketCollective::join(refused).unwrap_err();
        assert!(matches!(error, CollectiveError::Unreachable { rank: 0, .. }), "{what}: {error}");
        let second = SocketCollective::join(with(1, ours.clone())).unwrap();
        on_threads(vec![first.join().unwrap().unwrap(), second], |mut rank| {
            let mut data = [rank.rank() as f32 + 1.0];
            rank.all_reduce(&mut data).unwrap();
            assert_eq!(data, [3.0]);
        });
    }
}

#[test]
fn a_rank_with_a_certificate_says_nothing_in_plain_text() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, identity) = issued(folder.path(), "rank");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut config = config(1, 2, listener.local_addr().unwrap());
    config.tls = Some(tls(Some(&authority), &identity));
    config.join_timeout = TRIES;
    let joining = thread::spawn(move || SocketCollective::join(config));
    let (mut heard, mut said) = (listener.accept().unwrap().0, Vec::new());
    // It waits for an answer that does not come.
    heard.read_to_end(&mut said).unwrap();
    assert!(matches!(joining.join().unwrap().unwrap_err(), CollectiveError::Unreachable { rank: 0, .. }));
    // A TLS record with a handshake, and no hello.
    assert_eq!(said[0], 22, "{said:?}");
    assert!(!said.windows(4).any(|bytes| bytes == b"PRGh") && !said.windows(9).any(|bytes| bytes == b"replica-0"));
}
