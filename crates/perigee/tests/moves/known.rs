//! A few requests whose undisturbed answers are known, for tests with many streams: an answer is right if it is the one that
//! was given before anything happened, or if rounding explains where it differs.

use parking_lot::Mutex;
use perigee_proto::v1::{GenerateRequest, SamplingParams};
use perigee_testkit::Numbers;
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::sandbox::Clients;
use tokio::task::JoinSet;

use crate::client::{Answer, run};
use crate::judge::{engine_request, observed};
use crate::plan::{Schedule, prompt};

/// Requests with their answers.
pub(crate) struct Known {
    /// Each with the tokens of its choices.
    asked: Vec<(GenerateRequest, Vec<Vec<u32>>)>,
    undisturbed: Mutex<Undisturbed>,
    excused: Mutex<usize>,
}

fn request(numbers: &mut Numbers, number: usize, tokens: (usize, usize)) -> GenerateRequest {
    let sampling = SamplingParams {
        temperature: Some(if number.is_multiple_of(2) { 0.0 } else { 0.8 }),
        repetition_penalty: numbers.one_in(3).then_some(1.2),
        seed: Some(numbers.next_u64()),
        n: Some(if number % 5 == 4 { 2 } else { 1 }),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let length = numbers.between(20, 200);
    GenerateRequest {
        request_id: format!("known-{number}"),
        token_ids: prompt(numbers, 512, length),
        max_tokens: Some(numbers.between(tokens.0, tokens.1) as u32),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

impl Known {
    /// Asks `count` requests of `tokens` (least and most) tokens on a cluster where nothing happens yet.
    pub(crate) async fn ask(clients: &Clients, count: usize, tokens: (usize, usize), seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let requests: Vec<GenerateRequest> = (0..count).map(|number| request(&mut numbers, number, tokens)).collect();
        let mut asking = JoinSet::new();
        for (number, request) in requests.iter().cloned().enumerate() {
            let clients = clients.clone();
            asking.spawn(async move { (number, answer(&clients, request).await) });
        }
        let mut answers = asking.join_all().await;
        answers.sort_by_key(|(number, _)| *number);
        let tokens = answers.into_iter().map(|(_, answer)| {
            assert_eq!((answer.failed.is_none(), &answer.broken), (true, &Vec::new()), "nothing happens yet");
            answer.choices.into_iter().map(|choice| choice.tokens).collect()
        });
        let asked = requests.into_iter().zip(tokens).collect();
        let undisturbed = Mutex::new(Undisturbed::open("random:tiny", 1024).unwrap());
        Self { asked, undisturbed, excused: Mutex::new(0) }
    }

    /// One of them.
    pub(crate) fn request(&self, number: usize) -> &GenerateRequest {
        &self.asked[number % self.asked.len()].0
    }

    /// The one of that name.
    pub(crate) fn named(&self, name: &str) -> &GenerateRequest {
        let found = self.asked.iter().find(|(request, _)| request.request_id == name);
        &found.unwrap_or_else(|| panic!("nobody asked {name}")).0
    }

    /// Asks one of them again.
    pub(crate) async fn again(&self, clients: &Clients, number: usize) -> Answer {
        answer(clients, self.request(number).clone()).await
    }

    /// Panics where an answer is not whole and right.
    pub(crate) fn judge(&self, number: usize, answer: &Answer) {
        let (request, expected) = &self.asked[number % self.asked.len()];
        let name = &request.request_id;
        assert_eq!(answer.broken, Vec::<String>::new(), "{name}");
        assert!(answer.failed.is_none(), "{name}: {:?}", answer.failed);
        for (index, (choice, expected)) in answer.choices.iter().zip(expected).enumerate() {
            if choice.tokens == *expected && choice.finish.is_some() {
                continue;
            }
            let mut seen = observed(request, choice);
            // A replay computes the prompt anew, in other chunks.
            seen.disturbed = 0;
            match self.undisturbed.lock().judge(&engine_request(request), index as u32, &seen).unwrap() {
                Verdict::Same => {}
                Verdict::Excused(excuses) => {
                    println!("{name} choice {index} excused: {excuses:?}");
                    *self.excused.lock() += 1;
                }
                Verdict::Different(what) => panic!("{name} choice {index}: {what}; epochs {:?}", choice.epochs),
            }
        }
    }

    /// Panics where more than one in a hundred of so many answers needed an excuse, and more than one.
    pub(crate) fn few_excuses(&self, of: usize) {
        let excused = *self.excused.lock();
        println!("{excused} of {of} answers needed an excuse");
        assert!(excused <= 1.max(of / 100), "{excused} of {of} answers needed an excuse");
    }
}

async fn answer(clients: &Clients, request: GenerateRequest) -> Answer {
    run(clients, &Schedule { request, moves: Vec::new() }, &[]).await
}
