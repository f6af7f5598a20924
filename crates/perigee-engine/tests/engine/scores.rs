//! Log-probabilities: of drawn tokens, of prompts, and of prompts alone.

use perigee_engine::request::{PositionLogprobs, RefusedRequest, Request, SessionId};
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{EngineHandle, ScoreError, ScoreRequest, Scores, Turn};

use crate::support::{Driver, config};

fn driver(step_tokens: usize, step_rows: usize) -> Driver {
    let mut sizes = ModelSizes::default();
    sizes.limits.step_tokens = step_tokens;
    sizes.limits.step_rows = step_rows;
    Driver::new(ModelExecutor::new(sizes), config())
}

fn score_request(tokens: Vec<u32>) -> ScoreRequest {
    ScoreRequest { request_id: "score".into(), tokens, top: 2, priority: 0, deadline: None }
}

async fn scored(driver: &mut Driver, tokens: Vec<u32>) -> Result<Scores, ScoreError> {
    let handle: EngineHandle = driver.handle.clone();
    let task = tokio::spawn(async move { handle.score(score_request(tokens)).await });
    tokio::task::yield_now().await;
    driver.finish();
    task.await.unwrap()
}

fn prompt() -> Vec<u32> {
    (0..150).map(|index| index * 7 % 250).collect()
}

#[tokio::test]
async fn a_score_is_the_prompt_logprobs_of_a_request_whatever_the_chunks() {
    let mut whole = driver(512, 512);
    let expected = scored(&mut whole, prompt()).await.unwrap();
    whole.assert_nothing_is_held();
    assert_eq!(expected.len(), 150);
    assert_eq!(expected[0], None);
    for (position, token) in expected.iter().zip(prompt()).skip(1) {
        let PositionLogprobs { chosen, top } = position.as_ref().unwrap();
        assert_eq!((chosen.token, top.len()), (token, 2));
        assert!(chosen.logprob < 0.0 && top[0].logprob >= top[1].logprob && top[0].logprob >= chosen.logprob);
    }
    for (step_tokens, step_rows) in [(7, 4), (100, 9), (64, 64)] {
        let mut chunked = driver(step_tokens, step_rows);
        assert_eq!(scored(&mut chunked, prompt()).await.unwrap(), expected);

        let sessions = (0..3).map(|choice| SessionId(choice.to_string())).collect();
        let request = greedy_request("r", prompt(), 4);
        chunked.submit(&Request { sessions, prompt_logprobs: Some(2), ..request });
        chunked.finish();
        for choice in ["0", "1", "2"] {
            assert_eq!(chunked.answer(choice).prompt_logprobs.as_ref(), Some(&expected), "choice {choice}");
        }
        chunked.assert_nothing_is_held();
    }
}

#[tokio::test]
async fn drawn_tokens_score_as_the_prompt_that_they_make() {
    let mut driver = driver(512, 64);
    let mut request = greedy_request("s", prompt(), 20);
    request.sampling.logprobs = Some(2);
    driver.submit(&request);
    driver.finish();
    let answer = driver.answer("s").clone();
    let scores = scored(&mut driver, [prompt(), answer.tokens].concat()).await.unwrap();
    assert_eq!(scores[150..], answer.logprobs);
}

#[tokio::test]
async fn one_token_has_nothing_to_score_and_none_is_refused() {
    let mut driver = driver(512, 64);
    assert_eq!(scored(&mut driver, vec![5]).await.unwrap(), [None]);
    let refused = scored(&mut driver, Vec::new()).await.unwrap_err();
    assert!(matches!(refused, ScoreError::Refused(RefusedRequest::Invalid { field: "token_ids", .. })));
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_the_work() {
    let mut driver = driver(8, 8);
    let handle = driver.handle.clone();
    let task = tokio::spawn(async move { handle.score(score_request(prompt())).await });
    tokio::task::yield_now().await;
    assert_eq!(driver.turn(), Turn::Stepped);
    assert_eq!(driver.core.load().running, 1);
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(driver.turn(), Turn::Idle);
    driver.assert_nothing_is_held();
}
