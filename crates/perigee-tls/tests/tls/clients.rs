//! Who is let in, and whom clients trust.

use perigee_testkit::certificates::Authority;
use perigee_tls::{Dialer, Purpose};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::server::{Health, call, dialer, load};

const HOSTS: [&str; 2] = ["localhost", "127.0.0.1"];

#[tokio::test]
async fn each_listener_lets_in_whom_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) =
        (Authority::new(folder.path(), "ours").unwrap(), Authority::new(folder.path(), "theirs").unwrap());
    let server = ours.issue("server", &HOSTS).unwrap();
    let (operator, stranger) = (ours.issue("operator", &["ops"]).unwrap(), theirs.issue("stranger", &HOSTS).unwrap());
    let tls = Some(load(Some(&ours), Some(&server)));
    let public = Health::start(tls.clone(), Purpose::Public).await;
    let internal = Health::start(tls.clone(), Purpose::Internal).await;
    let operators = Health::for_operators(tls).await;

    let nameless = dialer(Some(&ours), None);
    let known = dialer(Some(&ours), Some(&operator));
    let foreign = dialer(Some(&ours), Some(&stranger));
    let plain = Dialer::plain();
    for (server, client, what, good) in [
        (&public, &nameless, "a client without a certificate, public", true),
        (&public, &known, "with one, public", true),
        (&public, &foreign, "with one of another authority, public", false),
        (&public, &plain, "without TLS, public", false),
        (&internal, &nameless, "a client without a certificate, internal", false),
        (&internal, &known, "with one, internal", true),
        (&internal, &foreign, "with one of another authority, internal", false),
        (&internal, &plain, "without TLS, internal", false),
        (&operators, &nameless, "a client without a certificate, operators", false),
        (&operators, &known, "with one, operators", true),
    ] {
        let answer = call(client, &server.at("127.0.0.1")).await;
        assert_eq!(answer.is_ok(), good, "{what}: {answer:?}");
    }
    let refused = call(&nameless, &operators.at("localhost")).await.unwrap_err();
    assert!(refused.starts_with("Unauthenticated") && refused.contains("--tls-cert"), "{refused}");
}

#[tokio::test]
async fn without_an_authority_nobody_is_asked_for_a_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let server = ours.issue("server", &HOSTS).unwrap();
    let internal = Health::start(Some(load(None, Some(&server))), Purpose::Internal).await;
    assert_eq!(call(&dialer(Some(&ours), None), &internal.at("127.0.0.1")).await, Ok(()));
}

#[tokio::test]
async fn clients_trust_names_of_the_authority_and_their_own_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) =
        (Authority::new(folder.path(), "ours").unwrap(), Authority::new(folder.path(), "theirs").unwrap());
    let elsewhere = ours.issue("elsewhere", &["elsewhere.example"]).unwrap();
    let server = Health::start(Some(load(Some(&ours), Some(&elsewhere))), Purpose::Public).await;
    let address = server.at("127.0.0.1");
    let another = ours.issue("another", &HOSTS).unwrap();
    for (client, what) in [
        (dialer(Some(&ours), None), "another name"),
        (dialer(Some(&ours), Some(&another)), "another name, with a certificate"),
        (dialer(Some(&theirs), None), "another authority"),
        (dialer(None, None), "the system's authorities"),
    ] {
        let error = call(&client, &address).await.expect_err(what);
        assert!(error.starts_with(&address), "{what}: {error}");
        assert!(error.contains("certificate"), "{what}: {error}");
    }
    // Whoever has the same private key is one of us, wherever it runs.
    for authority in [Some(&ours), None] {
        assert_eq!(call(&dialer(authority, Some(&elsewhere)), &address).await, Ok(()));
    }
}

#[tokio::test]
async fn a_client_with_tls_is_told_when_the_server_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let server = Health::start(None, Purpose::Public).await;
    let error = call(&dialer(Some(&ours), None), &server.at("localhost")).await.unwrap_err();
    assert!(error.contains(&server.at("localhost")), "{error}");
    assert_eq!(call(&Dialer::plain(), &server.at("localhost")).await, Ok(()));
    assert!(call(&Dialer::plain(), "no port").await.is_err());
}

#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let identity = ours.issue("server", &HOSTS).unwrap();
    let server = Health::start(Some(load(Some(&ours), Some(&identity))), Purpose::Public).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    assert_eq!(call(&dialer(Some(&ours), None), &server.at("127.0.0.1")).await, Ok(()));
    drop(server);
    // The listener held them, and nothing was ever said to them.
    let mut byte = [0];
    assert!(!matches!(silent[0].read(&mut byte).await, Ok(1)));
}
