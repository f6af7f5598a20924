//! Holds what clients received against undisturbed runs, on a thread of its own while others still run. Differences that
//! rounding explains are counted and printed; others, and broken rules, are failures that name the schedule's seed.

use std::sync::mpsc;
use std::thread::JoinHandle;

use perigee_engine::request::{self, Request, SessionId, StopRule};
use perigee_proto::v1::{FinishReason, GenerateRequest, PositionLogprobs};
use perigee_sampling::SamplingParams;
use perigee_testkit::reference::{Observed, Undisturbed, Verdict};

use crate::client::{Answer, Choice};
use crate::plan::Group;

/// What the judge is told.
#[derive(Debug)]
pub(crate) enum Told {
    /// A prompt that is under way.
    Begun(Vec<u32>),
    /// A group's answers, in the order of its schedules.
    Answered(Group, Vec<Answer>),
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Choices that were compared.
    pub(crate) compared: usize,
    /// Those that needed an excuse.
    pub(crate) excused: usize,
    /// What no excuse holds for.
    pub(crate) failures: Vec<String>,
}

impl Findings {
    /// Panics where something failed, too many runs needed an excuse, or too few were compared for that to mean anything.
    pub(crate) fn verdict(&self, at_least: usize) {
        println!("{} of {} runs needed an excuse, {} failed", self.excused, self.compared, self.failures.len());
        assert!(self.failures.is_empty(), "{} failures:\n{}", self.failures.len(), self.failures.join("\n"));
        assert!(self.compared >= at_least, "only {} runs were compared", self.compared);
        assert!(self.excused * 100 <= self.compared, "{} of {} runs needed an excuse", self.excused, self.compared);
    }
}

/// The judge of one model.
pub(crate) struct Judge {
    answers: mpsc::Sender<Told>,
    thread: JoinHandle<Findings>,
}

impl Judge {
    /// For sequences of at most `longest` tokens.
    pub(crate) fn start(model: &str, longest: usize) -> Self {
        let (answers, inbox) = mpsc::channel::<Told>();
        let mut undisturbed = Undisturbed::open(model, longest).unwrap();
        let thread = std::thread::spawn(move || {
            let mut findings = Findings::default();
            for told in inbox {
                match told {
                    Told::Begun(prompt) => undisturbed.prepare(&prompt).unwrap(),
                    Told::Answered(group, answers) => judge(&mut undisturbed, &group, &answers, &mut findings),
                }
            }
            findings
        });
        Self { answers, thread }
    }

    /// Where answers go.
    pub(crate) fn door(&self) -> mpsc::Sender<Told> {
        self.answers.clone()
    }

    /// Waits until everything that came is judged.
    pub(crate) fn findings(self) -> Findings {
        drop(self.answers);
        self.thread.join().expect("the judge's thread")
    }
}

fn judge(undisturbed: &mut Undisturbed, group: &Group, answers: &[Answer], findings: &mut Findings) {
    for (schedule, answer) in group.schedules.iter().zip(answers) {
        let (request, seed) = (&schedule.request, group.seed);
        let mut fail = |what: String| {
            let told = format!("seed {seed}, {}: {what}; moves {:?}", request.request_id, answer.moves);
            println!("FAILED {told}");
            findings.failures.push(told);
        };
        answer.broken.iter().for_each(|what| fail(what.clone()));
        if let Some(status) = &answer.failed {
            fail(format!("the stream ended with {status}"));
        }
        for (number, choice) in answer.choices.iter().enumerate() {
            findings.compared += 1;
            match undisturbed.judge(&engine_request(request), number as u32, &observed(request, choice)) {
                Ok(Verdict::Same) => {}
                Ok(Verdict::Excused(excuses)) => {
                    println!("seed {seed}, {} choice {number}, excused: {excuses:?}", request.request_id);
                    findings.excused += 1;
                }
                Ok(Verdict::Different(what)) => fail(format!("choice {number}: {what}; epochs {:?}", choice.epochs)),
                Err(error) => fail(format!("choice {number}: {error}")),
            }
        }
    }
}

/// What was received, as an engine would have given it out.
pub(crate) fn observed(request: &GenerateRequest, choice: &Choice) -> Observed {
    let position = |position: &PositionLogprobs| {
        let token =
            |one: &perigee_proto::v1::TokenLogprob| request::TokenLogprob { token: one.token_id, logprob: one.logprob };
        let top = position.top.iter().map(token).collect();
        position.chosen.as_ref().map(|chosen| request::PositionLogprobs { chosen: token(chosen), top })
    };
    Observed {
        tokens: choice.tokens.clone(),
        text: choice.text.clone(),
        logprobs: choice.logprobs.iter().filter_map(position).collect(),
        prompt_logprobs: choice.prompt_logprobs.iter().map(position).collect(),
        finish: choice.finish.map(|finish| match finish {
            FinishReason::Stop => request::FinishReason::Stop,
            FinishReason::Length => request::FinishReason::Length,
            FinishReason::Aborted | FinishReason::Unspecified => request::FinishReason::Aborted,
        }),
        disturbed: match choice.disturbed {
            None => usize::MAX,
            // Before its first token it may be anywhere in the prompt.
            Some(0) => 0,
            Some(tokens) => request.token_ids.len() + tokens - 1,
        },
    }
}

/// A client's request as an engine takes it; the models have no defaults of their own.
pub(crate) fn engine_request(asked: &GenerateRequest) -> Request {
    let params = asked.sampling.clone().unwrap_or_default();
    let default = SamplingParams::default();
    let sampling = SamplingParams {
        temperature: params.temperature.unwrap_or(default.temperature),
        top_k: params.top_k.unwrap_or(default.top_k),
        top_p: params.top_p.unwrap_or(default.top_p),
        min_p: params.min_p.unwrap_or(default.min_p),
        repetition_penalty: params.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: params.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: params.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: params.logit_bias.into_iter().collect(),
        seed: params.seed.unwrap_or(default.seed),
        logprobs: params.logprobs,
        prompt_logprobs: params.prompt_logprobs,
    };
    Request {
        grammar: None,
        trace: None,
        request_id: asked.request_id.clone(),
        sessions: vec![SessionId(asked.request_id.clone())],
        first_choice: 0,
        epoch: 1,
        prompt: asked.token_ids.clone(),
        delivered: Vec::new(),
        sampling,
        stop: StopRule {
            max_tokens: asked.max_tokens.unwrap_or(u32::MAX),
            min_tokens: params.min_tokens,
            ignore_eos: params.ignore_eos,
            stop_token_ids: params.stop_token_ids,
            stop: asked.stop.clone(),
        },
        prompt_logprobs: params.prompt_logprobs,
        priority: asked.priority,
        deadline: None,
        cache_salt: String::new(),
        text: true,
    }
}
