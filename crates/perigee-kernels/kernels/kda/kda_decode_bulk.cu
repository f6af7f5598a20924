// kda_decode for many rows, where the kernel is bound by reading and writing states: a head's 64 KB come to shared memory and go
// back by the copy engine in one piece each, so that three blocks a multiprocessor have theirs under way. See README.md.
#include "common/mma.cuh"
#include "kda/decode.cuh"

template <class T, int kDim>
__device__ __forceinline__ void decode(const KdaParams& p) {
  using Share = StateShare<kDim>;
  constexpr uint32_t kBytes = kDim * kDim * 4;
  extern __shared__ uint4 dynamic[];  // the state, [key][value] float32
  __shared__ DecodeShared<kDim> s;
  __shared__ alignas(8) uint64_t arrived;
  grid_trigger();
  // Rows come with the step's plan, and state and tails are this kernel's alone: none of them waits for the kernel ahead.
  const uint32_t head = blockIdx.x;
  const KdaRow row = p.rows[blockIdx.y];
  // A row that only pads the step to a recorded size has no slots.
  if (row.tokens == 0) {
    grid_wait();
    return;
  }
  const uint32_t barrier = shared_address(&arrived), whole = shared_address(dynamic);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(kBytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(whole),
                 "l"(p.state + state_offset(p, row.read_slot, head)), "r"(kBytes), "r"(barrier)
                 : "memory");
  }
  // Its barriers also make the one above known to all.
  const Factors factors = prepare<T, kDim, Fault::kNone>(p, row, head, s);
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier)
      : "memory");
  float* mine = reinterpret_cast<float*>(dynamic) + Share::first_row() * kDim + Share::column();
  float4 read = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int r = 0; r < Share::kRows; r++) {
    const uint32_t c = Share::first_row() + r * Share::kStep;
    const float d = s.decay[c], k = s.key[c] * factors.key;
    const float4 state = *reinterpret_cast<const float4*>(mine + r * Share::kStep * kDim);
    read.x += k * (state.x * d);
    read.y += k * (state.y * d);
    read.z += k * (state.z * d);
    read.w += k * (state.w * d);
  }
  gather(read, s);
  const float4 delta = correction(factors.strength, s);
  float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int r = 0; r < Share::kRows; r++) {
    const uint32_t c = Share::first_row() + r * Share::kStep;
    const float d = s.decay[c], k = s.key[c] * factors.key, q = s.query[c] * factors.query;
    float4* at = reinterpret_cast<float4*>(mine + r * Share::kStep * kDim);
    const float4 state = {at->x * d + k * delta.x, at->y * d + k * delta.y, at->z * d + k * delta.z, at->w * d + k * delta.w};
    *at = state;
    out.x += q * state.x;
    out.y += q * state.y;
    out.z += q * state.z;
    out.w += q * state.w;
  }
  // The copy engine sees what the block's threads wrote behind this and the barrier in `gather`.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  gather(out, s);
  if (threadIdx.x == 0) {
    float* target = p.state + state_offset(p, row.write_slot, head);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(whole), "r"(kBytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  finish<T>(p, row, head, s);
  // The block's memory is needed until it is read.
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(kThreads, 3) kda_decode_bulk_fp32_128(const __grid_constant__ KdaParams p) { decode<float, 128>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 3) kda_decode_bulk_bf16_128(const __grid_constant__ KdaParams p) { decode<bf16, 128>(p); }
