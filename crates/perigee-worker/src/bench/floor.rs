//! The fewest bytes that a decode step moves: every weight that it needs once, states read and written, latents read. Over
//! the rate of a copy they give the time below which no step can be.

use perigee_backend::DType;
use perigee_model::ModelConfig;
use perigee_model::inventory::weight_bytes;

use super::Cell;

/// Bytes of a step of the whole batch, with `experts` routed experts a mixture layer. Weights are counted as stored,
/// embedding rows by the tokens that take them; convolution tails and activations are left out.
pub(super) fn step_bytes(model: &ModelConfig, cell: Cell, experts: f64, latents: DType) -> f64 {
    let stored = DType::Bf16.bytes();
    let layers = model.layers.iter().filter(|layer| !layer.dense).count();
    let expert = 3 * model.hidden * model.moe.intermediate * stored;
    let routed = layers * model.moe.experts * expert;
    let embedding = model.vocab * model.hidden * stored;
    let fixed = weight_bytes(model, 0, 1) as f64 - routed as f64 - embedding as f64;
    let cache = model.cache_shape(1, 1, 1);
    let state = cache.kda_layers * cache.kda_heads * cache.kda_head_dim * cache.kda_head_dim * 4;
    let position = cache.mla_layers * cache.latent_width * latents.bytes();
    let session = model.hidden * stored + 2 * state + cell.context * position;
    fixed + experts * (layers * expert) as f64 + (cell.batch * session) as f64
}

#[cfg(test)]
mod tests {
    use perigee_model::Preset;

    use super::*;

    #[test]
    fn the_48b_shape_moves_what_was_counted_by_hand() {
        let model = Preset::Kimi48b.config().unwrap();
        let gigabytes =
            |batch, context, experts| step_bytes(&model, Cell { batch, context }, experts, DType::Bf16) / 1e9;
        // Weights 6.214 GB at batch 1, states 0.084, latents of 4k 0.033.
        assert!((gigabytes(1, 4096, 8.0) - 6.331).abs() < 0.002, "{}", gigabytes(1, 4096, 8.0));
        // Weights 85.140 GB at batch 64 under uniform routing, states 5.369, latents of 128k 67.6.
        let large = gigabytes(64, 131_072, 222.44);
        assert!((large - (85.140 + 5.369 + 67.6)).abs() < 0.1, "{large}");
    }
}
