//! Cases of loading: a tensor of another shape or of the wrong number of bytes is refused, and what was loaded is counted.

use std::borrow::Cow;

use crate::error::Result;
use crate::ops::Backend;
use crate::shapes::{KdaShape, MlaShape, MlpShape, MoeShape};
use crate::weights::{DType, TensorSlice, TensorSource};

use super::check::Checks;
use super::draw::{Origin, WeightDraw};
use super::harness::{Harness, small_cache};
use super::reference::experts::{Bias, MlpLayer, MoeLayer};
use super::reference::kda::{Gates, KdaLayer};
use super::reference::mla::MlaLayer;
use super::{Case, Factory};

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    vec![
        Case::new("load/refuses wrong shapes".into(), |factory: &mut F, checks| wrong_shapes(factory, checks)),
        Case::new("load/refuses wrong byte counts".into(), |factory: &mut F, checks| wrong_bytes(factory, checks)),
        Case::new("load/counts bytes".into(), |factory: &mut F, checks| counted(factory, checks)),
    ]
}

const KDA: KdaShape = KdaShape { hidden: 128, heads: 1, head_dim: 128, conv: 4, eps: 1e-5 };
const MLA: MlaShape =
    MlaShape { hidden: 128, heads: 1, nope: 128, rope: 64, value: 128, latent: 512, query_rank: None, eps: 1e-6 };
const MLP: MlpShape = MlpShape { hidden: 128, width: 64 };
const MOE: MoeShape = MoeShape {
    hidden: 128,
    experts: 4,
    top_k: 2,
    groups: 1,
    top_groups: 1,
    renormalize: true,
    scale: 1.0,
    width: 32,
    shared_width: 32,
};

fn wrong_shapes<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    let backend = &mut h.backend;
    let table = WeightDraw::new(1, Origin::Bytes).normal("table", &[10, 64], 1.0);
    checks.refused("a head whose rows contradict the counts", backend.load_head(&table.slice(), &[11]));

    let kda = KdaLayer::draw(KDA, Gates::Mixed, 1, Origin::Bytes);
    for (what, change) in [
        ("heads", KdaShape { heads: 2, ..KDA }),
        ("hidden", KdaShape { hidden: 256, ..KDA }),
        ("conv", KdaShape { conv: 3, ..KDA }),
    ] {
        checks.refused(&format!("kda tensors of another {what}"), backend.load_kda(&change, &kda.weights()));
    }
    let mut weights = kda.weights();
    weights.o_proj.shape.reverse();
    weights.o_proj.shape[0] += 1;
    checks.refused("kda o_proj of another shape", backend.load_kda(&KDA, &weights));

    let mla = MlaLayer::draw(MLA, 1, Origin::Bytes);
    for (what, change) in [
        ("heads", MlaShape { heads: 2, ..MLA }),
        ("value width", MlaShape { value: 64, ..MLA }),
        ("query rank", MlaShape { query_rank: Some(64), ..MLA }),
    ] {
        checks.refused(&format!("mla tensors of another {what}"), backend.load_mla(&change, &mla.weights()));
    }

    let mlp = MlpLayer::draw(MLP, 1, Origin::Bytes);
    let change = MlpShape { width: 32, ..MLP };
    checks.refused("mlp tensors of another width", backend.load_mlp(&change, &mlp.weights()));

    let moe = MoeLayer::draw(MOE, Bias::Mixed, 1, Origin::Bytes);
    for (what, change) in [
        ("number of experts", MoeShape { experts: 8, ..MOE }),
        ("width", MoeShape { width: 64, ..MOE }),
        ("shared width", MoeShape { shared_width: 64, ..MOE }),
        ("shared width of none", MoeShape { shared_width: 0, ..MOE }),
    ] {
        checks.refused(&format!("moe tensors of another {what}"), backend.load_moe(&change, &moe.weights()));
    }
    Ok(())
}

fn wrong_bytes<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    for bytes in [0, 62 * 2, 64 * 2 - 1, 66 * 2] {
        let short = |shape: Vec<usize>, count: usize| TensorSlice {
            name: "short".into(),
            shape,
            dtype: DType::Bf16,
            source: TensorSource::Bytes(Cow::Owned(vec![0; count])),
        };
        checks.refused(&format!("a norm of 64 in {bytes} bytes"), h.backend.load_norm(&short(vec![64], bytes), 1e-5));
        checks.refused(
            &format!("a table of 1 by 64 in {bytes} bytes"),
            h.backend.load_embedding(&short(vec![1, 64], bytes), 0),
        );
    }
    Ok(())
}

/// A backend may add padding or another layout, but neither lose weights nor hold them many times over.
fn counted<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    let before = h.backend.weight_bytes();
    let mlp = MlpLayer::draw(MLP, 1, Origin::Bytes);
    let _layer = h.backend.load_mlp(&MLP, &mlp.weights())?;
    let (loaded, stored) = (h.backend.weight_bytes() - before, (3 * MLP.hidden * MLP.width * 2) as u64);
    checks.holds("an MLP's size", (stored..=2 * stored).contains(&loaded), || {
        format!("is counted as {loaded} bytes, {stored} are stored")
    });
    Ok(())
}
