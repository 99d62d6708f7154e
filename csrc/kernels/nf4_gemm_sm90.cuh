// Parts of the NF4 product on Hopper's tensor cores: decoding, and sums over a cluster of thread blocks.
#pragma once

#include <atomic>

#include "cuda_common.cuh"
#include "wgmma_rs_sm90.cuh"

namespace moka::cuda {

constexpr int kMaxCluster = 8;

// What a mixture adds to y: [r, tokens, N], of the kernel in front. A token of a negative adapter has none.
struct Shares {
  const float* values;
  int r;
  const int32_t* adapter;  // [tokens], or null

  // Rows n to n + 3 of a token.
  __device__ __forceinline__ void add(float (&v)[4], int tokens, int64_t N, int token, int64_t n) const {
    if (adapter && __ldcg(adapter + token) < 0) return;
    const float* from = values + token * N + n;
#pragma unroll 5
    for (int i = 0; i < r; ++i, from += tokens * N) {
      const float4 share = __ldcg(reinterpret_cast<const float4*>(from));
      v[0] += share.x, v[1] += share.y, v[2] += share.z, v[3] += share.w;
    }
  }
};
constexpr int kCopies = 16;  // of the table of pairs: one per pair of banks
constexpr int kTableBytes = 256 * kCopies * 8;

#ifdef MOKA_SM90

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without a claim on what was stored before: after a thread's reads of other ranks, before it ends.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ float4 load_from_rank(uint32_t address, int rank) {
  float4 v;
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(remote)
               : "memory");
  return v;
}

// Bring something nearer without a claim on its contents.
__device__ __forceinline__ void prefetch_box(const void* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void prefetch_line(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
  return pack_bf16(first, second);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
  return v;
}

// Entry `byte` of the table is the pair of NF4 values that it codes; for THREADS threads of whole warps.
template <int THREADS>
__device__ __forceinline__ void fill_table(float4* table, int thread) {
  const float mine = kNf4[thread & 15];  // by shuffles, as the compiler would repeat a slow divergent load at every use
  for (int byte = thread; byte < 256; byte += THREADS) {
    const float high = __shfl_sync(~0u, mine, byte >> 4), low = __shfl_sync(~0u, mine, byte & 15);
#pragma unroll
    for (int j = 0; j < kCopies / 2; ++j)  // rotated by thread, against bank conflicts
      table[byte * (kCopies / 2) + (j + byte) % (kCopies / 2)] = make_float4(high, low, high, low);
  }
}

// The table's entry at a shared-memory address.
__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 v;
  asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

// The accumulators of a warpgroup's 64 rows to sums [tokens][pitch].
template <int TOKENS>
__device__ __forceinline__ void store_sums(const float (&d)[TOKENS / 2], float* sums, int pitch) {
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i)
    sums[(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * pitch + row + i / 2 % 2 * 8] = d[i];
}

// y = the sums over ranks, and over PARTS in each rank, plus bias and the mixture's shares, by THREADS threads. A rank
// takes every ranks-th token, a thread four rows at a time.
template <int TOKENS, int ROWS, int PARTS, int THREADS, typename T>
__device__ void reduce_sums(const float* sums, int tokens, int64_t N, int64_t n0, const void* bias,
                            const Shares& shares, void* y) {
  constexpr int kPitch = ROWS + 4, kAcross = ROWS / 4, kBatch = 8 / PARTS;
  const int rank = blockIdx.x, ranks = gridDim.x, row = threadIdx.x % kAcross * 4;
  const int64_t n = n0 + row, first = static_cast<int64_t>(blockIdx.z) * TOKENS;
  const int end = tokens - first < TOKENS ? static_cast<int>(tokens - first) : TOKENS;
  if (n >= N) return;
  float b[4] = {};
  if (bias) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = to_float(static_cast<const T*>(bias)[n + i]);
  }
  for (int t = rank + threadIdx.x / kAcross * ranks; t < end; t += THREADS / kAcross * ranks) {
    float v[4] = {};
    if (shares.r) shares.add(v, tokens, N, static_cast<int>(first) + t, n);
    for (int r = 0; r < ranks; r += kBatch) {
      float4 part[kBatch][PARTS];
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
          if (r + j < ranks) part[j][i] = load_from_rank(shared_address(sums + (i * TOKENS + t) * kPitch + row), r + j);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
          if (r + j < ranks) v[0] += part[j][i].x, v[1] += part[j][i].y, v[2] += part[j][i].z, v[3] += part[j][i].w;
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(y) + (first + t) * N + n) =
        make_uint2(pack<T>(v[0] + b[0], v[1] + b[1]), pack<T>(v[2] + b[2], v[3] + b[3]));
  }
}

#endif  // MOKA_SM90

// A launch of clusters of `ranks` thread blocks, which differ in blockIdx.x. It may start before the kernel in front of
// it has ended, for whose results it has to wait.
struct ClusterLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  ClusterLaunch(int ranks, int64_t row_tiles, int64_t token_tiles, int threads, int bytes, cudaStream_t stream) {
    config.gridDim = dim3(ranks, static_cast<unsigned>(row_tiles), static_cast<unsigned>(token_tiles));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = ranks;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// How many clusters of `ranks` thread blocks of a kernel run at once. KERNEL is a tag that makes the memory its own.
template <auto* KERNEL>
int resident_clusters(int ranks, int threads, int bytes) {
  constexpr int kDevices = 16;
  static std::atomic<int> known[kDevices][kMaxCluster + 1];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices && known[device][ranks]) return known[device][ranks];
  ClusterLaunch launch(ranks, 1, 1, threads, bytes, nullptr);
  int count = 0;
  if (cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, KERNEL, &launch.config) != cudaSuccess)
    return 0;
  if (device < kDevices) known[device][ranks] = count;
  return count;
}

// The cluster size, a power of two, that takes the least time for `tiles` tiles of `work` units each: rounds of
// resident clusters, each of kRoundTime and `unit_time` for its share of the work (microseconds on an H200). 0: none
// runs.
constexpr double kRoundTime = 6;
struct Cluster {
  int ranks = 0;
  double time = 1e30;
};
template <auto* KERNEL>
Cluster choose_cluster(int64_t tiles, int work, double unit_time, int threads, int bytes) {
  Cluster best;
  for (int ranks = 1; ranks <= kMaxCluster && ranks <= work; ranks *= 2) {
    const int resident = resident_clusters<KERNEL>(ranks, threads, bytes);
    if (resident == 0) break;
    const double time = ceil_div(tiles, resident) * (kRoundTime + ceil_div(work, ranks) * unit_time);
    if (time < best.time) best = {ranks, time};
  }
  return best;
}

}  // namespace moka::cuda
