//! A cluster in which everybody must show a certificate of its authority, etcd included; and what the binary says to who
//! has none.

use std::io::Read;
use std::net::TcpListener;
use std::process::Output;

use perigee_proto::v1::ListReplicasRequest;
use perigee_testkit::certificates::{Authority, Identity as Issued};
use perigee_testkit::etcd::Etcd;
use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::{Clients, Started};
use perigee_tls::{ClientTlsOptions, Dialer};
use tonic::Code;

use crate::PATIENCE;
use crate::parts::{Cluster, Identity, MODEL, perigee};
use crate::streams::ask;

/// For whatever a process of the cluster is reached by.
const HERE: [&str; 2] = ["127.0.0.1", "localhost"];

/// How a client with this identity dials.
fn dialer(authority: &Authority, identity: &Issued) -> Dialer {
    let options = ClientTlsOptions {
        tls_ca: Some(authority.certificate.clone()),
        tls_cert: Some(identity.certificate.clone()),
        tls_key: Some(identity.key.clone()),
        insecure: false,
    };
    Dialer::new(Some(options.load().unwrap()))
}

fn run(arguments: &[String]) -> Output {
    perigee().args(arguments).output().unwrap()
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority").unwrap();
    let Some(etcd) = Etcd::start_with_tls(&authority, &authority.issue("etcd", &HERE).unwrap()) else { return };
    let member = authority.issue("member", &HERE).unwrap();
    let operator = authority.issue("operator", &["operator"]).unwrap();
    let etcd_options = vec![
        format!("--etcd-ca={}", authority.certificate.display()),
        format!("--etcd-cert={}", member.certificate.display()),
        format!("--etcd-key={}", member.key.display()),
    ];
    let identity = Identity { options: authority.options(&member), dialer: dialer(&authority, &operator) };
    let mut cluster = Cluster::over(etcd, identity, etcd_options);
    let mut replica = cluster.replica("a", 2, &[]);
    let router = cluster.router().await;
    router.until_ready(&["a"]).await;
    ask(&router.clients).await;

    // A client without a certificate is served, and is no operator.
    let nameless = ClientTlsOptions { tls_ca: Some(authority.certificate.clone()), ..ClientTlsOptions::default() };
    let nameless = Dialer::new(Some(nameless.load().unwrap()));
    let client = Clients::connect_by(&nameless, router.grpc).await.unwrap();
    ask(&client).await;
    let refused = client.cluster.clone().list_replicas(ListReplicasRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    // One without TLS is not.
    if let Ok(plain) = Clients::connect(router.grpc).await {
        assert!(plain.replicas().await.is_err());
    }

    // A router of another authority reaches no replica.
    let theirs = Authority::new(folder.path(), "theirs").unwrap();
    let foreign = theirs.issue("foreign", &HERE).unwrap();
    let foreign = Identity { options: theirs.options(&foreign), dialer: dialer(&theirs, &foreign) };
    let stranger = cluster.router_as(&foreign).await;
    stranger.until("a replica out of reach", |seen| seen.get("a").is_some_and(|s| s == "unreachable")).await;

    // The command line.
    let at = format!("--router {}", router.grpc);
    let client = |command: &str, more: &[String]| {
        let mut arguments = words(command);
        arguments.extend(words(&at));
        arguments.extend_from_slice(more);
        run(&arguments)
    };
    let listed = client("replicas --json", &authority.options(&operator));
    let text = String::from_utf8_lossy(&listed.stdout).into_owned() + &String::from_utf8_lossy(&listed.stderr);
    assert!(listed.status.success() && text.contains(r#""replica":"a""#), "{text}");
    let ca = [format!("--tls-ca={}", authority.certificate.display())];
    let answer = client("generate --prompt Hello --max-tokens 4", &ca);
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    let refused = client("replicas", &ca);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("--tls-cert"), "{text}");
    assert_eq!(client("replicas", &[]).status.code(), Some(1), "without TLS");
    replica.end();
    replica.ended(0);
}

#[test]
fn up_serves_itself_with_one_certificate_for_any_name() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority").unwrap();
    let elsewhere = authority.issue("elsewhere", &["gpu.example"]).unwrap();
    for options in [authority.options(&elsewhere), authority.options(&elsewhere).split_off(1)] {
        let mut arguments = words("up --replicas 1 --tp 2 --prompt Hello --max-tokens 4 --model");
        arguments.push(MODEL.to_owned());
        arguments.extend(options);
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_rank_with_a_certificate_meets_its_leader_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority").unwrap();
    let identity = authority.issue("rank", &HERE).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = perigee();
    command.args(["worker", "--rank=1", "--tp=2", "--threads=1", &format!("--model={MODEL}")]);
    command.arg(format!("--leader={}", listener.local_addr().unwrap())).args(authority.options(&identity));
    let mut rank = Started::spawn("rank", command, folder.path()).unwrap();
    let mut first = [0];
    listener.accept().unwrap().0.read_exact(&mut first).unwrap();
    // The beginning of a handshake, and not of the ranks' protocol.
    assert_eq!(first, [22]);
    signal("KILL", rank.pid()).unwrap();
    rank.wait(PATIENCE).unwrap();
}

#[test]
fn what_is_neither_secure_nor_on_this_machine_is_refused_as_a_usage() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority").unwrap();
    let identity = authority.issue("identity", &["a"]).unwrap();
    let cert = format!("--tls-cert={}", identity.certificate.display());
    for (line, more, says) in [
        ("router --listen 0.0.0.0:0 --registry etcd://127.0.0.1:1", None, "--insecure"),
        ("router --http 0.0.0.0:0 --registry etcd://127.0.0.1:1", None, "--http"),
        ("worker --internal 0.0.0.0:0", None, "--internal"),
        ("worker --listen 0.0.0.0:0", Some(&cert), "--tls-key"),
        ("worker --tp 2 --leader 10.0.0.1:7000", None, "--leader"),
        ("worker --tp 2 --leader 10.0.0.1:7000 --device cuda", Some(&cert), "NCCL"),
        ("worker --internal 10.0.0.1:0 --handoff pair --device cuda", Some(&cert), "--handoff"),
        ("worker --insecure --internal 0.0.0.0:0 --registry etcd://127.0.0.1:1", None, "--advertise"),
        ("worker --etcd-user perigee", None, "--etcd-password-file"),
        ("router --registry etcd://127.0.0.1:1 --tls-ca ca.pem", None, "--tls-cert"),
        ("up --replicas 0", None, "--replicas"),
        ("up --tls-key key.pem", None, "--tls-cert"),
        ("replicas --router 10.0.0.1:7411", None, "--tls-ca"),
    ] {
        let mut arguments = words(line);
        arguments.extend(more.cloned());
        let output = run(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {errors}");
        assert!(errors.contains(says), "{arguments:?}: {errors}");
    }
}
