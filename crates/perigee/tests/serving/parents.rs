//! What a process starts ends with it, however that ends: neither a benchmark nor a test that is killed leaves a cluster
//! behind. `up` and its workers are in `up.rs`.

use std::process::{Child, Command, Stdio};

use perigee_testkit::processes::{arguments, children, runs, wait_for};

use crate::PATIENCE;

/// The program with these arguments, its input open while this test runs.
fn start(arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_perigee"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// All that a process started, and what those did.
fn descendants(process: u32) -> Vec<u32> {
    children(process).into_iter().flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}

/// Ends a process by `end` once it has started `count` others of the program, and waits until all of them are gone.
fn all_end(mut process: Child, count: usize, end: impl FnOnce(&mut Child)) {
    let look = || {
        let mut found = descendants(process.id());
        // Others run on the way to it, such as taskset.
        found.retain(|&pid| arguments(pid).iter().any(|argument| matches!(&**argument, "router" | "up" | "worker")));
        (found.len() >= count).then_some(found)
    };
    let (started, _) = wait_for("what it starts", PATIENCE, look).unwrap();
    end(&mut process);
    process.wait().unwrap();
    let gone = || started.iter().all(|&pid| !runs(pid)).then_some(());
    wait_for("the end of all that it started", PATIENCE, gone).unwrap();
}

#[test]
fn a_benchmark_that_is_killed_leaves_no_router_and_no_cluster() {
    let kill = |process: &mut Child| process.kill().unwrap();
    all_end(start(&["bench", "router", "--replicas=1", "--requests=20000"]), 1, kill);
    // The cluster and the leaders of its replicas.
    all_end(start(&["bench", "migrate", "--context=1024"]), 3, kill);
}

#[test]
fn a_cluster_ends_with_its_input_where_it_should() {
    let close = |process: &mut Child| drop(process.stdin.take());
    let up = ["up", "--port=0", "--http-port=0", "--replicas=1", "--tp=2", "--model=random:tiny", "--end-with-input"];
    all_end(start(&up), 2, close);
}
