//! Resume tokens: what a router must know to go on with a request of another one that was lost, under a signature that
//! routers share. A token names the request and how much of each choice its client has; the request itself, and the
//! tokens where the client gives them, come again with Resume.

use std::fmt;

use perigee_proto::internal::{ResumePoint, Submit};
use perigee_proto::status::WireError;
use perigee_proto::v1;
use prost::Message;
use ring::{digest, hmac};

use crate::choice::Choice;
use crate::error::RouterError;
use crate::model::Model;
use crate::validate;

/// Version of tokens; those of another one are refused.
const VERSION: u32 = 1;
/// Least bytes of a shared key.
const LEAST_KEY_BYTES: usize = 32;
/// Bytes of a signature, HMAC-SHA256, at the end of a token.
const SIGNATURE_BYTES: usize = 32;

/// The key that tokens are signed with.
#[derive(Clone)]
pub struct ResumeKey(hmac::Key);

impl fmt::Debug for ResumeKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ResumeKey")
    }
}

impl ResumeKey {
    /// A key of at least 32 bytes that nobody but routers knows.
    ///
    /// # Errors
    /// [`RouterError::Config`] for a shorter one.
    pub fn new(secret: &[u8]) -> Result<Self, RouterError> {
        if secret.len() < LEAST_KEY_BYTES {
            let found = secret.len();
            return Err(RouterError::Config(format!(
                "resume key: expected at least {LEAST_KEY_BYTES} bytes, found {found}"
            )));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, secret)))
    }

    fn sign(&self, point: &ResumePoint) -> Vec<u8> {
        let mut token = point.encode_to_vec();
        let signature = hmac::sign(&self.0, &token);
        token.extend_from_slice(signature.as_ref());
        token
    }

    /// What a token says, if it was signed with this key.
    ///
    /// # Errors
    /// INVALID_ARGUMENT.
    pub(crate) fn open(&self, token: &[u8]) -> Result<ResumePoint, WireError> {
        let refused = || {
            let message = "it is damaged, or signed by a router that does not share its key (--resume-key-file)";
            WireError::invalid("resume_token", message)
        };
        let at = token.len().checked_sub(SIGNATURE_BYTES).ok_or_else(refused)?;
        let (body, signature) = token.split_at(at);
        hmac::verify(&self.0, body, signature).map_err(|_| refused())?;
        let point = ResumePoint::decode(body).map_err(|_| refused())?;
        if point.version != VERSION {
            let found = point.version;
            let message = format!("it has version {found}, this router reads version {VERSION}: repeat the request");
            return Err(WireError::invalid("resume_token", message));
        }
        Ok(point)
    }
}

/// A digest of what is asked for: equal for requests that give the same tokens.
fn digest_of(submit: &Submit) -> Vec<u8> {
    let asked = Submit {
        request_id: String::new(),
        sessions: Vec::new(),
        epoch: 0,
        delivered: Vec::new(),
        deadline_ms: None,
        ..submit.clone()
    };
    digest::digest(&digest::SHA256, &asked.encode_to_vec()).as_ref().to_vec()
}

/// Makes the tokens of one request, and knows what its client has read.
#[derive(Debug)]
pub(crate) struct Seal {
    key: ResumeKey,
    point: ResumePoint,
}

impl Seal {
    /// For a request of so many choices that begins.
    pub(crate) fn new(key: &ResumeKey, submit: &Submit, choices: usize) -> Self {
        let point = ResumePoint {
            version: VERSION,
            request_id: submit.request_id.clone(),
            seed: submit.sampling.as_ref().map_or(0, |sampling| sampling.seed),
            request: digest_of(submit),
            next: vec![0; choices],
            finished: vec![false; choices],
        };
        Self { key: key.clone(), point }
    }

    /// For a request that goes on.
    pub(crate) fn at(key: &ResumeKey, point: ResumePoint) -> Self {
        Self { key: key.clone(), point }
    }

    /// The token that goes with a response, which is read with it.
    pub(crate) fn with(&mut self, response: &v1::GenerateResponse) -> Vec<u8> {
        let choice = response.choice as usize;
        if let Some(next) = self.point.next.get_mut(choice) {
            *next = (*next).max(response.index + u64::from(response.token_id.is_some()));
        }
        if let Some(finished) = self.point.finished.get_mut(choice) {
            *finished |= response.finish_reason() != v1::FinishReason::Unspecified;
        }
        self.key.sign(&self.point)
    }
}

/// From where a request goes on.
#[derive(Debug)]
pub(crate) struct Resumed {
    point: ResumePoint,
    /// The tokens that the client has of each choice; empty where it did not say.
    received: Vec<Vec<u32>>,
}

impl Resumed {
    /// # Errors
    /// INVALID_ARGUMENT where the client says to have another number of tokens than its token.
    pub(crate) fn new(point: ResumePoint, received: Vec<v1::ReceivedTokens>, model: &Model) -> Result<Self, WireError> {
        let received: Vec<Vec<u32>> = received.into_iter().map(|choice| choice.token_ids).collect();
        let is_right =
            |(tokens, (next, finished)): (&Vec<u32>, (&u64, &bool))| *finished || tokens.len() as u64 == *next;
        let counts = point.next.iter().zip(&point.finished);
        if !received.is_empty() && (received.len() != point.next.len() || !received.iter().zip(counts).all(is_right)) {
            let message = format!("expected the tokens of every choice, {:?} of them, or none at all", point.next);
            return Err(WireError::invalid("received", message));
        }
        received.iter().try_for_each(|tokens| validate::token_ids("received", tokens, model))?;
        Ok(Self { point, received })
    }

    /// Whether the request is the one that the token is of.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where it is not.
    pub(crate) fn check(&self, submit: &Submit, choices: usize) -> Result<(), WireError> {
        if self.point.request == digest_of(submit) && self.point.next.len() == choices {
            return Ok(());
        }
        Err(WireError::invalid("request", "it differs from the request that resume_token is of"))
    }

    /// Brings a choice to where its client is.
    pub(crate) fn bring(&self, index: usize, choice: &mut Choice) {
        if self.point.finished.get(index).is_some_and(|finished| *finished) {
            choice.is_finished = true;
            choice.pending = None;
            return;
        }
        match self.received.get(index) {
            Some(tokens) => choice.tokens = tokens.clone(),
            // They are generated again, and kept back.
            None => choice.withheld = self.point.next.get(index).copied().unwrap_or_default(),
        }
    }

    pub(crate) fn into_seal(self, key: &ResumeKey) -> Seal {
        Seal::at(key, self.point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submit() -> Submit {
        Submit { request_id: "r".into(), prompt: vec![1, 2], max_tokens: 9, ..Submit::default() }
    }

    fn read(choice: u32, index: u64, token: Option<u32>) -> v1::GenerateResponse {
        v1::GenerateResponse { choice, index, token_id: token, ..v1::GenerateResponse::default() }
    }

    #[test]
    fn a_token_says_what_its_client_has_and_only_under_its_key() {
        let key = ResumeKey::new(&[7; 32]).expect("long enough");
        let mut seal = Seal::new(&key, &submit(), 2);
        seal.with(&read(0, 0, Some(5)));
        seal.with(&read(1, 0, Some(6)));
        let mut last = read(0, 1, None);
        last.set_finish_reason(v1::FinishReason::Stop);
        let token = seal.with(&last);
        let point = key.open(&token).expect("its own");
        assert_eq!((point.next.as_slice(), point.finished.as_slice()), ([1, 1].as_slice(), [true, false].as_slice()));
        let others = ResumeKey::new(&[8; 32]).expect("long enough");
        assert!(others.open(&token).is_err());
        for at in 0..token.len() {
            let mut damaged = token.clone();
            damaged[at] ^= 1;
            assert!(key.open(&damaged).is_err(), "byte {at}");
        }
        assert!(key.open(&token[..31]).is_err() && key.open(&[]).is_err());
        assert!(ResumeKey::new(&[7; 31]).is_err());
    }

    #[test]
    fn another_request_is_told_from_the_same_one_elsewhere() {
        let key = ResumeKey::new(&[7; 32]).expect("long enough");
        let mut seal = Seal::new(&key, &submit(), 1);
        let point = key.open(&seal.with(&read(0, 0, Some(5)))).expect("its own");
        let resumed = Resumed { point, received: Vec::new() };
        let elsewhere = Submit { sessions: vec!["s".into()], deadline_ms: Some(5), request_id: "q".into(), ..submit() };
        assert!(resumed.check(&elsewhere, 1).is_ok());
        assert!(resumed.check(&Submit { max_tokens: 8, ..submit() }, 1).is_err());
        assert!(resumed.check(&elsewhere, 2).is_err());
    }
}
