//! Puts a rank's share of a model on a backend, layer by layer, with a callback for progress.

use perigee_backend::Backend;

use crate::config::LayerKind;
use crate::error::Result;
use crate::forward::{Activations, FeedForward, Layer, Mixer, Model, StepLimits};
use crate::shard::Shard;
use crate::source::WeightSource;

impl<B: Backend> Model<B> {
    /// Loads the share of `rank` out of `tp`. `progress(done, all)` is called after every layer.
    ///
    /// # Errors
    /// `tp` does not divide the model, or the backend refuses a layer.
    pub fn load(
        backend: &mut B,
        source: &WeightSource,
        (rank, tp): (usize, usize),
        limits: StepLimits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = source.config().clone();
        let shard = Shard::new(source, rank, tp)?;
        let (rows, first) = shard.embedding()?;
        let embedding = backend.load_embedding(&rows, first)?;
        let mut layers = Vec::with_capacity(config.layers.len());
        let (mut kda_layers, mut mla_layers) = (0, 0);
        for (number, layer) in config.layers.iter().enumerate() {
            let mixer = match layer.kind {
                LayerKind::Kda => {
                    kda_layers += 1;
                    Mixer::Kda(backend.load_kda(&config.kda_shape(tp), &shard.kda(number)?)?, kda_layers - 1)
                }
                LayerKind::Mla => {
                    mla_layers += 1;
                    Mixer::Mla(backend.load_mla(&config.mla_shape(tp), &shard.mla(number)?)?, mla_layers - 1)
                }
            };
            let feed_forward = if layer.dense {
                FeedForward::Dense(backend.load_mlp(&config.mlp_shape(tp), &shard.mlp(number)?)?)
            } else {
                FeedForward::Experts(backend.load_moe(&config.moe_shape(tp), &shard.moe(number)?)?)
            };
            layers.push(Layer {
                input_norm: backend.load_norm(&shard.mixer_norm(number)?, config.eps)?,
                mixer,
                post_norm: backend.load_norm(&shard.feed_forward_norm(number)?, config.eps)?,
                feed_forward,
            });
            progress(number + 1, config.layers.len());
        }
        let final_norm = backend.load_norm(&shard.final_norm()?, config.eps)?;
        let (rows, counts) = shard.head()?;
        let head = backend.load_head(&rows, &counts)?;
        let activations = Activations::new(backend, &config, tp, limits)?;
        Ok(Self { config, embedding, layers, final_norm, head, activations })
    }
}
