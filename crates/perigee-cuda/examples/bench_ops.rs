//! Times the ops of one layer of each kind at the 48B shape on one GPU, with random weights: prefill of one prompt and decode
//! of a batch; and draws from logits. Medians of several runs, each run one op with all its products. It judges nothing.
//!
//! usage: bench_ops [PREFIX of the op's name [SHAPE, part of its name, e.g. "x 8192" [RUNS]]]

use std::hash::{DefaultHasher, Hasher};

use perigee_backend::random::{Distribution, RandomFill};
use perigee_backend::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights, QueryWeights};
use perigee_backend::{
    Backend, CacheShape, DType, KdaShape, MlaShape, MoeShape, PAGE_TOKENS, Partials, Precision, Result, Routing, Row,
    Segment, StepBatch, TensorSlice, TensorSource,
};
use perigee_collectives::Solo;
use perigee_cuda::{CudaBackend, Options};
use perigee_sampling::{Draw, SamplingParams, Scratch, TokenCounts};

const HIDDEN: usize = 2304;
const KDA: KdaShape = KdaShape { hidden: HIDDEN, heads: 32, head_dim: 128, conv: 4, eps: 1e-5 };
const MLA: MlaShape =
    MlaShape { hidden: HIDDEN, heads: 32, nope: 128, rope: 64, value: 128, latent: 512, query_rank: None, eps: 1e-6 };
const MOE: MoeShape = MoeShape {
    hidden: HIDDEN,
    experts: 256,
    top_k: 8,
    groups: 1,
    top_groups: 1,
    renormalize: true,
    scale: 2.446,
    width: 1024,
    shared_width: 1024,
};
const MOST_TOKENS: usize = 8192;
const SLOTS: usize = 257;
const PAGES: usize = 5200;

fn slice(name: &str, shape: &[usize], distribution: Distribution) -> TensorSlice<'static> {
    let row_stride = shape.last().copied().unwrap_or(1) as u64;
    let key = perigee_backend::random::tensor_key(0, name);
    let fill = RandomFill { key, distribution, first: 0, row_stride };
    TensorSlice { name: name.into(), shape: shape.to_vec(), dtype: DType::Bf16, source: TensorSource::Random(fill) }
}

fn normal(name: &str, shape: &[usize]) -> TensorSlice<'static> {
    slice(name, shape, Distribution::Normal { deviation: 0.02 })
}

fn ones(name: &str, width: usize) -> TensorSlice<'static> {
    slice(name, &[width], Distribution::Constant(1.0))
}

fn kda_weights() -> KdaWeights<'static> {
    let channels = KDA.heads * KDA.head_dim;
    let conv = |name| slice(name, &[channels, KDA.conv], Distribution::Normal { deviation: 0.5 });
    KdaWeights {
        qkv_proj: ["q", "k", "v"].map(|name| normal(name, &[channels, HIDDEN])),
        qkv_conv: ["cq", "ck", "cv"].map(conv),
        f_a_proj: normal("fa", &[KDA.head_dim, HIDDEN]),
        f_b_proj: normal("fb", &[channels, KDA.head_dim]),
        dt_bias: slice("dt", &[channels], Distribution::Uniform { low: -6.9, high: -2.3 }),
        a_log: slice("a", &[KDA.heads], Distribution::Uniform { low: 0.0, high: 2.77 }),
        b_proj: normal("b", &[KDA.heads, HIDDEN]),
        g_a_proj: normal("ga", &[KDA.head_dim, HIDDEN]),
        g_b_proj: normal("gb", &[channels, KDA.head_dim]),
        o_norm: ones("on", KDA.head_dim),
        o_proj: normal("o", &[HIDDEN, channels]),
    }
}

fn mla_weights() -> MlaWeights<'static> {
    MlaWeights {
        query: QueryWeights::Full(normal("mq", &[MLA.heads * (MLA.nope + MLA.rope), HIDDEN])),
        kv_a_proj: normal("kva", &[MLA.cache_width(), HIDDEN]),
        kv_a_norm: ones("kvn", MLA.latent),
        kv_b_proj: normal("kvb", &[MLA.heads * (MLA.nope + MLA.value), MLA.latent]),
        o_proj: normal("mo", &[HIDDEN, MLA.heads * MLA.value]),
    }
}

fn mlp_weights(name: &str, width: usize) -> MlpWeights<'static> {
    MlpWeights {
        gate: normal(&format!("{name}g"), &[width, HIDDEN]),
        up: normal(&format!("{name}u"), &[width, HIDDEN]),
        down: normal(&format!("{name}d"), &[HIDDEN, width]),
    }
}

fn moe_weights() -> MoeWeights<'static> {
    MoeWeights {
        router: normal("router", &[MOE.experts, HIDDEN]),
        bias: slice("bias", &[MOE.experts], Distribution::Constant(0.0)),
        experts: (0..MOE.experts).map(|index| mlp_weights(&index.to_string(), MOE.width)).collect(),
        shared: Some(mlp_weights("shared", MOE.shared_width)),
    }
}

/// `rows` rows of `tokens` tokens each, after `context` tokens.
fn batch(rows: usize, tokens: usize, context: usize) -> StepBatch {
    let pages = (context + tokens).div_ceil(PAGE_TOKENS);
    let row = |index: usize| Row {
        tokens: tokens as u32,
        position: context as u64,
        read_slot: index as u32,
        write_slot: index as u32,
        segments: vec![Segment {
            start: 0,
            end: (context + tokens) as u64,
            pages: (0..pages).map(|page| ((index * pages + page) % PAGES) as u32).collect(),
        }],
    };
    StepBatch { tokens: vec![1; rows * tokens], rows: (0..rows).map(row).collect(), logits: vec![] }
}

/// Runs that a median is taken of; with one, for profilers, nothing is run before it.
fn runs() -> usize {
    std::env::args().nth(3).and_then(|text| text.parse().ok()).unwrap_or(15)
}

fn median(backend: &mut CudaBackend, mut work: impl FnMut(&mut CudaBackend) -> Result<()>) -> Result<f32> {
    let runs = runs();
    for _ in 0..if runs > 1 { 3 } else { 0 } {
        work(backend)?;
    }
    let mut times = (0..runs).map(|_| backend.timed(&mut work)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f32::total_cmp);
    Ok(times[times.len() / 2])
}

/// A hash of the numbers' bits, by which results of variants that are to be the same are held together.
fn digest(values: &[f32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    values.iter().for_each(|value| hasher.write_u32(value.to_bits()));
    hasher.finish()
}

fn main() -> Result<()> {
    let prefix = std::env::args().nth(1).unwrap_or_default();
    let shape = std::env::args().nth(2).unwrap_or_default();
    let mut backend = CudaBackend::open(Options { device: 0, precision: DType::Bf16 }, Box::new(Solo))?;
    println!("{:?}", backend.device()?);
    let kda = backend.load_kda(&KDA, &kda_weights())?;
    let mla = backend.load_mla(&MLA, &mla_weights())?;
    let moe = backend.load_moe(&MOE, &moe_weights())?;
    backend.reserve_cache(&CacheShape {
        kda_layers: 1,
        kda_heads: KDA.heads,
        kda_head_dim: KDA.head_dim,
        conv: KDA.conv,
        mla_layers: 1,
        latent_width: MLA.cache_width(),
        slots: SLOTS,
        pages: PAGES,
    })?;
    let slots: Vec<u32> = (0..SLOTS as u32).collect();
    backend.clear_slots(&slots)?;
    // Latents as they come from a norm: a product of zeros takes less power and less time.
    let key = perigee_backend::random::tensor_key(3, "latents");
    let distribution = Distribution::Normal { deviation: 1.0 };
    let fill = RandomFill { key, distribution, first: 0, row_stride: MLA.cache_width() as u64 };
    let latents = fill.values(&[PAGE_TOKENS, MLA.cache_width()], DType::Bf16);
    let page_bytes: Vec<u8> = latents.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    for page in 0..PAGES as u32 {
        backend.import_page(page, 0, &page_bytes)?;
    }
    let mut x = backend.tensor(MOST_TOKENS, HIDDEN, Precision::Activation)?;
    let mut out = backend.tensor(MOST_TOKENS, HIDDEN, Precision::Activation)?;
    let mut queries = backend.tensor(MOST_TOKENS, MLA.heads * MLA.cache_width(), Precision::Full)?;
    let mut partials = Partials {
        output: backend.tensor(MOST_TOKENS, MLA.heads * MLA.latent, Precision::Full)?,
        lse: backend.tensor(MOST_TOKENS, MLA.heads, Precision::Full)?,
    };
    let key = perigee_backend::random::tensor_key(1, "x");
    let fill =
        RandomFill { key, distribution: Distribution::Normal { deviation: 1.0 }, first: 0, row_stride: HIDDEN as u64 };
    backend.write(&mut x, &fill.values(&[MOST_TOKENS, HIDDEN], DType::Bf16))?;

    let shapes = [
        (1, 64, 0),
        (1, 256, 0),
        (1, 1024, 0),
        (1, 4096, 0),
        (1, 8192, 0),
        (8, 1024, 0),
        (1, 8192, 24_576),
        (1, 8192, 122_880),
        (1, 1, 1023),
        (8, 1, 1023),
        (32, 1, 1023),
        (64, 1, 1023),
        (128, 1, 1023),
        (256, 1, 1023),
        (1, 1, 8191),
        (1, 1, 32_767),
        (1, 1, 131_071),
        (8, 1, 32_767),
        (64, 1, 8191),
    ];
    for (rows, tokens, context) in shapes {
        let name = format!("{rows} x {tokens} after {context}");
        if !name.contains(&shape) {
            continue;
        }
        backend.begin_step(&batch(rows, tokens, context))?;
        for variant in 0..variants() {
            apply_variant(variant);
            if "kda".starts_with(&prefix) {
                let ms = median(&mut backend, |backend| backend.kda_mixer(&kda, 0, &x, &mut out))?;
                println!("kda_mixer    {name:24} {ms:9.4} ms");
                let ms = median(&mut backend, |backend| backend.kda_without_products(&kda, 0))?;
                println!("kda_kernels  {name:24} {ms:9.4} ms");
                if tokens > 1 {
                    let ms = median(&mut backend, |backend| backend.kda_chunks_alone(&kda, 0))?;
                    println!("kda_chunks   {name:24} {ms:9.4} ms");
                }
            }
            if "mla".starts_with(&prefix) {
                let ms = median(&mut backend, |backend| backend.mla_project(&mla, 0, &x, &mut queries))?;
                println!("mla_project  {name:24} {ms:9.4} ms");
                let ms = median(&mut backend, |backend| backend.mla_attend(&mla, 0, &queries, &mut partials))?;
                println!("mla_attend   {name:24} {ms:9.4} ms");
                let ms = median(&mut backend, |backend| backend.mla_output(&mla, &partials, &mut out))?;
                println!("mla_output   {name:24} {ms:9.4} ms");
            }
            if "moe".starts_with(&prefix) {
                let ms = median(&mut backend, |backend| backend.moe(&moe, &x, Routing::Free, &mut out))?;
                let bits = digest(&backend.read(&out, rows * tokens)?);
                println!("moe          {name:24} {ms:9.4} ms   {bits:016x}");
            }
        }
    }
    if shape.is_empty() && "sample".starts_with(&prefix) { times_of_draws(&mut backend) } else { Ok(()) }
}

/// How many sets of thresholds are measured against each other.
#[cfg(feature = "tuning")]
fn variants() -> usize {
    perigee_cuda::variants().len()
}

/// Lets one of them apply.
#[cfg(feature = "tuning")]
fn apply_variant(index: usize) {
    perigee_cuda::choose_variant(index);
    println!("-- {}", perigee_cuda::variants()[index]);
}

#[cfg(not(feature = "tuning"))]
fn variants() -> usize {
    1
}

#[cfg(not(feature = "tuning"))]
fn apply_variant(_index: usize) {}

/// Draws from flat logits over the published vocabulary, one set of parameters for all rows.
fn times_of_draws(backend: &mut CudaBackend) -> Result<()> {
    const VOCABULARY: usize = 163_840;
    const ROWS: usize = 256;
    let mut logits = backend.tensor(ROWS, VOCABULARY, Precision::Full)?;
    let key = perigee_backend::random::tensor_key(2, "logits");
    let distribution = Distribution::Normal { deviation: 1.3 };
    let fill = RandomFill { key, distribution, first: 0, row_stride: VOCABULARY as u64 };
    backend.write(&mut logits, &fill.values(&[ROWS, VOCABULARY], DType::Fp32))?;
    let counts = TokenCounts::new();
    let plain = SamplingParams::default();
    let all = [
        ("greedy", SamplingParams::greedy()),
        ("temperature", plain.clone()),
        ("top-k 50", SamplingParams { top_k: 50, ..plain.clone() }),
        ("top-p 0.95", SamplingParams { top_p: 0.95, ..plain.clone() }),
        ("logprobs 5", SamplingParams { logprobs: Some(5), ..plain }),
    ];
    for rows in [1, 64, ROWS] {
        for (name, params) in &all {
            let draw = Draw { params, choice: 0, position: 9, counts: &counts, banned: &[], allowed: None };
            let draws = vec![draw; rows];
            let ms = median(backend, |backend| backend.sample(&logits, &draws, &mut Scratch::new()).map(drop))?;
            println!("sample       {:24} {ms:9.4} ms", format!("{rows} x {name}"));
        }
    }
    Ok(())
}
