//! Requests whose text must follow a grammar wait here while it is made, on threads of their own and a few at a time: the
//! step loop and the router's stream go on meanwhile. What is said about their sessions in the meantime is kept for later.

use std::collections::HashMap;
use std::sync::Arc;

use perigee_engine::EngineHandle;
use perigee_engine::request::{RefusedRequest, Request, SessionId, StartGrammar};
use perigee_text::grammar::{GrammarError, GrammarSource};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};

/// Grammars that are made at once, of all routers.
const THREADS: usize = 2;
/// Requests of one router that may wait for theirs.
const MOST_WAITING: usize = 512;

/// The turns of one leader.
#[derive(Debug, Clone)]
pub(crate) struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(THREADS)))
    }
}

/// A request whose grammar was made, or why it was not.
type Made = (Vec<String>, Result<Request, RefusedRequest>);

/// The waiting requests of one router's stream. Dropping it forgets them.
#[derive(Debug)]
pub(crate) struct Compiling {
    turns: Turns,
    jobs: JoinSet<Made>,
    /// Sessions of waiting requests, each with the epochs up to which it was aborted meanwhile.
    waiting: HashMap<String, Vec<u64>>,
}

/// A request that may go on, and what was said about it before.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) sessions: Vec<String>,
    pub(crate) request: Result<Request, RefusedRequest>,
    /// Sessions and epochs to abort, in order.
    pub(crate) aborts: Vec<(SessionId, u64)>,
}

impl Compiling {
    pub(crate) fn new(turns: Turns) -> Self {
        Self { turns, jobs: JoinSet::new(), waiting: HashMap::new() }
    }

    /// Begins to make a request's grammar, as it is after the tokens that were delivered.
    ///
    /// # Errors
    /// [`RefusedRequest`] where too many wait, or this engine makes none.
    pub(crate) fn begin(
        &mut self,
        engine: &EngineHandle,
        mut request: Request,
        source: GrammarSource,
    ) -> Result<(), RefusedRequest> {
        let Some(compiler) = engine.grammars().cloned() else {
            let message = "needs a byte-level tokenizer, and this model has none".to_owned();
            return Err(RefusedRequest::Invalid { field: "grammar", message });
        };
        if self.jobs.len() >= MOST_WAITING {
            return Err(RefusedRequest::Full { waiting: self.jobs.len(), limit: MOST_WAITING });
        }
        let sessions: Vec<String> = request.sessions.iter().map(|session| session.0.clone()).collect();
        self.waiting.extend(sessions.iter().map(|session| (session.clone(), Vec::new())));
        let turns = self.turns.clone();
        self.jobs.spawn(async move {
            let made = async {
                let _turn = turns.0.acquire().await.map_err(|closed| broken(&closed.to_string()))?;
                let (work, delivered) = (source.clone(), request.delivered.clone());
                let work = tokio::task::spawn_blocking(move || compiler.compile_after(&work, &delivered));
                work.await.map_err(|error: JoinError| broken(&error.to_string()))?.map_err(|error| refusal(&error))
            };
            let request = made.await.map(|start| {
                request.grammar = Some(StartGrammar { source, start: Arc::new(start) });
                request
            });
            (sessions, request)
        });
        Ok(())
    }

    /// Keeps an abort for later; false where no such session waits.
    pub(crate) fn abort(&mut self, session: &str, epoch: u64) -> bool {
        match self.waiting.get_mut(session) {
            Some(aborts) => {
                aborts.push(epoch);
                true
            }
            None => false,
        }
    }

    /// The next request whose grammar was made; never, while none waits.
    pub(crate) async fn next(&mut self) -> Ready {
        loop {
            match self.jobs.join_next().await {
                Some(Ok((sessions, request))) => {
                    let mut aborts = Vec::new();
                    for session in &sessions {
                        let epochs = self.waiting.remove(session).unwrap_or_default();
                        aborts.extend(epochs.into_iter().map(|epoch| (SessionId(session.clone()), epoch)));
                    }
                    return Ready { sessions, request, aborts };
                }
                // A job does not panic and is not cancelled by itself.
                Some(Err(error)) => tracing::error!(%error, "a grammar's task ended"),
                None => std::future::pending().await,
            }
        }
    }
}

fn refusal(error: &GrammarError) -> RefusedRequest {
    RefusedRequest::Invalid { field: "grammar", message: error.to_string() }
}

fn broken(why: &str) -> RefusedRequest {
    RefusedRequest::Unavailable(format!("a grammar could not be made: {why}"))
}
