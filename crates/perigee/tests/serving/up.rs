//! `perigee up` as a user runs it: a prompt that is answered, an end in order on a signal, and no process left behind
//! however it ends.

use std::ops::ControlFlow;
use std::process::Command;
use std::time::{Duration, Instant};

use perigee_testkit::processes::{children, runs, signal, signal_group, wait_for};
use perigee_testkit::sandbox::Sandbox;
use serde_json::Value;

use crate::answer::read;
use crate::{PATIENCE, greedy, up};

/// From the start of a built binary to the first token.
const FIRST_TOKEN: Duration = Duration::from_secs(10);
/// How long an end in order may take where nothing runs.
const END: Duration = Duration::from_secs(5);

fn answer(arguments: &[&str]) -> (std::process::Output, Duration) {
    let began = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_perigee")).arg("up").args(arguments).output().unwrap();
    (output, began.elapsed())
}

#[test]
fn a_prompt_is_answered_and_the_times_are_told() {
    let (output, took) = answer(&["--prompt", "Hello", "--max-tokens", "16"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(output.stdout.len() > 8, "{:?}", String::from_utf8_lossy(&output.stdout));
    let told: Vec<&str> = errors.lines().rev().take(2).collect();
    let [times, served] = told[..] else { panic!("{errors}") };
    assert!(served.contains("16 tokens from replica-"), "{errors}");
    assert!(times.starts_with("TTFT ") && times.contains(" ms, TPOT ") && times.ends_with(" ms"), "{errors}");
    // The whole run bounds the time to its first token.
    assert!(took < FIRST_TOKEN, "{took:?}");

    let (output, _) = answer(&["--prompt", "Hello", "--max-tokens", "16", "--json", "--replicas", "1", "--tp", "1"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let choice = &told["choices"][0];
    assert_eq!(choice["tokens"].as_array().map(Vec::len), Some(16), "{told}");
    assert_eq!((choice["replica"].as_str(), choice["finish_reason"].as_str()), (Some("replica-0"), Some("length")));
    assert!(told["ttft_ms"].as_f64().unwrap() > 0.0 && told["tpot_ms"].as_f64().unwrap() > 0.0, "{told}");
    assert!(!choice["text"].as_str().unwrap().is_empty(), "{told}");
}

#[test]
fn what_cannot_start_says_why() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--port={}", taken.local_addr().unwrap().port());
    for (arguments, code, says) in [
        (vec![port.as_str(), "--http-port=0"], 1, "--port"),
        (vec!["--port=0", "--http-port=0", "--model=random:huge"], 1, "huge"),
        (vec!["--port=0", "--http-port=0", "--model=/nonexistent/model"], 1, "/nonexistent/model"),
        (vec!["--port=0", "--http-port=0", "--tp=3"], 1, "3"),
        (vec!["--replicas=two"], 2, "--replicas"),
        (vec!["--no-such-option"], 2, "--no-such-option"),
    ] {
        let (output, took) = answer(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(says), "{arguments:?}: {errors}");
        assert!(took < FIRST_TOKEN, "{arguments:?} took {took:?}");
    }
}

/// Every worker is a child of `up`, and is gone with it.
fn no_orphans(sandbox: &Sandbox, workers: &[u32]) {
    let gone = || workers.iter().all(|&pid| !runs(pid)).then_some(());
    wait_for("the end of every worker", END, gone)
        .unwrap_or_else(|error| panic!("{error} of {workers:?}: {}", sandbox.up.errors()));
}

fn workers(sandbox: &Sandbox) -> Vec<u32> {
    let mut told = sandbox.worker_pids();
    told.sort_unstable();
    assert_eq!(told, children(sandbox.up.pid()), "the line names every process");
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_ends_it_after_what_runs() {
    for name in ["TERM", "INT"] {
        let mut sandbox = up(2, 2).own_group().start().unwrap();
        let workers = workers(&sandbox);
        let clients = sandbox.connect().await.unwrap();
        let (first, started) = tokio::sync::oneshot::channel();
        let running = {
            let (clients, mut first) = (clients.clone(), Some(first));
            tokio::spawn(async move {
                read(&clients, &greedy(vec![5, 6, 7], 400), |_| {
                    if let Some(first) = first.take() {
                        first.send(()).unwrap();
                    }
                    ControlFlow::Continue(())
                })
                .await
            })
        };
        started.await.expect("a first token");
        // To the whole group, as a terminal does on Ctrl-C.
        signal_group(name, sandbox.up.pid()).unwrap();
        let answer = tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap().finished();
        assert_eq!(answer.tokens(), 400, "what runs goes on to its end");
        drop(clients);
        let status = sandbox.up.wait(END).unwrap();
        assert_eq!(status.code(), Some(0), "{}", sandbox.up.errors());
        no_orphans(&sandbox, &workers);
    }
}

#[test]
fn when_it_is_killed_its_workers_end_too() {
    let mut sandbox = up(2, 2).start().unwrap();
    let workers = workers(&sandbox);
    signal("KILL", sandbox.up.pid()).unwrap();
    sandbox.up.wait(END).unwrap();
    no_orphans(&sandbox, &workers);
}
