//! Files and options: what cannot be used is named, and what changes takes effect.

use std::net::SocketAddr;

use perigee_testkit::certificates::Authority;
use perigee_tls::{Purpose, ServerTlsOptions, TlsFiles};

use crate::server::{Health, call, dialer, load, try_load};

#[tokio::test]
async fn changed_files_are_used_and_bad_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let tls = load(Some(&ours), Some(&ours.issue("server", &["127.0.0.1"]).unwrap()));
    let server = Health::start(Some(tls.clone()), Purpose::Public).await;
    let client = dialer(Some(&ours), None);
    assert_eq!(call(&client, &server.at("127.0.0.1")).await, Ok(()));

    // The same files, for another name.
    let renewed = ours.issue("server", &["localhost"]).unwrap();
    tls.refresh();
    assert!(call(&client, &server.at("127.0.0.1")).await.is_err());
    assert_eq!(call(&client, &server.at("localhost")).await, Ok(()));

    std::fs::write(&renewed.key, "no key").unwrap();
    tls.refresh();
    assert_eq!(call(&client, &server.at("localhost")).await, Ok(()), "the former stay in force");
    ours.issue("server", &["127.0.0.1"]).unwrap();
    tls.refresh();
    assert_eq!(call(&client, &server.at("127.0.0.1")).await, Ok(()));
}

#[test]
fn files_that_cannot_be_used_are_named_with_their_option() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours").unwrap();
    let (one, other) = (ours.issue("one", &["a"]).unwrap(), ours.issue("other", &["b"]).unwrap());
    assert!(try_load(Some(&ours), Some(&one)).is_ok());
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let missing = folder.path().join("missing.pem");
    let good = TlsFiles {
        cert: Some(one.certificate.clone()),
        key: Some(one.key.clone()),
        ca: Some(ours.certificate.clone()),
    };
    for (files, says) in [
        (TlsFiles { cert: Some(missing.clone()), ..good.clone() }, ["--tls-cert", "missing.pem"]),
        (TlsFiles { cert: Some(empty.clone()), ..good.clone() }, ["--tls-cert", "no PEM certificate"]),
        (TlsFiles { key: Some(one.certificate.clone()), ..good.clone() }, ["--tls-key", "no PEM private key"]),
        (TlsFiles { key: Some(other.key.clone()), ..good.clone() }, ["--tls-key", "--tls-cert"]),
        (TlsFiles { ca: Some(one.key.clone()), ..good.clone() }, ["--tls-ca", "no PEM certificate"]),
        (TlsFiles { ca: Some(missing.clone()), ..good }, ["--tls-ca", "missing.pem"]),
    ] {
        let error = perigee_tls::Tls::load(files).expect_err(says[0]).to_string();
        assert!(says.iter().all(|part| error.contains(part)), "{error:?} lacks one of {says:?}");
    }
}

#[test]
fn options_that_contradict_each_other_or_the_addresses_are_faults() {
    let path = || Some("x.pem".into());
    let (near, far): (SocketAddr, SocketAddr) = ("127.0.0.1:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap());
    let none = ServerTlsOptions::default();
    let on = ServerTlsOptions { tls_cert: path(), tls_key: path(), ..none.clone() };
    for (options, address, faults) in [
        (none.clone(), near, 0),
        (none.clone(), far, 1),
        (ServerTlsOptions { insecure: true, ..none.clone() }, far, 0),
        (on.clone(), far, 0),
        (ServerTlsOptions { tls_key: None, ..on.clone() }, near, 1),
        (ServerTlsOptions { tls_cert: None, ..on.clone() }, near, 1),
        (ServerTlsOptions { tls_ca: path(), ..none }, far, 2),
    ] {
        let found = options.faults(&[("--listen", address)]);
        assert_eq!(found.len(), faults, "{options:?}: {found:?}");
    }
    assert_eq!(on.to_arguments(), ["--tls-cert=x.pem", "--tls-key=x.pem"]);
}
