// Inline assembly for Hopper (sm_90a): barriers in shared memory, bulk tensor copies, and products of a warpgroup whose operands
// lie in shared memory in rows of 128 bytes with the 128-byte swizzle (16-byte piece c of row r lies at piece c ^ r % 8). Tiles begin
// at multiples of 1,024 bytes. Fragment layouts are those of the PTX manual for wgmma: warp w of the warpgroup has rows 16 w ..,
// and within them accumulators lie as for mma.m16n8k16, eight columns after eight columns.
#pragma once
#include "common/mma.cuh"
#include "common/tensor_map.h"

constexpr int kWarpgroup = 128;

// A barrier that is complete when `arrivals` threads and all announced bytes have arrived.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before any other thread or the copy engine uses the barriers; a block barrier follows.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni ready;\nbra.uni again;\nready:\n}"
      ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Bytes that lie together, in multiples of 16, to shared memory; they arrive at the barrier. They are read once: the second-level cache
// gives them up before others.
__device__ __forceinline__ void copy_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once;\n}"
      ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// A box of a matrix to shared memory; its bytes arrive at the barrier. Parts beyond the matrix are zeros.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// The same to the same place of every block of the cluster whose bit is set in `blocks`, and to its barrier.
__device__ __forceinline__ void copy_box_to_all(void* to, const TensorMap* map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}
// A whole number of 16 bytes that lie together, to the same place of the blocks of the cluster whose bits are set, and to their barriers.
__device__ __forceinline__ void copy_piece_to_all(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}
// The same for this block alone.
__device__ __forceinline__ void copy_piece(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Its halves, by whole warps in turn, for orders behind which something is written that was read before: what the threads of the cluster
// read before they arrive is read when one of them leaves the wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("fence.acq_rel.cta;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Arrives at the barrier in the same place of another block of the cluster, or of this one.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}"
               ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
// The same place of another block of the cluster, or of this one, for `store_at` and `load_at`.
__device__ __forceinline__ uint32_t address_at(const void* place, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
  return there;
}
// Numbers of a block of the cluster, by `address_at`.
__device__ __forceinline__ float load_at(uint32_t place) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(place) : "memory");
  return x;
}
__device__ __forceinline__ float4 load4_at(uint32_t place) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(place) : "memory");
  return x;
}
// Four bytes to a block of the cluster; they arrive at its barrier, both by `address_at`.
__device__ __forceinline__ void store_at(uint32_t place, float x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               ::"r"(place), "r"(__float_as_uint(x)), "r"(barrier) : "memory");
}
// As `barrier_wait`, for what other blocks of the cluster stored.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done bra.uni ready;\nbra.uni again;\nready:\n}"
      ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// The first meeting of a cluster, which publishes what `barrier_init_done` fenced: all its blocks run and have their barriers.
__device__ __forceinline__ void cluster_begin() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
// What this thread wrote to shared memory by ordinary or asynchronous copies becomes visible to products.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Operand whose rows (m or n) lie 128 bytes apart, 64 numbers of the summed index k in each. For the next 16 of k add 2.
__device__ __forceinline__ uint64_t operand_by_rows(const void* tile) {
  return (shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// Operand whose summed index k goes by rows of 64 n; the next 64 n lie `block` bytes on. For the next 16 of k add 128.
__device__ __forceinline__ uint64_t operand_by_columns(const void* tile, uint32_t block) {
  return (shared_address(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(block >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// Before the first product, and when registers of sums were touched.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of sums over a wait.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64 x kColumns] = left [64 x 16] . right [16 x kColumns] + d, both operands by rows.
template <int kColumns>
__device__ __forceinline__ void product(float (&d)[kColumns / 2], uint64_t left, uint64_t right);

#define PERIGEE_S1 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PERIGEE_S2 PERIGEE_S1 "," "%8,%9,%10,%11,%12,%13,%14,%15"
#define PERIGEE_S3 PERIGEE_S2 "," "%16,%17,%18,%19,%20,%21,%22,%23"
#define PERIGEE_S4 PERIGEE_S3 "," "%24,%25,%26,%27,%28,%29,%30,%31"
#define PERIGEE_S5 PERIGEE_S4 "," "%32,%33,%34,%35,%36,%37,%38,%39"
#define PERIGEE_S6 PERIGEE_S5 "," "%40,%41,%42,%43,%44,%45,%46,%47"
#define PERIGEE_S7 PERIGEE_S6 "," "%48,%49,%50,%51,%52,%53,%54,%55"
#define PERIGEE_S8 PERIGEE_S7 "," "%56,%57,%58,%59,%60,%61,%62,%63"
#define PERIGEE_S9 PERIGEE_S8 "," "%64,%65,%66,%67,%68,%69,%70,%71"
#define PERIGEE_S10 PERIGEE_S9 "," "%72,%73,%74,%75,%76,%77,%78,%79"
#define PERIGEE_S11 PERIGEE_S10 "," "%80,%81,%82,%83,%84,%85,%86,%87"
#define PERIGEE_S12 PERIGEE_S11 "," "%88,%89,%90,%91,%92,%93,%94,%95"
#define PERIGEE_S13 PERIGEE_S12 "," "%96,%97,%98,%99,%100,%101,%102,%103"
#define PERIGEE_S14 PERIGEE_S13 "," "%104,%105,%106,%107,%108,%109,%110,%111"
#define PERIGEE_S15 PERIGEE_S14 "," "%112,%113,%114,%115,%116,%117,%118,%119"
#define PERIGEE_S16 PERIGEE_S15 "," "%120,%121,%122,%123,%124,%125,%126,%127"
#define PERIGEE_D1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PERIGEE_D2 PERIGEE_D1, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PERIGEE_D3 PERIGEE_D2, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PERIGEE_D4 PERIGEE_D3, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PERIGEE_D5 PERIGEE_D4, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PERIGEE_D6 PERIGEE_D5, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PERIGEE_D7 PERIGEE_D6, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PERIGEE_D8 PERIGEE_D7, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PERIGEE_D9 PERIGEE_D8, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PERIGEE_D10 PERIGEE_D9, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PERIGEE_D11 PERIGEE_D10, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PERIGEE_D12 PERIGEE_D11, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PERIGEE_D13 PERIGEE_D12, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PERIGEE_D14 PERIGEE_D13, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PERIGEE_D15 PERIGEE_D14, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PERIGEE_D16 PERIGEE_D15, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define PERIGEE_PRODUCT(columns, list, sums, left_operand, right_operand)                                                  \
  template <>                                                                                                              \
  __device__ __forceinline__ void product<columns>(float (&d)[columns / 2], uint64_t left, uint64_t right) {               \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" list "}, " left_operand ", "           \
                 right_operand ", add, 1, 1, 0, 0;\n}"                                                                        \
                 : sums : "l"(left), "l"(right));                                                                          \
  }
PERIGEE_PRODUCT(16, PERIGEE_S1, PERIGEE_D1, "%8", "%9")
PERIGEE_PRODUCT(32, PERIGEE_S2, PERIGEE_D2, "%16", "%17")
PERIGEE_PRODUCT(48, PERIGEE_S3, PERIGEE_D3, "%24", "%25")
PERIGEE_PRODUCT(64, PERIGEE_S4, PERIGEE_D4, "%32", "%33")
PERIGEE_PRODUCT(80, PERIGEE_S5, PERIGEE_D5, "%40", "%41")
PERIGEE_PRODUCT(96, PERIGEE_S6, PERIGEE_D6, "%48", "%49")
PERIGEE_PRODUCT(112, PERIGEE_S7, PERIGEE_D7, "%56", "%57")
PERIGEE_PRODUCT(128, PERIGEE_S8, PERIGEE_D8, "%64", "%65")
PERIGEE_PRODUCT(144, PERIGEE_S9, PERIGEE_D9, "%72", "%73")
PERIGEE_PRODUCT(160, PERIGEE_S10, PERIGEE_D10, "%80", "%81")
PERIGEE_PRODUCT(176, PERIGEE_S11, PERIGEE_D11, "%88", "%89")
PERIGEE_PRODUCT(192, PERIGEE_S12, PERIGEE_D12, "%96", "%97")
PERIGEE_PRODUCT(208, PERIGEE_S13, PERIGEE_D13, "%104", "%105")
PERIGEE_PRODUCT(224, PERIGEE_S14, PERIGEE_D14, "%112", "%113")
PERIGEE_PRODUCT(240, PERIGEE_S15, PERIGEE_D15, "%120", "%121")
PERIGEE_PRODUCT(256, PERIGEE_S16, PERIGEE_D16, "%128", "%129")

// d [64 x 128] += left [64 x 16] . right [16 x 128] with left in registers and right by columns.
__device__ __forceinline__ void product_columns(float (&d)[64], const FragmentA& left, uint64_t right) {
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PERIGEE_S8 "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n}"
               : PERIGEE_D8
               : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "l"(right));
}

// d [64 x 32] = left [64 x 16] . right [16 x 32] + d with left by columns and right by rows.
__device__ __forceinline__ void product_transposed(float (&d)[16], uint64_t left, uint64_t right) {
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" PERIGEE_S2 "}, %16, %17, add, 1, 1, 1, 0;\n}"
               : PERIGEE_D2
               : "l"(left), "l"(right));
}

// Four 8 x 8 blocks of fragments to shared memory, transposed: lane i gives the address of row i % 8 of the transpose of block i / 8.
__device__ __forceinline__ void store_blocks_transposed(void* row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared_address(row)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
