//! Attention queries over the wire: a home's answers, what it says when it has too much to do, and the asker's accounts of
//! answers that are late, lost or out of order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use perigee_backend::{DType, LatentReader};
use perigee_engine::cache::HomePages;
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_engine::remote::{AttentionClient, RemoteHome};
use perigee_migration::attend::{AnswerStatus, HeadRange, QueryValues, SessionQuery};
use perigee_migration::{AnswerBatch, AttendShape, QueryBatch, merge};
use perigee_proto::internal;
use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_proto::internal::replica_server::{Replica as ReplicaRpc, ReplicaServer};
use perigee_proto::internal::{
    AttendAnswer, AttendQuery, HandoffChunk, MoveMode, MovePhase, ReplicaMessage, RouterMessage, router_message,
};
use perigee_testkit::sandbox::free_port;
use perigee_worker::attend::HomeParts;
use perigee_worker::attention::GrpcAttention;
use perigee_worker::peers::Peers;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};

use super::replica::{Replica, ReplicaOptions, Story, eventually, long_session};
use super::sandbox::{Leader, LeaderOptions, PATIENCE, bind};

/// random:tiny's.
const SHAPE: AttendShape = AttendShape { layers: 1, heads: 4, latent: 64, rope: 16, tokens: 64 };
const HEADS: HeadRange = HeadRange { layer: 0, first_head: 0, heads: 4, latent: 64, rope: 16 };

/// A question about one token of some sessions (name, epoch, end of the range from 0).
fn question(sessions: &[(&str, u64, std::ops::Range<u64>)]) -> QueryBatch {
    let values: Vec<f32> = (0..HEADS.query_width()).map(|index| ((index * 7 % 23) as f32 - 11.0) / 4.0).collect();
    let query = |(session, epoch, range): &(&str, u64, std::ops::Range<u64>)| SessionQuery {
        session: (*session).to_owned(),
        epoch: *epoch,
        ranges: std::iter::once(range.clone()).collect(),
        tokens: 1,
        values: QueryValues::from_f32(&values, DType::Fp32),
    };
    QueryBatch { heads: HEADS, dtype: DType::Fp32, sessions: sessions.iter().map(query).collect() }
}

/// A stream to a home in the hands of a test.
struct Asker {
    questions: mpsc::UnboundedSender<AttendQuery>,
    answers: Streaming<AttendAnswer>,
}

impl Asker {
    async fn open(internal: std::net::SocketAddr) -> Result<Self, Status> {
        let mut client = ReplicaClient::connect(format!("http://{internal}")).await.expect("connected");
        let (questions, body) = mpsc::unbounded_channel();
        let answers = client.attend(UnboundedReceiverStream::new(body)).await?.into_inner();
        Ok(Self { questions, answers })
    }

    fn ask(&self, call: u64, data: Vec<u8>) {
        self.questions.send(AttendQuery { call, data }).expect("open");
    }

    async fn answer(&mut self) -> AttendAnswer {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("in time");
        answer.expect("no error").expect("open")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_answers_for_every_session_that_it_is_asked_about() {
    let (a, b) =
        (Replica::start("a", ReplicaOptions::default()).await, Replica::start("b", ReplicaOptions::default()).await);
    let mut router = a.attach().await;
    router.send(router_message::Body::Submit(long_session("s")));
    let mut story = Story::default();
    story.follow_to(&mut router, 1).await;
    router.send(router_message::Body::Prepare(b.invite("s", MoveMode::Split)));
    assert_eq!(story.follow_to_report(&mut router).await.phase(), MovePhase::Ready);

    let mut asker = Asker::open(a.internal).await.expect("it answers");
    let ranges = [("s", 2, 0..128), ("nobody", 2, 0..64), ("s", 2, 0..64), ("s", 2, 64..128), ("s", 2, 0..64_000)];
    let asked = question(&ranges);
    asker.ask(9, asked.encode(&SHAPE).expect("well formed"));
    let answer = asker.answer().await;
    assert_eq!((answer.call, answer.code), (9, 0), "{}", answer.message);
    let answers = AnswerBatch::decode(&answer.data, &asked, &SHAPE).expect("well formed").sessions;
    let statuses: Vec<AnswerStatus> = answers.iter().map(|answer| answer.status).collect();
    let (good, unknown, missing) = (AnswerStatus::Answered, AnswerStatus::Unknown, AnswerStatus::Missing);
    assert_eq!(statuses, [good, unknown, good, good, missing]);
    // The parts are the whole, and they are over different keys.
    let (mut output, mut lse) = (answers[2].output.clone(), answers[2].lse.clone());
    assert_ne!(output, answers[3].output);
    merge(&mut output, &mut lse, &answers[3].output, &answers[3].lse).expect("same shapes");
    for (found, expected) in output.iter().chain(&lse).zip(answers[0].output.iter().chain(&answers[0].lse)) {
        assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
    }

    let earlier = question(&[("s", 1, 0..64)]);
    asker.ask(10, earlier.encode(&SHAPE).expect("well formed"));
    let answer = asker.answer().await;
    let answers = AnswerBatch::decode(&answer.data, &earlier, &SHAPE).expect("well formed").sessions;
    assert_eq!(answers[0].status, AnswerStatus::Stale, "only the next owner may ask");
    asker.ask(11, b"no question".to_vec());
    let answer = asker.answer().await;
    assert_eq!((answer.call, answer.code), (11, Code::InvalidArgument as i32));
    assert!(!answer.message.is_empty() && answer.data.is_empty());
}

#[tokio::test]
async fn a_device_that_cannot_answer_says_so() {
    let leader = Leader::start("a", LeaderOptions::default()).await;
    let refused = Asker::open(leader.internal).await.map(|_| ()).expect_err("a modelled device");
    assert_eq!(refused.code(), Code::Unimplemented);
}

/// Answers nothing while somebody holds the lock.
struct Slow(Arc<Mutex<()>>);

impl LatentReader for Slow {
    fn attend(
        &self,
        _layer: usize,
        _pages: &[u32],
        heads: usize,
        _scale: f32,
        latent: usize,
        _queries: &[f32],
    ) -> perigee_backend::Result<(Vec<f32>, Vec<f32>)> {
        let _open = self.0.lock();
        Ok((vec![0.5; heads * latent], vec![1.0; heads]))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_with_too_much_to_do_tells_askers_to_come_again() {
    const ASKED: u64 = 400;
    let gate = Arc::new(Mutex::new(()));
    let homes = HomeDirectory::default();
    homes.publish("s", HomePages { pages: vec![(0, vec![3])] }, 2);
    let model = AnswerModel { shape: SHAPE, scale: 1.0 };
    let parts = HomeParts { homes, reader: Arc::new(Slow(Arc::clone(&gate))), model, geometry: None };
    let leader = Leader::start("a", LeaderOptions { homes: Some(parts), ..LeaderOptions::default() }).await;
    let mut asker = Asker::open(leader.internal).await.expect("it answers");
    let asked = question(&[("s", 2, 0..64)]);
    let message = asked.encode(&SHAPE).expect("well formed");
    let (holding, held) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        let _closed = gate.lock();
        holding.send(()).expect("awaited");
        // Sent or dropped: open.
        let _ = released.recv();
    });
    held.recv().expect("the gate is closed");
    (0..ASKED).for_each(|call| asker.ask(call, message.clone()));
    // More than fits anywhere: the first answer can only be that there is too much.
    let first = asker.answer().await;
    let status = |answer: &AttendAnswer| {
        AnswerBatch::decode(&answer.data, &asked, &SHAPE).expect("well formed").sessions[0].status
    };
    assert_eq!(status(&first), AnswerStatus::Busy);
    drop(release);
    holder.join().expect("no panic");
    let mut statuses = vec![status(&first)];
    for _ in 1..ASKED {
        statuses.push(status(&asker.answer().await));
    }
    let busy = statuses.iter().filter(|status| **status == AnswerStatus::Busy).count();
    let answered = statuses.iter().filter(|status| **status == AnswerStatus::Answered).count();
    assert_eq!(busy + answered, ASKED as usize);
    assert!(answered >= 200, "{answered} of {ASKED} were answered after all");
}

/// A home in the hands of a test: it sees questions and answers as it likes.
struct FakeHome {
    home: RemoteHome,
    streams: mpsc::UnboundedReceiver<FakeStream>,
    task: JoinHandle<()>,
}

struct FakeStream {
    questions: Streaming<AttendQuery>,
    answers: mpsc::Sender<Result<AttendAnswer, Status>>,
}

struct FakeService {
    streams: mpsc::UnboundedSender<FakeStream>,
}

#[tonic::async_trait]
impl ReplicaRpc for FakeService {
    type AttachStream = ReceiverStream<Result<ReplicaMessage, Status>>;
    type HandoffStream = ReceiverStream<Result<internal::HandoffAnswer, Status>>;
    type AttendStream = ReceiverStream<Result<AttendAnswer, Status>>;
    type FetchPagesStream = ReceiverStream<Result<internal::PageChunk, Status>>;

    async fn attach(&self, _: Request<Streaming<RouterMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("a home only"))
    }

    async fn handoff(&self, _: Request<Streaming<HandoffChunk>>) -> Result<Response<Self::HandoffStream>, Status> {
        Err(Status::unimplemented("a home only"))
    }

    async fn attend(&self, request: Request<Streaming<AttendQuery>>) -> Result<Response<Self::AttendStream>, Status> {
        let (answers, out) = mpsc::channel(16);
        self.streams.send(FakeStream { questions: request.into_inner(), answers }).expect("the test listens");
        Ok(Response::new(ReceiverStream::new(out)))
    }

    async fn fetch_pages(
        &self,
        _: Request<internal::FetchPagesRequest>,
    ) -> Result<Response<Self::FetchPagesStream>, Status> {
        Err(Status::unimplemented("fetch_pages"))
    }

    async fn keep_homes(
        &self,
        _: Request<internal::KeepHomesRequest>,
    ) -> Result<Response<internal::KeepHomesAnswer>, Status> {
        Err(Status::unimplemented("keep_homes"))
    }
}

impl FakeHome {
    fn start(listener: TcpListener) -> Self {
        let endpoint = listener.local_addr().expect("an address").to_string();
        let (sender, streams) = mpsc::unbounded_channel();
        let service = ReplicaServer::new(FakeService { streams: sender });
        let task = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(TcpIncoming::from(listener)).await.expect("served");
        });
        let home = RemoteHome { replica: "home".to_owned(), incarnation: "1".to_owned(), endpoint };
        Self { home, streams, task }
    }

    async fn stream(&mut self) -> FakeStream {
        tokio::time::timeout(PATIENCE, self.streams.recv()).await.expect("in time").expect("it serves")
    }
}

impl FakeStream {
    async fn question(&mut self) -> AttendQuery {
        let question = tokio::time::timeout(PATIENCE, self.questions.message()).await.expect("in time");
        question.expect("no error").expect("open")
    }

    async fn answer(&self, question: &AttendQuery, data: &[u8]) {
        let answer = AttendAnswer { call: question.call, data: data.to_vec(), ..AttendAnswer::default() };
        self.answers.send(Ok(answer)).await.expect("open");
    }
}

fn far() -> Instant {
    Instant::now() + PATIENCE
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_in_the_order_of_the_questions() {
    let mut home = FakeHome::start(bind().await.0);
    let mut client = GrpcAttention::start(Peers::default()).expect("a thread");
    for message in [b"one", b"two"] {
        client.ask(&home.home, message.to_vec());
    }
    let mut stream = home.stream().await;
    let (one, two) = (stream.question().await, stream.question().await);
    assert_eq!((one.data.as_slice(), two.data.as_slice()), (b"one".as_slice(), b"two".as_slice()));
    stream.answer(&two, b"2").await;
    stream.answer(&one, b"1").await;
    assert_eq!(client.collect(far()), [Some(b"1".to_vec()), Some(b"2".to_vec())]);
    assert!(!client.is_overdue(&home.home));
    assert!(client.collect(far()).is_empty(), "nothing was asked since");
    // What a home cannot read has no answer, and nobody waits for one.
    client.ask(&home.home, b"three".to_vec());
    let three = stream.question().await;
    let refused = AttendAnswer { call: three.call, code: 3, message: "what?".to_owned(), ..AttendAnswer::default() };
    stream.answers.send(Ok(refused)).await.expect("open");
    let asked = Instant::now();
    assert_eq!(client.collect(far()), [None]);
    assert!(asked.elapsed() < PATIENCE / 2 && !client.is_overdue(&home.home));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_answer_ends_what_is_overdue_and_is_nobody_elses() {
    let mut home = FakeHome::start(bind().await.0);
    let mut client = GrpcAttention::start(Peers::default()).expect("a thread");
    client.ask(&home.home, b"slow".to_vec());
    let mut stream = home.stream().await;
    let slow = stream.question().await;
    assert!(!client.is_overdue(&home.home), "it is not late yet");
    assert_eq!(client.collect(Instant::now() + Duration::from_millis(10)), [None]);
    assert!(client.is_overdue(&home.home));
    // Asking again costs no time and reaches nobody.
    client.ask(&home.home, b"again".to_vec());
    assert_eq!(client.collect(far()), [None]);
    stream.answer(&slow, b"late").await;
    assert!(eventually(|| !client.is_overdue(&home.home)).await);
    client.ask(&home.home, b"next".to_vec());
    let next = stream.question().await;
    assert_eq!(next.data, b"next");
    stream.answer(&next, b"in time").await;
    assert_eq!(client.collect(far()), [Some(b"in time".to_vec())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_home_fails_its_questions_at_once_and_no_others() {
    // Nobody else's while its home is gone.
    let address = free_port().expect("a free port");
    let mut lost = FakeHome::start(TcpListener::bind(address).await.expect("it is free"));
    let mut other = FakeHome::start(bind().await.0);
    let mut client = GrpcAttention::start(Peers::default()).expect("a thread");
    client.ask(&lost.home, b"lost".to_vec());
    client.ask(&other.home, b"other".to_vec());
    let (stream, mut good) = (lost.stream().await, other.stream().await);
    let question = good.question().await;
    good.answer(&question, b"here").await;
    // Streams and listener go with the process.
    drop(stream);
    lost.task.abort();
    assert!((&mut lost.task).await.is_err_and(|ended| ended.is_cancelled()));
    let asked = Instant::now();
    assert_eq!(client.collect(far()), [None, Some(b"here".to_vec())]);
    assert!(asked.elapsed() < PATIENCE / 2, "nobody waits for an answer that cannot come");
    assert!(client.is_overdue(&lost.home) && !client.is_overdue(&other.home));
    let mut back = FakeHome::start(TcpListener::bind(address).await.expect("the port is free again"));
    let mut stream = back.stream().await;
    assert!(eventually(|| !client.is_overdue(&back.home)).await);
    client.ask(&back.home, b"welcome".to_vec());
    let question = stream.question().await;
    assert_eq!(question.data, b"welcome", "nothing of before is asked again");
    stream.answer(&question, b"thanks").await;
    assert_eq!(client.collect(far()), [Some(b"thanks".to_vec())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_where_nobody_listens_fails_at_once() {
    let endpoint = free_port().expect("a free port").to_string();
    let home = RemoteHome { replica: "nobody".to_owned(), incarnation: "1".to_owned(), endpoint };
    let mut client = GrpcAttention::start(Peers::default()).expect("a thread");
    client.ask(&home, b"hello".to_vec());
    let asked = Instant::now();
    assert_eq!(client.collect(far()), [None]);
    assert!(asked.elapsed() < PATIENCE / 2);
    assert!(client.is_overdue(&home));
}
