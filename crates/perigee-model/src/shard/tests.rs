//! Tests of the ranks' shares: put together they are the whole model, each has the shapes that backends expect, and a
//! written checkpoint holds the numbers of the random model it came from.

use perigee_backend::TensorSource;
use perigee_backend::weights::{MlpWeights, QueryWeights};
use serde_json::Value;
use tempfile::TempDir;

use super::Shard;
use crate::checkpoint::Checkpoint;
use crate::config::LayerKind;
use crate::init::init_model;
use crate::inventory::{self, Split};
use crate::presets::{ModelSpec, Preset};
use crate::source::WeightSource;
use crate::test_support::{odd_config, random, written};

const DEGREES: [usize; 3] = [1, 2, 4];

fn opened(directory: &TempDir) -> WeightSource {
    WeightSource::checkpoint(Checkpoint::open(directory.path()).unwrap())
}

/// The odd model and tiny, each as a checkpoint and as random weights.
fn pairs() -> Vec<(TempDir, WeightSource, WeightSource)> {
    let tiny: Value = serde_json::from_str(&Preset::Tiny.config_json().unwrap()).unwrap();
    [odd_config(), tiny]
        .into_iter()
        .map(|config| {
            let directory = written(&config);
            let checkpoint = opened(&directory);
            (directory, checkpoint, random(&config))
        })
        .collect()
}

/// Puts the ranks' parts of a tensor back together.
fn assembled(source: &WeightSource, name: &str, tp: usize) -> Vec<f32> {
    let spec = source.spec(name).unwrap();
    let (rows, columns) = spec.extent();
    let mut whole = vec![f32::NAN; rows * columns];
    let mut next = 0;
    for rank in 0..tp {
        let part = source.part(name, rank, tp).unwrap();
        let values = part.to_f32().unwrap();
        match spec.split {
            Split::Replicated => whole.copy_from_slice(&values),
            Split::Rows | Split::Vocabulary => {
                whole[next..][..values.len()].copy_from_slice(&values);
                next += values.len();
            }
            Split::Columns => {
                let width = part.shape[1];
                for (row, values) in values.chunks_exact(width).enumerate() {
                    whole[row * columns + next..][..width].copy_from_slice(values);
                }
                next += width;
            }
        }
    }
    whole
}

#[test]
fn the_ranks_parts_make_up_the_tensors_of_both_sources() {
    for (_directory, checkpoint, random) in pairs() {
        for spec in inventory::tensors(checkpoint.config()) {
            let whole = random.whole(&spec.name).unwrap();
            assert_eq!(whole.elements(), spec.elements());
            let whole = whole.to_f32().unwrap();
            for tp in DEGREES {
                assert!(assembled(&random, &spec.name, tp) == whole, "{} random, {tp} ranks", spec.name);
                assert!(assembled(&checkpoint, &spec.name, tp) == whole, "{} checkpoint, {tp} ranks", spec.name);
            }
        }
    }
}

#[test]
fn rows_borrow_the_map_and_columns_copy() {
    let directory = written(&odd_config());
    let source = opened(&directory);
    let is_borrowed = |name: &str| match source.part(name, 1, 2).unwrap().source {
        TensorSource::Bytes(bytes) => matches!(bytes, std::borrow::Cow::Borrowed(_)),
        TensorSource::Random(_) => panic!("a checkpoint holds bytes"),
    };
    assert!(is_borrowed("model.layers.1.self_attn.q_proj.weight"));
    assert!(is_borrowed("model.layers.1.self_attn.A_log"));
    assert!(is_borrowed("lm_head.weight"));
    assert!(!is_borrowed("model.layers.1.self_attn.o_proj.weight"));
}

#[test]
fn parts_outside_of_a_tensor_are_refused() {
    let source = random(&odd_config());
    assert_eq!(
        source.slice("model.norm.weight", 0..9, 0..1).unwrap_err().to_string(),
        "tensor model.norm.weight: expected a part of 8 rows and 1 columns, found rows 0..9, columns 0..1"
    );
    assert_eq!(
        source.whole("model.norm.bias").unwrap_err().to_string(),
        "tensor model.norm.bias: expected a tensor of this model, found no such tensor"
    );
    let shard = Shard::new(&source, 0, 1).unwrap();
    assert_eq!(
        shard.kda(0).unwrap_err().to_string(),
        "tensor model.layers.0.self_attn.q_proj.weight: expected a tensor of this model, found no such tensor"
    );
    assert!(shard.mla(1).is_err() && shard.moe(0).is_err() && shard.mlp(2).is_err() && shard.mixer_norm(4).is_err());
}

/// The bytes of an MLP's parts, whose shapes must be these.
fn gated_bytes(mlp: &MlpWeights<'_>, hidden: usize, width: usize) -> u64 {
    mlp.gate.expect(&[width, hidden]).unwrap();
    mlp.up.expect(&[width, hidden]).unwrap();
    mlp.down.expect(&[hidden, width]).unwrap();
    mlp.gate.bytes() + mlp.up.bytes() + mlp.down.bytes()
}

/// Loads everything that a rank would, checks the shapes against those of the configuration, and returns the bytes.
fn loaded_bytes(source: &WeightSource, rank: usize, tp: usize) -> u64 {
    let config = source.config();
    let shard = Shard::new(source, rank, tp).unwrap();
    let (embedding, first) = shard.embedding().unwrap();
    let (head, counts) = shard.head().unwrap();
    assert_eq!(first, counts[..rank].iter().sum::<usize>());
    assert_eq!(counts.iter().sum::<usize>(), config.vocab);
    embedding.expect(&[counts[rank], config.hidden]).unwrap();
    head.expect(&[counts[rank], config.hidden]).unwrap();
    let norm = shard.final_norm().unwrap();
    norm.expect(&[config.hidden]).unwrap();
    let mut bytes = embedding.bytes() + head.bytes() + norm.bytes();
    for (index, layer) in config.layers.iter().enumerate() {
        for norm in [shard.mixer_norm(index).unwrap(), shard.feed_forward_norm(index).unwrap()] {
            norm.expect(&[config.hidden]).unwrap();
            bytes += norm.bytes();
        }
        bytes += match layer.kind {
            LayerKind::Kda => kda_bytes(&shard, index),
            LayerKind::Mla => mla_bytes(&shard, index),
        };
        if layer.dense {
            let shape = config.mlp_shape(tp);
            bytes += gated_bytes(&shard.mlp(index).unwrap(), shape.hidden, shape.width);
            continue;
        }
        let (shape, moe) = (config.moe_shape(tp), shard.moe(index).unwrap());
        moe.router.expect(&[shape.experts, shape.hidden]).unwrap();
        moe.bias.expect(&[shape.experts]).unwrap();
        assert_eq!(moe.experts.len(), shape.experts);
        bytes += moe.router.bytes() + moe.bias.bytes();
        bytes += moe.experts.iter().map(|expert| gated_bytes(expert, shape.hidden, shape.width)).sum::<u64>();
        bytes += moe.shared.iter().map(|shared| gated_bytes(shared, shape.hidden, shape.shared_width)).sum::<u64>();
    }
    bytes
}

fn kda_bytes(shard: &Shard<'_>, layer: usize) -> u64 {
    let (shape, kda) = (shard.source.config().kda_shape(shard.tp), shard.kda(layer).unwrap());
    let channels = shape.heads * shape.head_dim;
    let mut bytes = 0;
    for (slice, expected) in kda
        .qkv_proj
        .iter()
        .map(|slice| (slice, vec![channels, shape.hidden]))
        .chain(kda.qkv_conv.iter().map(|slice| (slice, vec![channels, shape.conv])))
        .chain([
            (&kda.f_a_proj, vec![shape.head_dim, shape.hidden]),
            (&kda.f_b_proj, vec![channels, shape.head_dim]),
            (&kda.dt_bias, vec![channels]),
            (&kda.a_log, vec![shape.heads]),
            (&kda.b_proj, vec![shape.heads, shape.hidden]),
            (&kda.g_a_proj, vec![shape.head_dim, shape.hidden]),
            (&kda.g_b_proj, vec![channels, shape.head_dim]),
            (&kda.o_norm, vec![shape.head_dim]),
            (&kda.o_proj, vec![shape.hidden, channels]),
        ])
    {
        slice.expect(&expected).unwrap();
        bytes += slice.bytes();
    }
    bytes
}

fn mla_bytes(shard: &Shard<'_>, layer: usize) -> u64 {
    let (shape, mla) = (shard.source.config().mla_shape(shard.tp), shard.mla(layer).unwrap());
    let queries = shape.heads * (shape.nope + shape.rope);
    let mut parts = vec![
        (&mla.kv_a_proj, vec![shape.cache_width(), shape.hidden]),
        (&mla.kv_a_norm, vec![shape.latent]),
        (&mla.kv_b_proj, vec![shape.heads * (shape.nope + shape.value), shape.latent]),
        (&mla.o_proj, vec![shape.hidden, shape.heads * shape.value]),
    ];
    match (&mla.query, shape.query_rank) {
        (QueryWeights::Full(proj), None) => parts.push((proj, vec![queries, shape.hidden])),
        (QueryWeights::LowRank { down, norm, up }, Some(rank)) => {
            parts.extend([(down, vec![rank, shape.hidden]), (norm, vec![rank]), (up, vec![queries, rank])])
        }
        (_, rank) => panic!("the form of the query does not fit its rank {rank:?}"),
    }
    for (slice, expected) in &parts {
        slice.expect(expected).unwrap();
    }
    parts.iter().map(|(slice, _)| slice.bytes()).sum()
}

#[test]
fn every_tensor_is_loaded_once_with_the_expected_shape_and_about_a_share_of_the_bytes() {
    for (_directory, checkpoint, random) in pairs() {
        let total = inventory::weight_bytes(random.config(), 0, 1);
        let all: u64 = inventory::tensors(random.config()).iter().map(|spec| spec.bytes()).sum();
        assert_eq!(total, all);
        for tp in DEGREES {
            for rank in 0..tp {
                let bytes = loaded_bytes(&random, rank, tp);
                assert_eq!(bytes, loaded_bytes(&checkpoint, rank, tp));
                assert_eq!(bytes, Shard::new(&random, rank, tp).unwrap().weight_bytes());
            }
        }
    }
    for preset in [Preset::Tiny, Preset::Wide, Preset::Kimi48b] {
        let config = preset.config().unwrap();
        let total = inventory::weight_bytes(&config, 0, 1) as f64;
        for (rank, tp) in [(0, 2), (1, 2), (0, 4), (3, 4)] {
            let share = inventory::weight_bytes(&config, rank, tp) as f64 * tp as f64 / total;
            let limit = if preset == Preset::Kimi48b { 1.01 } else { 1.25 };
            assert!((1.0..limit).contains(&share), "{} on {tp}: {share} of an even share", preset.name());
        }
    }
}

#[test]
fn a_degree_that_does_not_divide_is_refused() {
    let source = random(&odd_config());
    assert_eq!(
        Shard::new(&source, 0, 3).unwrap_err().to_string(),
        "tensor-parallel degree 3 does not divide KDA heads (linear_attn_config.num_heads): expected a multiple of 3, found 4"
    );
    assert_eq!(
        Shard::new(&source, 2, 2).unwrap_err().to_string(),
        "expected a rank below the tensor-parallel degree, found rank 2 of 2"
    );
}

#[test]
fn random_weights_are_distributed_as_stated() {
    let source = WeightSource::open(&ModelSpec::parse("random:tiny@3").unwrap()).unwrap();
    let values = |name: &str| source.whole(name).unwrap().to_f32().unwrap();
    let deviation = |name: &str| {
        let values = values(name);
        (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    };
    let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.06, "{found} for {expected}");
    close(deviation("lm_head.weight"), 0.02);
    close(deviation("model.layers.1.block_sparse_moe.experts.7.w2.weight"), 0.02);
    close(deviation("model.layers.0.self_attn.k_conv1d.weight"), 0.5);
    assert!(values("model.layers.3.self_attn.kv_a_layernorm.weight").iter().all(|x| *x == 1.0));
    assert!(values("model.layers.1.block_sparse_moe.gate.e_score_correction_bias").iter().all(|x| *x == 0.0));
    assert!(values("model.layers.0.self_attn.A_log").iter().all(|x| (0.0..=2.77).contains(x)));
    let biases = values("model.layers.0.self_attn.dt_bias");
    assert!(biases.iter().all(|x| (-6.9..=-2.3).contains(x)));
    assert!(biases.iter().any(|x| *x < -6.0) && biases.iter().any(|x| *x > -3.2));
}

#[test]
fn an_initialised_model_is_the_random_model() {
    let directory = TempDir::new().unwrap();
    let target = directory.path().join("new").join("tiny");
    let spec = ModelSpec::parse("random:tiny@9").unwrap();
    let mut reports = Vec::new();
    init_model(&target, &spec, &mut |done, total| reports.push((done, total))).unwrap();

    let random = WeightSource::open(&spec).unwrap();
    let stored = WeightSource::open(&ModelSpec::Directory(target.clone())).unwrap();
    assert_eq!(stored.config(), random.config());
    for spec in inventory::tensors(random.config()) {
        let (stored, random) = (stored.whole(&spec.name).unwrap(), random.whole(&spec.name).unwrap());
        assert_eq!((&stored.shape, stored.dtype), (&random.shape, random.dtype));
        assert!(stored.to_f32().unwrap() == random.to_f32().unwrap(), "{}", spec.name);
    }
    let total = inventory::weight_bytes(random.config(), 0, 1);
    assert_eq!(reports.len(), inventory::tensors(random.config()).len());
    assert!(reports.is_sorted() && reports.iter().all(|(_, whole)| *whole == total));
    assert_eq!(reports.last(), Some(&(total, total)));
    let mut names: Vec<_> =
        std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
}

#[test]
fn init_overwrites_nothing() {
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("notes"), "mine").unwrap();
    let spec = ModelSpec::parse("random:tiny").unwrap();
    assert_eq!(
        init_model(directory.path(), &spec, &mut |_, _| {}).unwrap_err().to_string(),
        format!("{}: expected an empty or new directory, found notes in it", directory.path().display())
    );
    let written = written(&odd_config());
    let empty = TempDir::new().unwrap();
    let message = init_model(empty.path(), &ModelSpec::Directory(written.path().into()), &mut |_, _| {}).unwrap_err();
    assert_eq!(
        message.to_string(),
        format!(
            "{}: expected random weights to write, found a model that is a checkpoint already",
            empty.path().display()
        )
    );
}
