//! `perigee chat`: a conversation in the terminal, a line a turn. After each answer it tells how long the first token took,
//! the mean time between tokens, and which replica has the session. It keeps the history itself and sends all of it.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{ChatMessage, GenerateRequest, SamplingParams};
use tonic::transport::Channel;

use super::generate::Answer;
use super::{ClientArgs, block_on, print_json, refused};

/// Arguments of `chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// What the model is told before the conversation.
    #[arg(long)]
    system: Option<String>,
    /// Most tokens of an answer; by default as many as the model's length allows.
    #[arg(long)]
    max_tokens: Option<u32>,
    /// 0 takes the most likely token; by default the model's value.
    #[arg(long)]
    temperature: Option<f32>,
    /// Seed of the draws; by default the router draws one for each answer.
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Reads turns until the end of the input.
pub(crate) fn run(args: &ChatArgs) -> anyhow::Result<()> {
    block_on(converse(args))
}

async fn converse(args: &ChatArgs) -> anyhow::Result<()> {
    let mut inference = args.client.inference().await?;
    let is_person = std::io::stdin().is_terminal();
    if is_person {
        eprintln!("A line is a turn; /new begins anew, /quit or Ctrl-D ends.");
    }
    let beginning: Vec<ChatMessage> = args.system.iter().map(|text| message("system", text)).collect();
    let mut messages = beginning.clone();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if is_person {
            eprint!("> ");
        }
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/new" => messages.clone_from(&beginning),
            text => {
                messages.push(message("user", text));
                match args.answer(&mut inference, &messages).await {
                    Ok(answer) => messages.push(message("assistant", &answer)),
                    // A person may say it otherwise; a script should know.
                    Err(error) if is_person => {
                        messages.pop();
                        eprintln!("{error:#}");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

impl ChatArgs {
    /// Asks for the next turn, prints it as it comes, and returns its text.
    async fn answer(
        &self,
        inference: &mut InferenceClient<Channel>,
        messages: &[ChatMessage],
    ) -> anyhow::Result<String> {
        let request = GenerateRequest {
            messages: messages.to_vec(),
            max_tokens: self.max_tokens,
            sampling: Some(SamplingParams {
                temperature: self.temperature,
                seed: self.seed,
                ..SamplingParams::default()
            }),
            ..GenerateRequest::default()
        };
        let started = Instant::now();
        let mut stream = inference.generate(request).await.map_err(refused)?.into_inner();
        let mut answer = Answer::default();
        while let Some(response) = stream.message().await.map_err(refused)? {
            if !self.client.json {
                print!("{}", response.text);
                // Whoever closed the output does not read on either.
                let _ = std::io::stdout().flush();
            }
            answer.take(response, Instant::now())?;
        }
        answer.measure(started);
        if self.client.json {
            print_json(&answer)?;
        } else {
            println!();
            eprintln!("{}", answer.figures());
        }
        Ok(answer.text())
    }
}
