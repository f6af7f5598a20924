// A matrix of weights times few tokens, bound by reading the weights. Weights are the row operand of the tensor cores and go from
// device memory straight to the registers of the one warp that needs them; tokens (8 to 64) are the column operand and are shared
// through shared memory. See README.md.
#pragma once
#include "common/mma.cuh"

constexpr int kSkinnyThreads = 256;
constexpr int kSkinnyDepth = 64;  // of a step: 16 weight rows of it are 2 KB, four 16-byte reads a lane

// 16 bytes of a weight; unchanged where not valid.
__device__ __forceinline__ void read_weight(uint4& to, const bf16* p, bool valid) {
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.u32 valid, %5, 0;\n"
      "@valid ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(p), "r"(static_cast<uint32_t>(valid)));
}

// 16 bytes of shared memory, in the program's order: read early for many tiles they would take too many registers.
__device__ __forceinline__ uint4 read_shared(const bf16* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(p)));
  return v;
}

// kTokens by 16 kRowWarps weight rows a block; kDepthWarps warps share the depth of the same rows, step by step in turn. kAhead
// steps of each warp are under way.
template <int kTokens, int kRowWarps, int kBuffers, int kAhead>
struct Skinny {
  static constexpr int kDepthWarps = kSkinnyThreads / kWarp / kRowWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kChunk = kSkinnyDepth * kAhead * kDepthWarps;  // depth of the tokens' buffers
  // 64 bytes beyond a multiple of 128: eight rows read by four lanes each meet every bank as often.
  static constexpr int kPitch = kChunk + 32;
  static constexpr int kTiles = kTokens / 8;
  using Buffer = bf16[kTokens][kPitch];
  static constexpr int kShared = kBuffers * static_cast<int>(sizeof(Buffer));
  // Sums of the depth's other warps.
  static_assert(kDepthWarps == 1 || (kDepthWarps - 1) * kRowWarps * kTiles * 512 <= kShared, "room for the sums");

  uint4 weights[kAhead][4];
  const bf16* row;    // of weights: row lane / 4 of the warp's 16, at this lane's and this warp's place in the depth
  uint32_t depth;
  uint32_t at;        // where the next step to be read begins, this warp's place included

  __device__ __forceinline__ static int row_warp() { return threadIdx.x / kWarp % kRowWarps; }
  __device__ __forceinline__ static int depth_warp() { return threadIdx.x / kWarp / kRowWarps; }

  // Beyond the depth what was read before stays, for tokens that are zero there.
  __device__ __forceinline__ void read(uint4 (&to)[4]) {
    const bf16* low = row + at;
    const bf16* high = low + 8 * static_cast<uint64_t>(depth);
    const bool valid = at < depth;
    read_weight(to[0], low, valid);
    read_weight(to[1], low + 32, valid);
    read_weight(to[2], high, valid);
    read_weight(to[3], high + 32, valid);
    at += kSkinnyDepth * kDepthWarps;
  }

  // Asks for the first steps of the block's weights, [16 kRowWarps][depth] from `first`; needs no token.
  __device__ __forceinline__ void begin(const bf16* first, uint32_t whole_depth) {
    const int lane = threadIdx.x % kWarp;
    depth = whole_depth;
    row = first + static_cast<uint64_t>(row_warp() * 16 + lane / 4) * depth + lane % 4 * 8;
    at = depth_warp() * kSkinnyDepth;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      weights[i][0] = weights[i][1] = weights[i][2] = weights[i][3] = make_uint4(0, 0, 0, 0);
      read(weights[i]);
    }
  }

  // sum[n] of the warp's 16 weight rows by tokens 8 n .. 8 n + 7, in its part of the depth. `token(i)` is where token i lies, or
  // null for none.
  template <class Token>
  __device__ __forceinline__ void run(Buffer* buffers, Accumulator (&sum)[kTiles], Token token) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    constexpr int kPieces = kChunk / 8;
    const uint32_t chunks = (depth + kChunk - 1) / kChunk;
    auto fetch = [&](uint32_t chunk) {
      if (chunk < chunks) {
#pragma unroll 1
        for (int piece = threadIdx.x; piece < kTokens * kPieces; piece += kSkinnyThreads) {
          const int which = piece / kPieces, column = piece % kPieces * 8;
          const bf16* from = token(which);
          const uint32_t place = chunk * kChunk + column;
          const bool valid = from != nullptr && place < depth;
          copy_async(&buffers[chunk % kBuffers][which][column], valid ? from + place : row, valid);
        }
      }
      copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kBuffers - 1; i++) fetch(i);
#pragma unroll 1
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
      copy_wait<kBuffers - 2>();
      // Also: every warp is done with the buffer that is filled next.
      __syncthreads();
      fetch(chunk + kBuffers - 1);
      const bf16* x = &buffers[chunk % kBuffers][g][depth_warp() * kSkinnyDepth + t * 8];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          // A lane's eight consecutive numbers stand where two products want four pairs: the same order of the depth on both sides.
          const uint4 low = weights[i][half], high = weights[i][2 + half];
          constexpr int kGroup = kTiles < 2 ? 1 : 2;
#pragma unroll
          for (int first = 0; first < kTiles; first += kGroup) {
            uint4 v[kGroup];
#pragma unroll
            for (int n = 0; n < kGroup; n++) v[n] = read_shared(x + (first + n) * 8 * kPitch + i * kSkinnyDepth * kDepthWarps + half * 32);
#pragma unroll
            for (int n = 0; n < kGroup; n++) {
              mma(sum[first + n], {{low.x, high.x, low.y, high.y}}, {{v[n].x, v[n].y}});
              mma(sum[first + n], {{low.z, high.z, low.w, high.w}}, {{v[n].z, v[n].w}});
            }
          }
        }
        read(weights[i]);
      }
    }
  }

  // Adds what the depth's other warps summed, in their order; the result is with those of the first.
  __device__ __forceinline__ void gather(Buffer* buffers, Accumulator (&sum)[kTiles]) {
    if constexpr (kDepthWarps > 1) {
      const int lane = threadIdx.x % kWarp;
      auto* parts = reinterpret_cast<float4*>(buffers);
      __syncthreads();
      if (depth_warp() > 0) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          parts[((depth_warp() - 1) * kRowWarps + row_warp()) * kTiles * kWarp + n * kWarp + lane] =
              make_float4(sum[n].x[0], sum[n].x[1], sum[n].x[2], sum[n].x[3]);
        }
      }
      __syncthreads();
      if (depth_warp() == 0) {
#pragma unroll
        for (int other = 0; other < kDepthWarps - 1; other++) {
#pragma unroll
          for (int n = 0; n < kTiles; n++) {
            const float4 part = parts[(other * kRowWarps + row_warp()) * kTiles * kWarp + n * kWarp + lane];
            sum[n].x[0] += part.x;
            sum[n].x[1] += part.y;
            sum[n].x[2] += part.z;
            sum[n].x[3] += part.w;
          }
        }
      }
    }
  }
};
