//! What a leader and its ranks are given so that sessions can change replicas: the engine's settings, what other replicas'
//! questions are answered from, and the ranks' way to ask. It starts nothing but the thread that asks.

use std::sync::Arc;

use perigee_backend::{Backend, LatentReader};
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_engine::moves::{HandoffConnector, MoveConfig};
use perigee_engine::rank::Rank;
use perigee_migration::attend::attention_bytes;
use perigee_migration::{AttendShape, Geometry, Layout, Place};
use perigee_model::{LayerKind, ModelConfig};
use perigee_proto::internal::MoveCosts;

use crate::attend::HomeParts;
use crate::attention::GrpcAttention;
use crate::error::{Result, WorkerError};
use crate::move_options::MoveOptions;
use crate::peers::Peers;

/// Most tokens of a session in one question: longer prefill chunks ask in blocks.
const QUESTION_TOKENS: u32 = 64;

/// What a model's attention questions look like.
pub fn attend_shape(config: &ModelConfig) -> AttendShape {
    AttendShape {
        layers: config.count(LayerKind::Mla) as u32,
        heads: config.mla.heads as u32,
        latent: config.mla.latent as u32,
        rope: config.mla.rope as u32,
        tokens: QUESTION_TOKENS,
    }
}

/// What a session's move takes, for routers that weigh it.
pub fn move_costs(model: &ModelConfig, geometry: &Geometry) -> MoveCosts {
    let shape = attend_shape(model);
    MoveCosts {
        state_bytes: geometry.recurrent_bytes() + geometry.tail_bytes(),
        token_bytes: geometry.token_bytes(),
        ask_bytes: attention_bytes(&shape, geometry.latent_dtype, 1),
        ask_rounds: shape.layers,
    }
}

/// Gives a rank its way to ask the homes of remote latents.
///
/// # Errors
/// There is no thread for it.
pub fn let_ask<B: Backend>(rank: &mut Rank<B>, config: &ModelConfig, peers: Peers) -> Result<()> {
    let client =
        GrpcAttention::start(peers).map_err(WorkerError::io("starting the thread that asks other replicas"))?;
    rank.set_attention(Box::new(client), attend_shape(config));
    Ok(())
}

/// A leader's place among replicas.
#[derive(Debug, Clone)]
pub struct LeaderPlace {
    /// Name of the replica.
    pub replica: String,
    /// This run of it.
    pub incarnation: String,
    /// Number of ranks.
    pub tp: usize,
    /// Where others reach its internal port, as it is published: host:port.
    pub endpoint: String,
    /// Digest of its model.
    pub digest: String,
}

/// The engine's settings for moves, and what this replica answers questions from where its device can answer.
pub fn set_up(
    place: LeaderPlace,
    model: &ModelConfig,
    options: &MoveOptions,
    connector: Arc<dyn HandoffConnector>,
    (reader, geometry): (Option<Arc<dyn LatentReader>>, Option<Geometry>),
) -> (MoveConfig, Option<HomeParts>) {
    let homes = HomeDirectory::default();
    let config = MoveConfig {
        place: Place {
            replica: place.replica,
            incarnation: place.incarnation,
            ranks: place.tp as u32,
            layout: Layout::Replicated,
        },
        endpoint: place.endpoint,
        model: place.digest,
        homes: homes.clone(),
        can_answer: reader.is_some(),
        connector,
        silence: options.silence(),
        grace: options.grace(),
        patience: options.attend_deadline(),
        misses: options.attend_misses,
        shape: attend_shape(model),
        follow: options.pages_follow.into(),
        ways: options.ways(),
    };
    let scale = model.mla_shape(1).scale();
    let answers = AnswerModel { shape: attend_shape(model), scale };
    let parts = reader.map(|reader| HomeParts { homes, reader, model: answers, geometry });
    (config, parts)
}
