//! The demo model, which `up` serves where no other is named: known texts, and a page's log probabilities as the training
//! framework computed them, by any number of ranks and in any chunks. A state that is wrong shows as broken text.

use std::process::Command;

use perigee_proto::v1::{FinishReason, GetModelInfoRequest, ScoreRequest};
use perigee_testkit::demo::{continuations, page};
use perigee_testkit::sandbox::Clients;

use crate::answer::ask;
use crate::{greedy, up};

/// Largest difference of a log probability, in nats.
const NEAR: f64 = 1e-3;
/// Most bits for a byte of the page, which the model was not trained on.
const BITS_PER_BYTE: f64 = 2.0;

/// What `up` answers to a prompt: drawn, as the model's own settings say, by a seed that is always the same.
const FIRST_PROMPT: &str = "In the beginning";
const FIRST_ANSWER: &str = " was from the roof of the earth.
Thus shall the LORD be a very great statute for ever; and the LORD shall be scattered throughout the earth: and he shall set on the earth
";

#[test]
fn the_first_answer_of_up_is_english() {
    for more in [&[][..], &["--replicas=1", "--tp=1", "--token-budget=3", "--max-batch=3"], &["--replicas=1", "--tp=4"]]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_perigee"));
        let output = command.args(["up", "--prompt", FIRST_PROMPT, "--max-tokens=64"]).args(more).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), FIRST_ANSWER, "{more:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_says_and_scores_what_the_training_framework_does() {
    let (known, page) = (continuations().unwrap(), page().unwrap());
    assert!(known.len() >= 3 && page.tokens.len() > 1000 && page.logprobs.len() + 1 == page.tokens.len());
    // Chunks of 37 positions end inside of every block that the recurrence and the cache are cut into.
    for (tp, budget) in [(1, 512), (1, 37), (2, 512), (2, 64)] {
        let spec = up(1, tp).model("demo").option(format!("--token-budget={budget}")).option("--max-batch=8");
        let sandbox = spec.start().unwrap();
        let clients = Clients::connect(sandbox.grpc).await.unwrap();
        let model = clients.inference.clone().get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((model.model.as_str(), model.has_tokenizer), ("demo", true));

        for continuation in &known {
            let mut request = greedy(Vec::new(), continuation.tokens.len() as u32);
            request.text = Some(continuation.prompt.clone());
            if let Some(sampling) = &mut request.sampling {
                sampling.ignore_eos = false;
            }
            let answer = ask(&clients, &request).await.finished();
            let choice = &answer.choices[0];
            let says = format!("{tp} ranks, chunks of {budget}: {:?}", continuation.prompt);
            assert_eq!((&choice.text, &choice.tokens), (&continuation.text, &continuation.tokens), "{says}");
            let ends = continuation.tokens.last().is_some_and(|last| model.eos_token_ids.contains(last));
            assert_eq!(choice.finish, Some(if ends { FinishReason::Stop } else { FinishReason::Length }), "{says}");
        }

        let request = ScoreRequest { token_ids: page.tokens.clone(), ..ScoreRequest::default() };
        let scored = clients.inference.clone().score(request).await.unwrap().into_inner();
        assert_eq!(scored.logprobs.len(), page.logprobs.len());
        let both = scored.logprobs.iter().map(|&logprob| f64::from(logprob)).zip(&page.logprobs);
        let worst = both.map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
        let bits = -scored.logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>() / 2f64.ln();
        let per_byte = bits / page.bytes as f64;
        println!("{tp} ranks, chunks of {budget}: {per_byte:.4} bits a byte, worst difference {worst:.1e} nats");
        assert!(worst < NEAR, "{tp} ranks, chunks of {budget}: off by {worst} nats");
        assert!(per_byte < BITS_PER_BYTE, "{per_byte} bits a byte");
    }
}
