//! Every kernel the backend launches, resolved once when it opens: for the kernels that exist in two activation types, the
//! one of the backend's type. A missing kernel is found here, not in the middle of a step.

use perigee_backend::{DType, Result};

use crate::device::Device;
use crate::module::{Kernel, Modules};
use crate::params::{
    ElementParams, GatherParams, KdaParams, LoadParams, MlaAttendParams, MlaMergeParams, MlaStoreParams,
    MoeCombineParams, MoeProductParams, MoeRouterParams, MoeSelectParams, MoeSortParams, NormParams,
};

/// The kernels of one backend. Fields are dropped in order, so the modules go last.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) load_fp32: Kernel<LoadParams>,
    pub(crate) load_bf16: Kernel<LoadParams>,
    pub(crate) rms_norm: Kernel<NormParams>,
    pub(crate) gather: Kernel<GatherParams>,
    pub(crate) convert_bf16: Kernel<ElementParams>,
    pub(crate) silu_mul: Kernel<ElementParams>,
    pub(crate) kda_recurrent: Kernel<KdaParams>,
    pub(crate) kda_conv: Kernel<KdaParams>,
    pub(crate) kda_tails: Kernel<KdaParams>,
    pub(crate) kda_gate: Kernel<KdaParams>,
    pub(crate) kda_fast: Vec<KdaFast>,
    pub(crate) mla_store: Kernel<MlaStoreParams>,
    pub(crate) mla_attend: Kernel<MlaAttendParams>,
    pub(crate) mla_merge_splits: Kernel<MlaAttendParams>,
    pub(crate) mla_merge_other: Kernel<MlaMergeParams>,
    pub(crate) moe_router: Kernel<MoeRouterParams>,
    pub(crate) moe_select: Kernel<MoeSelectParams>,
    pub(crate) moe_sort: Kernel<MoeSortParams>,
    pub(crate) moe_gate_up: Kernel<MoeProductParams>,
    pub(crate) moe_down: Kernel<MoeProductParams>,
    pub(crate) moe_combine: Kernel<MoeCombineParams>,
    _modules: Modules,
}

/// The kernels of one KDA head size: the chunked form and the fused step.
#[derive(Debug)]
pub(crate) struct KdaFast {
    pub(crate) head_dim: usize,
    pub(crate) chunk: Kernel<KdaParams>,
    pub(crate) chunk_shared: usize,
    pub(crate) scan: Kernel<KdaParams>,
    pub(crate) scan_shared: usize,
    pub(crate) decode: Kernel<KdaParams>,
}

impl KdaFast {
    fn load(modules: &Modules, suffix: &str, head_dim: usize) -> Result<Self> {
        let (element, is_bf16) = if suffix == "bf16" { (2, true) } else { (4, false) };
        // Sizes of the structures `Shared` of kda_chunk.cu and `ScanShared` of kda_scan.cu, which assert them.
        let pitch = head_dim + 16 / element;
        let tiles = 2 * 64 * pitch * element + 64 * (head_dim + 4) * 4;
        let chunk_shared = tiles + 64 * 64 * 4 + 3 * 64 * 4 + 4 * head_dim * 4;
        let stage = (3 * 64 * (head_dim + 8) + 64 * 72) * 2;
        let scan_shared = if is_bf16 { 2 * stage + (head_dim + 64) * 40 * 2 } else { 0 };
        let kernels = Self {
            head_dim,
            chunk: modules.kernel("kda_chunk", &format!("kda_chunk_{suffix}_{head_dim}"))?,
            chunk_shared,
            scan: modules.kernel("kda_scan", &format!("kda_scan_{suffix}_{head_dim}"))?,
            scan_shared,
            decode: modules.kernel("kda_decode", &format!("kda_decode_{suffix}_{head_dim}"))?,
        };
        kernels.chunk.allow_shared(chunk_shared)?;
        kernels.scan.allow_shared(scan_shared)?;
        Ok(kernels)
    }
}

impl Kernels {
    pub(crate) fn load(device: &Device, precision: DType) -> Result<Self> {
        let modules = Modules::load(device)?;
        let suffix = match precision {
            DType::Bf16 => "bf16",
            DType::Fp32 => "fp32",
        };
        let typed = |name: &str| format!("{name}_{suffix}");
        Ok(Self {
            load_fp32: modules.kernel("load", "load_rows_fp32")?,
            load_bf16: modules.kernel("load", "load_rows_bf16")?,
            rms_norm: modules.kernel("norm", &typed("rms_norm"))?,
            gather: modules.kernel("embed", &typed("gather"))?,
            convert_bf16: modules.kernel("elements", "convert_bf16")?,
            silu_mul: modules.kernel("elements", &typed("silu_mul"))?,
            kda_recurrent: modules.kernel("kda_recurrent", &typed("kda_recurrent"))?,
            kda_conv: modules.kernel("kda_conv", &typed("kda_conv"))?,
            kda_tails: modules.kernel("kda_conv", &typed("kda_tails"))?,
            kda_gate: modules.kernel("kda_conv", &typed("kda_gate"))?,
            kda_fast: [32, 64, 128].iter().map(|&dim| KdaFast::load(&modules, suffix, dim)).collect::<Result<_>>()?,
            mla_store: modules.kernel("mla_store", &typed("mla_store"))?,
            mla_attend: modules.kernel("mla_attend", &typed("mla_attend"))?,
            mla_merge_splits: modules.kernel("mla_merge", "mla_merge_splits")?,
            mla_merge_other: modules.kernel("mla_merge", "mla_merge_other")?,
            moe_router: modules.kernel("moe_router", &typed("moe_router"))?,
            moe_select: modules.kernel("moe_router", "moe_select")?,
            moe_sort: modules.kernel("moe_router", "moe_sort")?,
            moe_gate_up: modules.kernel("moe_product", &typed("moe_gate_up"))?,
            moe_down: modules.kernel("moe_product", &typed("moe_down"))?,
            moe_combine: modules.kernel("moe_router", &typed("moe_combine"))?,
            _modules: modules,
        })
    }
}
