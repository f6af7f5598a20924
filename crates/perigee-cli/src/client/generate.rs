//! `perigee generate`: one request to a router. Text or token ids are printed as they come; with several choices, or with
//! --json, when all are there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use perigee_proto::v1::{FinishReason, GenerateRequest, GenerateResponse, SamplingParams};
use serde::Serialize;
use tonic::Request;

use super::{ClientArgs, block_on, print_json, refused};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    /// Prompt as text.
    #[arg(long, required_unless_present_any = ["tokens", "tokens_from"], conflicts_with_all = ["tokens", "tokens_from"])]
    prompt: Option<String>,
    /// Prompt as token ids, separated by commas.
    #[arg(long, value_delimiter = ',', conflicts_with = "tokens_from")]
    tokens: Vec<u32>,
    /// The same in a file, separated by commas or white space: a command line has no room for very many.
    #[arg(long, value_name = "FILE")]
    tokens_from: Option<PathBuf>,
    /// Most tokens to generate; by default as many as the model's length allows.
    #[arg(long)]
    max_tokens: Option<u32>,
    /// 0 takes the most likely token; by default the model's value.
    #[arg(long)]
    temperature: Option<f32>,
    /// Keeps the k most likely tokens.
    #[arg(long)]
    top_k: Option<u32>,
    /// Keeps the smallest set of tokens that reaches this probability.
    #[arg(long)]
    top_p: Option<f32>,
    /// Drops tokens less likely than this share of the most likely one.
    #[arg(long)]
    min_p: Option<f32>,
    /// Seed of the draws; by default the router draws one.
    #[arg(long)]
    seed: Option<u64>,
    /// Choices.
    #[arg(short, long)]
    n: Option<u32>,
    /// String that ends generation; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// With --json, so many of the likeliest tokens at each generated one, with their log-probabilities.
    #[arg(long, requires = "json")]
    logprobs: Option<u32>,
    /// Go on after the model's end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Larger goes first where requests wait.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Name of the request in logs.
    #[arg(long, default_value = "")]
    request_id: String,
    /// Seconds after which the request is given up.
    #[arg(long)]
    timeout: Option<f64>,
    #[command(flatten)]
    client: ClientArgs,
}

/// The whole answer in JSON.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Answer {
    request_id: String,
    choices: Vec<Choice>,
    /// Milliseconds to the first token.
    ttft_ms: f64,
    /// Mean milliseconds between tokens of a choice after the first; 0 with fewer than two.
    tpot_ms: f64,
}

/// One choice.
#[derive(Debug, Default, Serialize)]
struct Choice {
    session: String,
    /// The replica that sent the last token.
    replica: String,
    text: String,
    tokens: Vec<u32>,
    /// For each token the likeliest ones, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<Vec<(u32, f32)>>,
    finish_reason: Option<&'static str>,
    seed: Option<u64>,
    prompt_tokens: u64,
    #[serde(skip)]
    times: Vec<Instant>,
}

impl GenerateArgs {
    fn request(&self) -> anyhow::Result<Request<GenerateRequest>> {
        let mut request = Request::new(GenerateRequest {
            request_id: self.request_id.clone(),
            text: self.prompt.clone(),
            token_ids: match &self.tokens_from {
                Some(file) => token_ids(file)?,
                None => self.tokens.clone(),
            },
            sampling: Some(SamplingParams {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
                n: self.n,
                ignore_eos: self.ignore_eos,
                logprobs: self.logprobs,
                ..SamplingParams::default()
            }),
            stop: self.stop.clone(),
            max_tokens: self.max_tokens,
            priority: self.priority,
            ..GenerateRequest::default()
        });
        if let Some(seconds) = self.timeout {
            match Duration::try_from_secs_f64(seconds) {
                Ok(timeout) if !timeout.is_zero() => request.set_timeout(timeout),
                _ => bail!("--timeout: expected seconds above 0, found {seconds}"),
            }
        }
        Ok(request)
    }

    /// Whether tokens are printed as they come.
    fn prints_at_once(&self) -> bool {
        !self.client.json && self.n.unwrap_or(1) == 1
    }
}

impl Answer {
    /// Takes in a response; an error where the router broke its promise about indices.
    pub(crate) fn take(&mut self, response: GenerateResponse, now: Instant) -> anyhow::Result<()> {
        let choice = response.choice as usize;
        while self.choices.len() <= choice {
            self.choices.push(Choice::default());
        }
        let choice = &mut self.choices[choice];
        if let Some(token) = response.token_id {
            if response.index != choice.tokens.len() as u64 {
                bail!("the router sent index {} where {} was due", response.index, choice.tokens.len());
            }
            choice.tokens.push(token);
            choice.times.push(now);
        }
        choice.finish_reason = match response.finish_reason() {
            FinishReason::Unspecified => None,
            FinishReason::Stop => Some("stop"),
            FinishReason::Length => Some("length"),
            FinishReason::Aborted => Some("aborted"),
        };
        choice.text.push_str(&response.text);
        if let Some(position) = response.logprobs {
            choice.logprobs.push(position.top.iter().map(|token| (token.token_id, token.logprob)).collect());
        }
        choice.session = response.session_id;
        choice.replica = response.replica;
        choice.seed = response.seed.or(choice.seed);
        if let Some(usage) = response.usage {
            choice.prompt_tokens = usage.prompt;
        }
        if !response.request_id.is_empty() {
            self.request_id = response.request_id;
        }
        Ok(())
    }

    pub(crate) fn measure(&mut self, started: Instant) {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let first = self.choices.iter().filter_map(|choice| choice.times.first()).min();
        self.ttft_ms = first.map_or(0.0, |first| milliseconds(first.duration_since(started)));
        let (mut time, mut tokens) = (Duration::ZERO, 0);
        for choice in &self.choices {
            if let (Some(first), Some(last)) = (choice.times.first(), choice.times.last()) {
                time += last.duration_since(*first);
                tokens += choice.times.len() - 1;
            }
        }
        self.tpot_ms = if tokens > 0 { milliseconds(time) / tokens as f64 } else { 0.0 };
    }
}

impl Answer {
    /// The text of the first choice.
    pub(crate) fn text(&self) -> String {
        self.choices.first().map(|choice| choice.text.clone()).unwrap_or_default()
    }

    /// Who answered, and how fast, in a line.
    pub(crate) fn figures(&self) -> String {
        let choice =
            |choice: &Choice| format!("{}: {} tokens from {}; ", choice.session, choice.tokens.len(), choice.replica);
        let choices: String = self.choices.iter().map(choice).collect();
        format!("{choices}TTFT {:.1} ms, TPOT {:.2} ms", self.ttft_ms, self.tpot_ms)
    }
}

/// The token ids in a file.
fn token_ids(file: &Path) -> anyhow::Result<Vec<u32>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--tokens-from: reading {}", file.display()))?;
    let ids = text.split(|letter: char| letter == ',' || letter.is_whitespace()).filter(|id| !id.is_empty());
    let id =
        |text: &str| text.parse().with_context(|| format!("--tokens-from: {}: no token id: {text:?}", file.display()));
    ids.map(id).collect()
}

/// Text where there is some, else token ids.
fn readable(text: &str, tokens: &[u32], has_text: bool) -> String {
    if has_text {
        return text.to_owned();
    }
    tokens.iter().map(|token| format!("{token} ")).collect()
}

/// Asks and prints.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    block_on(args.ask())
}

impl GenerateArgs {
    /// A request for text that is drawn as the model's own settings say, and the same every time.
    pub(crate) fn repeatable(prompt: String, max_tokens: u32, client: ClientArgs) -> Self {
        Self {
            prompt: Some(prompt),
            tokens: Vec::new(),
            tokens_from: None,
            logprobs: None,
            max_tokens: Some(max_tokens),
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seed: Some(0),
            n: None,
            stop: Vec::new(),
            ignore_eos: false,
            priority: 0,
            request_id: String::new(),
            timeout: None,
            client,
        }
    }

    /// Sends the request and prints the answer.
    pub(crate) async fn ask(&self) -> anyhow::Result<()> {
        let args = self;
        let request = args.request()?;
        let mut inference = args.client.inference().await?;
        let has_text = inference
            .get_model_info(perigee_proto::v1::GetModelInfoRequest {})
            .await
            .map_err(refused)?
            .into_inner()
            .has_tokenizer;
        let started = Instant::now();
        let mut stream = inference.generate(request).await.map_err(refused)?.into_inner();
        let mut answer = Answer::default();
        while let Some(response) = stream.message().await.map_err(refused)? {
            if args.prints_at_once() {
                print!("{}", readable(&response.text, response.token_id.as_slice(), has_text));
                std::io::stdout().flush()?;
            }
            answer.take(response, Instant::now())?;
        }
        answer.measure(started);
        if args.client.json {
            return print_json(&answer);
        }
        if args.prints_at_once() {
            println!();
        } else {
            for (number, choice) in answer.choices.iter().enumerate() {
                println!("--- choice {number}\n{}", readable(&choice.text, &choice.tokens, has_text));
            }
        }
        for choice in &answer.choices {
            eprintln!("{}: {} tokens from {}", choice.session, choice.tokens.len(), choice.replica);
        }
        eprintln!("TTFT {:.1} ms, TPOT {:.2} ms", answer.ttft_ms, answer.tpot_ms);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(choice: u32, index: u64) -> GenerateResponse {
        GenerateResponse { choice, index, token_id: Some(index as u32), text: "x".to_owned(), ..Default::default() }
    }

    #[test]
    fn an_answer_gathers_choices_and_times() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut answer = Answer::default();
        for (choice, index, time) in [(1, 0, 30), (0, 0, 20), (1, 1, 40), (0, 1, 40), (0, 2, 60)] {
            answer.take(token(choice, index), at(time)).expect("in order");
        }
        answer.measure(start);
        assert_eq!(answer.choices.iter().map(|choice| choice.tokens.len()).collect::<Vec<_>>(), [3, 2]);
        assert_eq!((answer.ttft_ms, answer.choices[0].text.as_str()), (20.0, "xxx"));
        assert!((answer.tpot_ms - 50.0 / 3.0).abs() < 1e-9, "{}", answer.tpot_ms);
        assert!(answer.take(token(0, 5), at(70)).is_err(), "a gap");
    }

    #[test]
    fn token_ids_are_read_from_a_file() {
        let file = std::env::temp_dir().join(format!("perigee-tokens-{}", std::process::id()));
        for (text, expected) in
            [("1,2, 3\n 40\n", Some(vec![1, 2, 3, 40])), ("", Some(vec![])), ("1,x", None), ("-1", None)]
        {
            std::fs::write(&file, text).expect("written");
            assert_eq!(token_ids(&file).ok(), expected, "{text:?}");
        }
        std::fs::remove_file(&file).expect("removed");
        assert!(token_ids(&file).is_err());
    }

    #[test]
    fn token_ids_stand_in_for_text() {
        assert_eq!(readable("ab", &[1, 2], true), "ab");
        assert_eq!(readable("", &[1, 2], false), "1 2 ");
    }
}
