//! A context of a million tokens over the whole way: a client's token ids, a router, pages, the last chunk of the prompt and decode steps
//! behind it. What lies before that chunk is filled in, since it would take a CPU hours.

use perigee_proto::v1::FinishReason;
use perigee_testkit::sandbox::Clients;
use tonic::Code;

use crate::answer::ask;
use crate::{greedy, up};

const CONTEXT: usize = 1 << 20;
const OUTPUT: u32 = 3;
/// Tokens of the prompt that are computed.
const COMPUTED: usize = 70;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_tokens_of_context_are_served() {
    let filled = CONTEXT - COMPUTED;
    let longest = CONTEXT + OUTPUT as usize;
    let spec = up(1, 1).option(format!("--fill-prompts={filled}")).option(format!("--max-model-len={longest}"));
    let spec = spec.option("--state-slots=1").option("--max-batch=1").option("--token-budget=131072");
    let sandbox = spec.start().unwrap();
    let clients = Clients::connect(sandbox.grpc).await.unwrap();
    let prompt = |length: usize| (0..length).map(|at| 3 + (at * 7 % 256) as u32).collect::<Vec<u32>>();

    let refused = ask(&clients, &greedy(prompt(longest + 1), OUTPUT)).await;
    assert_eq!(refused.status().code(), Code::InvalidArgument, "{:?}", refused.status());

    let mut answer = ask(&clients, &greedy(prompt(CONTEXT), OUTPUT)).await;
    let choice = answer.choices.remove(0);
    let usage = choice.usage.unwrap();
    assert_eq!((choice.finish, choice.tokens.len()), (Some(FinishReason::Length), OUTPUT as usize));
    assert_eq!((usage.prompt, usage.completion), (CONTEXT as u64, u64::from(OUTPUT)));
}
