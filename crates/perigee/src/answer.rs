//! One prompt from the command line: sends it through a router by gRPC, prints the text as it comes, and tells how long
//! the first token and the others took and who served them.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{GenerateRequest, SamplingParams};

/// What to ask.
pub(crate) struct Question {
    /// The router.
    pub(crate) router: SocketAddr,
    /// The text.
    pub(crate) prompt: String,
    /// Most tokens of the answer.
    pub(crate) max_tokens: u32,
}

/// Asks greedily and prints the answer to standard output.
pub(crate) async fn ask(question: &Question, json: bool) -> anyhow::Result<()> {
    let mut client = InferenceClient::connect(format!("http://{}", question.router))
        .await
        .with_context(|| format!("reaching the router at {}", question.router))?;
    let request = GenerateRequest {
        text: Some(question.prompt.clone()),
        max_tokens: Some(question.max_tokens),
        sampling: Some(SamplingParams { temperature: Some(0.0), ..SamplingParams::default() }),
        ..GenerateRequest::default()
    };
    let started = Instant::now();
    let mut stream = client.generate(request).await?.into_inner();
    let mut times = Vec::new();
    let (mut text, mut replica) = (String::new(), String::new());
    while let Some(response) = stream.message().await? {
        if response.token_id.is_some() {
            times.push(started.elapsed());
        }
        if !json {
            print!("{}", response.text);
            std::io::stdout().flush()?;
        }
        text.push_str(&response.text);
        if !response.replica.is_empty() {
            replica = response.replica;
        }
    }
    let first = times.first().copied().unwrap_or_default();
    let rest = times.last().copied().unwrap_or_default().saturating_sub(first);
    let each = if times.len() > 1 { rest / (times.len() as u32 - 1) } else { Duration::ZERO };
    let (ttft, tpot) = (first.as_secs_f64() * 1e3, each.as_secs_f64() * 1e3);
    if json {
        let line = serde_json::json!({
            "text": text, "tokens": times.len(), "ttft_ms": ttft, "tpot_ms": tpot, "replica": replica,
        });
        println!("{line}");
    } else {
        println!();
        eprintln!("{} tokens from {replica}: TTFT {ttft:.1} ms, TPOT {tpot:.2} ms", times.len());
    }
    Ok(())
}
