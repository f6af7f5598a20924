//! Connections between ranks: large messages both ways at once, and who is let in.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use perigee_testkit::certificates::{Authority, Identity};
use perigee_tls::{RankTls, Reader, Tls, TlsFiles, Writer};

const LIMIT: Duration = Duration::from_secs(20);
/// More than all buffers between two processes hold together.
const LARGE: usize = 24 << 20;

fn ranks(authority: Option<&Authority>, identity: &Identity) -> RankTls {
    let files = TlsFiles {
        cert: Some(identity.certificate.clone()),
        key: Some(identity.key.clone()),
        ca: authority.map(|authority| authority.certificate.clone()),
    };
    Tls::load(files).unwrap().ranks().unwrap()
}

type Met = (std::io::Result<(Reader, Writer)>, std::io::Result<(Reader, Writer)>);

/// Both ends after their handshakes, the one that listens first.
fn meet(listening: &RankTls, dialling: &RankTls) -> Met {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let dialling = dialling.clone();
    let dialled = thread::spawn(move || {
        let tcp = TcpStream::connect(address).unwrap();
        dialling.dial(tcp, address.ip(), LIMIT)
    });
    let accepted = listening.accept(listener.accept().unwrap().0, LIMIT);
    (accepted, dialled.join().unwrap())
}

fn bytes(seed: usize) -> Vec<u8> {
    (0..LARGE).map(|index| (index * 31 + index / 251 + seed) as u8).collect()
}

#[test]
fn both_ranks_send_more_than_fits_before_either_reads() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority").unwrap();
    let identity = authority.issue("rank", &["gpu.example"]).unwrap();
    for tls in [ranks(Some(&authority), &identity), ranks(None, &identity)] {
        let (first, second) = meet(&tls, &tls);
        let ends = [first.unwrap(), second.unwrap()];
        let talking = ends.into_iter().enumerate().map(|(number, (mut reader, mut writer))| {
            // The write comes to its end only because another thread reads.
            let reading = thread::spawn(move || {
                let mut received = vec![0; LARGE];
                reader.read_exact(&mut received).unwrap();
                received
            });
            let writing = thread::spawn(move || {
                writer.write_all(&bytes(number)).unwrap();
                writer
            });
            (number, reading, writing)
        });
        for (number, reading, writing) in talking.collect::<Vec<_>>() {
            assert!(reading.join().unwrap() == bytes(1 - number));
            drop(writing.join().unwrap());
        }
    }
}

#[test]
fn a_rank_without_the_right_certificate_is_not_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) =
        (Authority::new(folder.path(), "ours").unwrap(), Authority::new(folder.path(), "theirs").unwrap());
    let (rank, foreign) =
        (ours.issue("rank", &["127.0.0.1"]).unwrap(), theirs.issue("foreign", &["127.0.0.1"]).unwrap());
    let other = ours.issue("other", &["127.0.0.1"]).unwrap();
    let with_authority = ranks(Some(&ours), &rank);
    // Two certificates of one authority are enough for each other, where the address is named in them.
    let (first, second) = meet(&with_authority, &ranks(Some(&ours), &other));
    assert!(first.is_ok() && second.is_ok());
    // One that trusts us, and is nobody whom we trust.
    let stranger = RankTls { server: with_authority.server.clone(), client: ranks(Some(&theirs), &foreign).client };
    let (accepted, _) = meet(&with_authority, &stranger);
    assert!(accepted.is_err());
    // Without an authority only the own certificate counts, even against another of the same authority.
    let trusting = RankTls { server: with_authority.server.clone(), client: ranks(Some(&ours), &other).client };
    let (accepted, _) = meet(&ranks(None, &rank), &trusting);
    assert!(accepted.is_err());
}
