//! Servers that can be asked. A target turns a dialogue into one request of its protocol and tells what comes back as it
//! comes; clocks and counts are the driver's.

mod grpc;
mod openai;
mod sse;

use std::future::Future;
use std::ops::ControlFlow;
use std::pin::Pin;

pub use grpc::GrpcTarget;
pub(crate) use grpc::failure;
pub use openai::{OpenAiApi, OpenAiOptions, OpenAiTarget};

use crate::Dialogue;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Its name in logs.
    pub name: &'a str,
    /// Everything said so far.
    pub dialogue: &'a Dialogue,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// 0 takes the most likely token; absent is the server's value.
    pub temperature: Option<f32>,
    /// Whether to go on after end-of-sequence tokens.
    pub ignore_eos: bool,
}

/// What one response carried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Heard<'a> {
    /// Tokens, as far as the protocol tells.
    pub tokens: u32,
    /// Their ids, where the protocol tells them.
    pub ids: &'a [u32],
    /// Text.
    pub text: &'a str,
    /// Who generated it; empty where that is not told.
    pub replica: &'a str,
    /// Rises with every move of the session; 0 where that is not told.
    pub epoch: u64,
}

/// The server's counts of a whole request; absent where it gives none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Prompt tokens.
    pub prompt: Option<u64>,
    /// Of these, found in a cache.
    pub cached: Option<u64>,
    /// Generated tokens.
    pub output: Option<u64>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A gRPC code such as UNAVAILABLE, an HTTP status such as 503, or what happened to the connection.
    pub code: String,
    /// What the server said.
    pub message: String,
}

impl Failure {
    /// A stream that ended before its answer.
    pub(crate) fn cut_off() -> Self {
        Self { code: "CUT_OFF".to_owned(), message: "the stream ended without a finish reason".to_owned() }
    }
}

/// Takes responses as they come; a break gives the request up.
pub type Hear<'a> = &'a mut (dyn FnMut(Heard<'_>) -> ControlFlow<()> + Send);

/// A server.
pub trait Target: Send + Sync {
    /// Sends one request and hears its answer to the end, or until `hear` breaks; then the request is dropped in a way that
    /// the server notices.
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>>;

    /// What it is, in reports.
    fn describe(&self) -> String;
}
