//! Holds the conversations of a plan: in an open loop each begins at its own time, whatever became of the others; in a
//! closed one as many go on as there are clients. Every request that is sent has an outcome.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::dialogue::{Dialogue, Message};
use crate::target::{Ask, Counts, Failure, Target};
use crate::{Arrivals, Conversation, Ending, Move, Outcome, Piece, Plan, Progress, Scenario, Tally, Turn};

/// What wakes an open loop at the time of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// A thread of its own, which the system wakes within some ten microseconds.
    Thread,
    /// The runtime's timer, which counts whole milliseconds: for virtual clocks.
    Timer,
}

/// What the tasks of a run share.
struct Run {
    target: Arc<dyn Target>,
    scenario: Scenario,
    progress: Arc<Progress>,
    start: Instant,
    outcomes: mpsc::UnboundedSender<Outcome>,
}

/// Runs a scenario to its end: until every request has ended.
pub async fn run(
    scenario: &Scenario,
    plan: Plan,
    target: Arc<dyn Target>,
    progress: Arc<Progress>,
    pace: Pace,
) -> Tally {
    let (outcomes, mut ended) = mpsc::unbounded_channel();
    let start = Instant::now();
    let run = Arc::new(Run { target, scenario: scenario.clone(), progress: progress.clone(), start, outcomes });
    let driving = tokio::spawn(async move {
        match run.scenario.arrivals {
            Arrivals::Closed { concurrency } => closed(run, plan, concurrency).await,
            _ => open(run, plan, pace).await,
        }
    });
    let mut tally = Tally::new(scenario);
    // Ends when the last task that could send another outcome has.
    while let Some(outcome) = ended.recv().await {
        tally.add(&outcome);
    }
    // A panic in a task shows as a request without an outcome.
    let _ = driving.await;
    tally.sent = progress.snapshot().sent;
    tally
}

async fn open(run: Arc<Run>, plan: Plan, pace: Pace) {
    let mut due = paced(plan, run.start, pace);
    let mut tasks = JoinSet::new();
    while let Some(conversation) = due.recv().await {
        let intended = conversation.at.unwrap_or_default();
        tasks.spawn(hold(run.clone(), conversation, Some(intended)));
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
}

/// Conversations, each at its time.
fn paced(plan: Plan, start: Instant, pace: Pace) -> mpsc::UnboundedReceiver<Conversation> {
    let (sender, due) = mpsc::unbounded_channel();
    match pace {
        Pace::Thread => {
            let start = start.into_std();
            std::thread::spawn(move || {
                for conversation in plan {
                    let at = start + conversation.at.unwrap_or_default();
                    std::thread::sleep(at.saturating_duration_since(std::time::Instant::now()));
                    if sender.send(conversation).is_err() {
                        return;
                    }
                }
            });
        }
        Pace::Timer => {
            tokio::spawn(async move {
                for conversation in plan {
                    tokio::time::sleep_until(start + conversation.at.unwrap_or_default()).await;
                    if sender.send(conversation).is_err() {
                        return;
                    }
                }
            });
        }
    }
    due
}

async fn closed(run: Arc<Run>, plan: Plan, concurrency: usize) {
    let plan = Arc::new(Mutex::new(plan));
    let end = run.scenario.duration_s.map(|seconds| run.start + Duration::from_secs_f64(seconds));
    let mut clients = JoinSet::new();
    for _ in 0..concurrency {
        let (run, plan) = (run.clone(), plan.clone());
        clients.spawn(async move {
            while end.is_none_or(|end| Instant::now() < end) {
                let Some(conversation) = plan.lock().next() else { return };
                hold(run.clone(), conversation, None).await;
            }
        });
    }
    while clients.join_next().await.is_some() {}
}

/// Holds a conversation. It ends with its first request that does not complete. Only the first turn has a time of its own:
/// the next ones depend on answers, and are counted from when they are sent.
async fn hold(run: Arc<Run>, conversation: Conversation, mut intended: Option<Duration>) {
    let mut dialogue = Dialogue::default();
    for (index, turn) in conversation.turns.iter().enumerate() {
        if index > 0 {
            tokio::time::sleep(conversation.think).await;
        }
        dialogue.0.push(Message::User(turn.prompt.clone()));
        let request = One { run: &run, conversation: conversation.number, index, turn, dialogue: &dialogue };
        let (outcome, answer) = request.ask(intended.take()).await;
        let goes_on = outcome.ending == Ending::Completed;
        run.progress.end(&outcome.ending);
        // Nobody counts any more where the run itself was dropped.
        let _ = run.outcomes.send(outcome);
        if !goes_on {
            return;
        }
        dialogue.0.push(answer);
    }
}

/// One request.
struct One<'a> {
    run: &'a Run,
    conversation: usize,
    index: usize,
    turn: &'a Turn,
    dialogue: &'a Dialogue,
}

impl One<'_> {
    async fn ask(&self, intended: Option<Duration>) -> (Outcome, Message) {
        let run = self.run;
        let name = format!("load-{}-{}", self.conversation, self.index);
        let ask = Ask {
            name: &name,
            dialogue: self.dialogue,
            max_tokens: self.turn.output,
            temperature: run.scenario.temperature,
            ignore_eos: run.scenario.ignore_eos,
        };
        let mut hearing = Hearing::default();
        run.progress.send();
        let sent = run.start.elapsed();
        let result = {
            let hear = &mut |heard: crate::target::Heard<'_>| {
                run.progress.hear(heard.tokens);
                hearing.take(heard, run.start.elapsed());
                let is_enough = self.turn.cancel_after.is_some_and(|after| hearing.tokens >= u64::from(after));
                if is_enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let asked = run.target.ask(ask, hear);
            match run.scenario.timeout_s.map(Duration::from_secs_f64) {
                Some(time) => tokio::time::timeout(time, asked).await.unwrap_or_else(|_| Err(timed_out(time))),
                None => asked.await,
            }
        };
        let ended = run.start.elapsed();
        let Hearing { pieces, tokens, ids, text, moves, .. } = hearing;
        let (counts, ending) = match result {
            // An answer that ended by itself before it was to be given up is whole.
            Ok(counts) if self.turn.cancel_after.is_some_and(|after| tokens >= u64::from(after)) => {
                (Counts { output: None, ..counts }, Ending::Cancelled)
            }
            Ok(counts) => (counts, Ending::Completed),
            Err(failure) => (Counts::default(), Ending::Failed(failure)),
        };
        let outcome = Outcome {
            conversation: self.conversation,
            turn: self.index,
            intended: intended.unwrap_or(sent),
            sent,
            pieces,
            ended,
            ending,
            prompt_tokens: counts.prompt.unwrap_or_default(),
            cached_tokens: counts.cached.unwrap_or_default(),
            output_tokens: counts.output.unwrap_or(tokens),
            moves,
        };
        (outcome, Message::Answer { text, tokens: ids })
    }
}

fn timed_out(time: Duration) -> Failure {
    Failure { code: "TIMEOUT".to_owned(), message: format!("no end within {time:?}") }
}

/// What came of an answer so far.
#[derive(Default)]
struct Hearing {
    pieces: Vec<Piece>,
    tokens: u64,
    ids: Vec<u32>,
    text: String,
    replica: String,
    epoch: u64,
    moves: Vec<Move>,
}

impl Hearing {
    fn take(&mut self, heard: crate::target::Heard<'_>, at: Duration) {
        if heard.tokens > 0 {
            self.pieces.push(Piece { at, tokens: heard.tokens });
            self.tokens += u64::from(heard.tokens);
        }
        self.ids.extend(heard.ids);
        self.text.push_str(heard.text);
        if heard.replica != self.replica || heard.epoch != self.epoch {
            let from = std::mem::replace(&mut self.replica, heard.replica.to_owned());
            self.epoch = heard.epoch;
            if !from.is_empty() {
                self.moves.push(Move { at, from, to: heard.replica.to_owned() });
            }
        }
    }
}
