//! The Attend call: questions of other replicas over latents that this one keeps for them, answered on threads that no
//! step waits for and that wait for no step. What is kept, and for whom, is the engine's home directory.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::pages::PageGiver;
use parking_lot::Mutex;
use perigee_backend::LatentReader;
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_migration::attend::{AnswerStatus, SessionAnswer};
use perigee_migration::{AnswerBatch, AttendError, Geometry, QueryBatch};
use perigee_proto::internal::{AttendAnswer, AttendQuery};
use perigee_proto::status::ErrorKind;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

/// Questions that may wait for a thread; the asker of a further one is told to come again.
const QUEUE: usize = 256;
/// Answers that may wait for an asker to read them. One that reads none any more is cut off.
const UNREAD_ANSWERS: usize = 512;
/// Threads that answer. Each works for the device of this rank, which the step loop needs too.
const THREADS: usize = 2;

/// What answers are computed from.
#[derive(Clone)]
pub struct HomeParts {
    /// Which pages are kept for which sessions.
    pub homes: HomeDirectory,
    /// Attends over pages of this rank's device.
    pub reader: Arc<dyn LatentReader>,
    /// What queries look like.
    pub model: AnswerModel,
    /// What pages look like.
    pub geometry: Option<Geometry>,
}

/// Threads that answer questions. They end with the last clone.
#[derive(Clone)]
pub(crate) struct AttendPool {
    queue: SyncSender<Job>,
    model: AnswerModel,
}

/// What a replica does with what it keeps for others.
#[derive(Clone)]
pub(crate) struct HomeServices {
    /// Answers questions.
    pub(crate) attend: AttendPool,
    /// Gives pages out; none where nothing is known of them.
    pub(crate) giver: Option<PageGiver>,
    /// For whom it keeps what.
    pub(crate) directory: HomeDirectory,
}

impl HomeServices {
    /// Starts the threads that answer.
    ///
    /// # Errors
    /// The operating system gave none.
    pub(crate) fn start(parts: HomeParts) -> std::io::Result<Self> {
        let giver = parts.geometry.map(|geometry| PageGiver::new(parts.clone(), geometry));
        let directory = parts.homes.clone();
        Ok(Self { attend: AttendPool::start(parts)?, giver, directory })
    }
}

type Answers = mpsc::Sender<Result<AttendAnswer, Status>>;

struct Job {
    question: AttendQuery,
    answers: Answers,
}

impl AttendPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// The operating system gave none.
    pub(crate) fn start(parts: HomeParts) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel(QUEUE);
        let model = parts.model;
        let (jobs, parts) = (Arc::new(Mutex::new(jobs)), Arc::new(parts));
        for index in 0..THREADS {
            let (jobs, parts) = (Arc::clone(&jobs), Arc::clone(&parts));
            std::thread::Builder::new()
                .name(format!("perigee-attend-{index}"))
                .spawn(move || answer_all(&jobs, &parts))?;
        }
        Ok(Self { queue, model })
    }

    /// Reads an asker's questions until its stream ends, `ended` completes, or it reads no answers.
    pub(crate) async fn serve(
        self,
        mut questions: Streaming<AttendQuery>,
        answers: Answers,
        ended: impl Future<Output = ()>,
    ) {
        tokio::pin!(ended);
        loop {
            let question = tokio::select! {
                question = questions.message() => question,
                () = answers.closed() => return,
                () = &mut ended => return,
            };
            // An asker that is gone has no use for a reason.
            let Ok(Some(question)) = question else { return };
            let job = Job { question, answers: answers.clone() };
            let refused = match self.queue.try_send(job) {
                Ok(()) => continue,
                Err(TrySendError::Full(job)) => job,
                Err(TrySendError::Disconnected(_)) => return,
            };
            let call = refused.question.call;
            if answers.try_send(Ok(told(call, busy(&refused.question.data, &self.model)))).is_err() {
                return;
            }
        }
    }
}

/// Room for unread answers of one asker.
pub(crate) fn answer_channel() -> (Answers, mpsc::Receiver<Result<AttendAnswer, Status>>) {
    mpsc::channel(UNREAD_ANSWERS)
}

/// Answers questions until nobody can ask any more.
fn answer_all(jobs: &Mutex<Receiver<Job>>, parts: &HomeParts) {
    loop {
        // One thread waits for the next question, the others for their turn to wait.
        let next = jobs.lock().recv();
        let Ok(Job { question, answers }) = next else { return };
        if answers.is_closed() {
            continue;
        }
        let answer = parts.homes.answer(&*parts.reader, &parts.model, &question.data);
        // Full where the asker reads nothing: it will miss this one.
        let _ = answers.try_send(Ok(told(question.call, answer)));
    }
}

fn told(call: u64, answer: Result<Vec<u8>, AttendError>) -> AttendAnswer {
    match answer {
        Ok(data) => AttendAnswer { call, data, ..AttendAnswer::default() },
        Err(error) => {
            tracing::warn!(%error, "a question of another replica cannot be read");
            let code = ErrorKind::InvalidArgument.grpc_code() as i32;
            AttendAnswer { call, code, message: error.to_string(), ..AttendAnswer::default() }
        }
    }
}

/// Tells an asker to come again, for every session that it asks about.
fn busy(message: &[u8], model: &AnswerModel) -> Result<Vec<u8>, AttendError> {
    let query = QueryBatch::decode(message, &model.shape)?;
    let sessions = query.sessions.iter().map(|asked| SessionAnswer::refused(asked, AnswerStatus::Busy)).collect();
    AnswerBatch { heads: query.heads, sessions }.encode(&query)
}
