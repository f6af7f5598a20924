//! What probes hear of a router and of a replica's ranks from their start to their end: that they live as soon as they
//! listen, and in which state they are.

use std::io::{PipeReader, Read, Write, pipe};
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::{Clients, HealthCheckRequest, eventually, free_port, http_get};

use crate::PATIENCE;
use crate::parts::{Cluster, MODEL, perigee};
use crate::streams::Open;

/// Waits until a process says on its HTTP port that it is in this state; it is alive all the time.
async fn is(http: SocketAddr, state: &str) {
    let mut last = None;
    let wanted = if state == "ready" { (200, "ok\n".to_owned()) } else { (503, format!("{state}\n")) };
    let look = async || {
        // Its port may not be open yet.
        let Ok(heard) = http_get(http, "/health").await else { return Ok(None) };
        assert_eq!(http_get(http, "/live").await?.0, 200);
        let is_there = heard == wanted;
        last = Some(heard);
        Ok(is_there.then_some(()))
    };
    if let Err(error) = eventually(&format!("a probe that says {state}"), PATIENCE, look).await {
        panic!("{error}: {last:?}");
    }
}

/// Waits until grpc.health.v1 says whether a process serves.
async fn serves(grpc: SocketAddr, service: &str, wanted: bool) {
    let look = async || {
        let Ok(clients) = Clients::connect(grpc).await else { return Ok(None) };
        let question = HealthCheckRequest { service: service.to_owned() };
        let status = clients.health.clone().check(question).await.expect("told").into_inner().status();
        Ok((status.as_str_name() == if wanted { "SERVING" } else { "NOT_SERVING" }).then_some(()))
    };
    eventually(&format!("health that says {wanted}"), PATIENCE, look).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_tell_the_state_of_every_process_from_its_start_to_its_end() {
    const INFERENCE: &str = "perigee.v1.Inference";
    let Some(mut cluster) = Cluster::start() else { return };
    let mut router = cluster.router().await;
    is(router.http, "waiting").await;
    serves(router.grpc, "", false).await;

    let (meeting, public) = (free_port().unwrap(), free_port().unwrap());
    let (leader_http, follower_http) = (free_port().unwrap(), free_port().unwrap());
    let options = [format!("--http={leader_http}"), format!("--listen={public}")];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut leader = cluster.rank("a", 0, 2, meeting, &options);
    is(leader_http, "forming").await;
    serves(public, INFERENCE, false).await;
    router.until("a forming replica", |seen| seen.get("a").is_some_and(|status| status == "forming")).await;

    let mut follower = cluster.rank("a", 1, 2, meeting, &[&format!("--http={follower_http}")]);
    is(follower_http, "ready").await;
    is(leader_http, "ready").await;
    router.until_ready(&["a"]).await;
    is(router.http, "ready").await;
    for (grpc, service) in [(router.grpc, ""), (router.grpc, INFERENCE), (public, ""), (public, INFERENCE)] {
        serves(grpc, service, true).await;
    }

    let endless = Open::start(&router.clients, 3);
    assert!(endless.goes_on(5).await);
    signal("TERM", router.process.pid()).unwrap();
    is(router.http, "draining").await;
    signal("TERM", leader.pid()).unwrap();
    is(leader_http, "draining").await;
    serves(public, INFERENCE, false).await;
    drop(endless);
    for process in [&mut router.process, &mut leader, &mut follower] {
        assert_eq!(process.wait(PATIENCE).unwrap().code(), Some(0), "{}", process.errors());
    }
}

/// What a pipe holds that nobody reads.
const PIPE: usize = 65_536;

/// A worker whose parent does not listen yet, so that it waits inside its loading to say how far it is.
struct Unheard {
    child: Child,
    events: Option<PipeReader>,
}

impl Unheard {
    fn start(registry: &str, http: SocketAddr, public: SocketAddr) -> Self {
        let (events, mut full) = pipe().unwrap();
        full.write_all(&[b'\n'; PIPE]).unwrap();
        let mut command = perigee();
        command.args(["worker", "--supervised", "--replica=a", "--threads=1", &format!("--model={MODEL}"), registry]);
        command.args([format!("--http={http}"), format!("--listen={public}")]);
        // Its standard input stays open: it ends with its parent.
        let child = command.stdin(Stdio::piped()).stdout(full).spawn().unwrap();
        Self { child, events: Some(events) }
    }

    /// The parent listens from now on.
    fn hear(&mut self) {
        let mut events = self.events.take().unwrap();
        std::thread::spawn(move || events.read_to_end(&mut Vec::new()));
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_loads_says_so_and_takes_no_request() {
    const INFERENCE: &str = "perigee.v1.Inference";
    let Some(mut cluster) = Cluster::start() else { return };
    let router = cluster.router().await;
    let (http, public) = (free_port().unwrap(), free_port().unwrap());
    let mut replica = Unheard::start(&cluster.etcd.registry(), http, public);
    is(http, "loading").await;
    router.until("a loading replica", |seen| seen.get("a").is_some_and(|status| status == "loading")).await;
    serves(public, INFERENCE, false).await;
    is(router.http, "waiting").await;

    replica.hear();
    is(http, "ready").await;
    serves(public, INFERENCE, true).await;
    router.until_ready(&["a"]).await;
}
