// The norm of a few rows of the residual stream by every block that reads them, so that no kernel of its own is needed for it. Sums run
// as in `rms_norm`: over pieces of 128 numbers, then over pieces.
#pragma once
#include "common/common.cuh"
#include "norm/params.h"

constexpr int kNormedThreads = 256;
constexpr int kMostNormed = 2560;  // numbers of a row

// Up to kRows rows; T is the type of what is added to them and of the result.
template <class T, int kRows>
struct Normed {
  static constexpr int kWarps = kNormedThreads / kWarp;
  static constexpr int kPiece = 4 * kWarp;
  static constexpr int kShare = (kMostNormed / kPiece + kWarps - 1) / kWarps;  // pieces of a warp
  Quad weight[kShare];

  // Where the thread's numbers of its piece r lie in a row.
  __device__ __forceinline__ static uint32_t place(int r) { return (threadIdx.x / kWarp + r * kWarps) * kPiece + threadIdx.x % kWarp * 4; }

  // Asks for the weight, which nothing writes.
  __device__ __forceinline__ void begin(const NormParams& p) {
#pragma unroll
    for (int r = 0; r < kShare; r++) weight[r] = place(r) < p.width ? read4(p.weight + place(r)) : Quad{};
  }

  // The whole block: rows `first` .. `first + count`, their delta added, normed to shared memory, behind a barrier.
  __device__ __forceinline__ void run(const NormParams& p, uint32_t first, uint32_t count, T (*normed)[kMostNormed]) const {
    __shared__ float sums[kRows][kWarp];
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Quad x[kRows][kShare] = {};
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      if (t >= count) break;
      const float* residual = static_cast<const float*>(p.residual) + static_cast<uint64_t>(first + t) * p.residual_pitch;
      const T* delta = static_cast<const T*>(p.delta) + static_cast<uint64_t>(first + t) * p.width;
#pragma unroll
      for (int r = 0; r < kShare; r++) {
        if (place(r) >= p.width) continue;
        x[t][r] = read4(residual + place(r));
        const Quad d = read4(delta + place(r));
#pragma unroll
        for (int e = 0; e < 4; e++) x[t][r].x[e] += d.x[e];
      }
    }
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      if (t >= count) break;
#pragma unroll
      for (int r = 0; r < kShare; r++) {
        float squares = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; e++) squares += x[t][r].x[e] * x[t][r].x[e];
        squares = warp_sum(squares);
        if (lane == 0) sums[t][warp + r * kWarps] = squares;
      }
    }
    __syncthreads();
    const uint32_t pieces = (p.width + kPiece - 1) / kPiece;
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      if (t >= count) break;
      const float mean = warp_sum(lane < pieces ? sums[t][lane] : 0.0f) / static_cast<float>(p.width);
      const float scale = 1.0f / sqrtf(mean + p.eps);
#pragma unroll
      for (int r = 0; r < kShare; r++) {
        if (place(r) >= p.width) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) x[t][r].x[e] = x[t][r].x[e] * scale * weight[r].x[e];
        write4(&normed[t][place(r)], x[t][r]);
      }
    }
    __syncthreads();
  }

  // By one block of those with these rows: the result to memory.
  __device__ __forceinline__ void store(const NormParams& p, uint32_t first, uint32_t count, const T (*normed)[kMostNormed]) const {
    for (uint32_t t = 0; t < count; t++) {
#pragma unroll
      for (int r = 0; r < kShare; r++) {
        if (place(r) >= p.width) continue;
        write4(static_cast<T*>(p.out) + static_cast<uint64_t>(first + t) * p.out_pitch + place(r), read4(&normed[t][place(r)]));
      }
    }
  }
};

// The sum with the delta to the rows first .. end of the stream where it is to lie, by some of a block's threads. Where it lies in place,
// every block has read it.
template <class T>
__device__ __forceinline__ void add_to_stream(const NormParams& p, uint32_t first, uint32_t end, uint32_t thread, uint32_t threads) {
  for (uint32_t row = first; row < end; row++) {
    const float* from = static_cast<const float*>(p.residual) + static_cast<uint64_t>(row) * p.residual_pitch;
    float* to = static_cast<float*>(p.sum) + static_cast<uint64_t>(row) * p.residual_pitch;
    const T* delta = static_cast<const T*>(p.delta) + static_cast<uint64_t>(row) * p.width;
    for (uint32_t i = thread * 4; i < p.width; i += threads * 4) {
      Quad x = read4(from + i);
      const Quad d = read4(delta + i);
#pragma unroll
      for (int e = 0; e < 4; e++) x.x[e] += d.x[e];
      write4(to + i, x);
    }
  }
}
