// Inline assembly of the tensor-core kernels: matrix products of bfloat16 fragments, fragment loads from shared memory, and
// asynchronous copies into it. Fragment layouts are those of the PTX manual for mma.m16n8k16: with g = lane / 4 and
// t = lane % 4, accumulators are (row g, columns 2t, 2t + 1) and (row g + 8, the same columns).
#pragma once
#include "common/common.cuh"

// A 16 x 16, four registers of two elements.
struct FragmentA {
  uint32_t x[4];
};
// B 16 x 8.
struct FragmentB {
  uint32_t x[2];
};
// C 16 x 8 in float32.
struct Accumulator {
  float x[4];
};

__device__ __forceinline__ void mma(Accumulator& c, const FragmentA& a, const FragmentB& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 blocks; lane i gives the address of row i % 8 of block i / 8.
__device__ __forceinline__ void load_blocks(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// A fragment of a row-major matrix whose top left element is at `origin`.
__device__ __forceinline__ FragmentA load_a(const bf16* origin, int pitch, int lane) {
  FragmentA a;
  load_blocks(a.x, origin + (lane % 16) * pitch + lane / 16 * 8);
  return a;
}
// A fragment of the transpose of a row-major matrix: element (m, k) is origin[k * pitch + m].
__device__ __forceinline__ FragmentA load_a_transposed(const bf16* origin, int pitch, int lane) {
  FragmentA a;
  load_blocks_transposed(a.x, origin + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  return a;
}
// Two B fragments, columns 0-7 and 8-15, where element (k, n) is origin[k * pitch + n].
__device__ __forceinline__ void load_b_pair(FragmentB (&b)[2], const bf16* origin, int pitch, int lane) {
  uint32_t x[4];
  load_blocks_transposed(x, origin + (lane % 16) * pitch + lane / 16 * 8);
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}
// Two B fragments where element (k, n) is origin[n * pitch + k], as weights and keys are stored.
__device__ __forceinline__ void load_b_pair_transposed(FragmentB (&b)[2], const bf16* origin, int pitch, int lane) {
  uint32_t x[4];
  load_blocks(x, origin + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes from device to shared memory without waiting; with `valid` false, zeros and no read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
