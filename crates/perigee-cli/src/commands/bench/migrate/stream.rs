//! One client of the benchmark: a stream that is read as it comes, with the time and the replica of every token.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{GenerateRequest, SamplingParams};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::numbers::Piece;
use crate::client::refused;

/// A request that is being answered. Dropped, its client has gone away.
pub(super) struct Stream {
    /// Name of its session.
    pub(super) session: String,
    pieces: Arc<Mutex<Vec<Piece>>>,
    /// How many tokens there are; closed once the stream has ended.
    count: watch::Receiver<usize>,
    reader: JoinHandle<()>,
}

impl Stream {
    /// Sends a prompt of random ids and waits for the first token.
    pub(super) async fn open(
        mut client: InferenceClient<Channel>,
        prompt: Vec<u32>,
        max_tokens: usize,
    ) -> anyhow::Result<Self> {
        let sampling = SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() };
        let request = GenerateRequest {
            token_ids: prompt,
            max_tokens: Some(u32::try_from(max_tokens).unwrap_or(u32::MAX)),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let mut responses = client.generate(request).await.map_err(refused)?.into_inner();
        let first = responses.message().await.map_err(refused)?.context("the stream ended before its first token")?;
        let session = first.session_id.clone();
        let pieces = Arc::new(Mutex::new(vec![Piece { at: Instant::now(), replica: first.replica }]));
        let (told, count) = watch::channel(1);
        let shared = pieces.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(response)) = responses.message().await {
                let at = Instant::now();
                if response.token_id.is_none() {
                    continue;
                }
                let count = {
                    let mut pieces = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    pieces.push(Piece { at, replica: response.replica });
                    pieces.len()
                };
                told.send_replace(count);
            }
        });
        Ok(Self { session, pieces, count, reader })
    }

    /// Tokens so far.
    pub(super) fn len(&self) -> usize {
        *self.count.borrow()
    }

    /// Who sent the last one.
    pub(super) fn owner(&self) -> String {
        self.pieces().last().map(|piece| piece.replica.clone()).unwrap_or_default()
    }

    pub(super) fn pieces(&self) -> Vec<Piece> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next so many tokens, from now on.
    ///
    /// # Errors
    /// They do not come within the time.
    pub(super) async fn next(&mut self, tokens: usize, patience: Duration) -> anyhow::Result<Vec<Piece>> {
        let from = self.len();
        self.reach(from + tokens, patience).await?;
        Ok(self.pieces()[from..from + tokens].to_vec())
    }

    /// Waits until there are so many tokens.
    ///
    /// # Errors
    /// They do not come within the time.
    pub(super) async fn reach(&mut self, count: usize, patience: Duration) -> anyhow::Result<()> {
        let reached = tokio::time::timeout(patience, self.count.wait_for(|found| *found >= count)).await;
        let reached = reached.map_err(|_| anyhow!("no token for {patience:?}"))?;
        reached.map(|_| ()).map_err(|_| anyhow!("the stream ended early, after {} tokens", self.len()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
