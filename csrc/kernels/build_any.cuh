// The build kernel for any shapes and alignments: a thread goes down a column of W, or four neighbouring ones.
//
// Where in A_i and B_i a column lies is worked out once for sixteen rows. Down the rows, B_i's goes on by a row at a
// time, and A_i's stays for mb of them; both loads are side by side for the threads of a warp.
#pragma once

#include "build_base.cuh"

namespace moka::cuda {

constexpr int kAnyRows = 16;                                            // of a thread at a time
constexpr int any_blocks(int columns) { return columns == 4 ? 2 : 3; }  // per multiprocessor, by their registers

// Neighbouring entries, in one access.
template <int kColumns, typename T>
struct alignas(kColumns * sizeof(T)) Vector {
  T t[kColumns];
};

template <int kColumns, typename T>
__device__ __forceinline__ void load_columns(const T* from, float (&v)[kColumns]) {
  const auto x = *reinterpret_cast<const Vector<kColumns, T>*>(from);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) v[i] = to_float(x.t[i]);
}

template <int kColumns, typename T>
__device__ __forceinline__ void store_columns(T* to, const float (&v)[kColumns]) {
  Vector<kColumns, T> x;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x.t[i] = from_acc<T>(v[i]);
  *reinterpret_cast<Vector<kColumns, T>*>(to) = x;
}

// v [kAnyRows, kColumns] += alpha A kron B of one component, from row n0 and column k on. kTall: mb is at least
// kAnyRows, so that these rows lie in two of A's. No branch keeps the loads of a row from running ahead; rows beyond
// the last are those of A's last one once more, and are not stored.
template <Identity kIdentity, bool kTall, int kColumns, typename TF>
__device__ __forceinline__ void add_component(const Factors<TF>& f, const Component& c, float alpha, int n0, int k,
                                              float (&v)[kAnyRows][kColumns]) {
  const int ja = k / c.nb, jb = k - ja * c.nb, first = n0 / c.mb, ib0 = n0 - first * c.mb;
  const auto factor = [&](int ia) {
    ia = ia < c.ma ? ia : c.ma - 1;
    if (kIdentity == Identity::kA) return alpha * float(ia == ja);
    return alpha * to_float(__ldg(f.A + (c.a_offset + ia * c.na + ja)));
  };
  const auto add = [&](float (&sum)[kColumns], float a, int ib) {
    float b[kColumns];
    if (kIdentity == Identity::kB) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) b[i] = float(ib == jb + i);
    } else {
      load_columns<kColumns>(f.B + (c.b_offset + ib * c.nb + jb), b);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = fmaf(a, b[i], sum[i]);
  };
  if (kTall) {
    const float a = factor(first), then = factor(first + 1);
#pragma unroll
    for (int r = 0; r < kAnyRows; ++r) {
      const bool over = ib0 + r >= c.mb;
      add(v[r], over ? then : a, ib0 + r - (over ? c.mb : 0));
    }
  } else {
    int ia = first, ib = ib0;
#pragma unroll
    for (int r = 0; r < kAnyRows; ++r) {
      add(v[r], factor(ia), ib);
      const bool over = ++ib == c.mb;
      ia += over, ib = over ? 0 : ib;
    }
  }
}

// Of a base of any blocksizes: rare, and long enough that sixteen rows of it would be most of the kernel.
template <class Base>
__device__ __noinline__ float entry(const Base& base, int64_t e) {
  return base.at(e);
}

// vector: the base has what its add_columns needs. Grid: columns, then as many thread blocks as share the rows.
template <typename T, typename TF, int kColumns, class Base>
__global__ void __launch_bounds__(kBuildThreads, any_blocks(kColumns))
    build_any_kernel(Base base, Factors<TF> f, const __grid_constant__ Components comps, int N, int K, bool vector,
                     T* out) {
  extern __shared__ __align__(16) uint8_t table[];
  base.fill(table);
  wait_for_previous();
  __syncthreads();
  const int k = (blockIdx.x * kBuildThreads + threadIdx.x) * kColumns;
  if (k >= K) return;
  for (int n0 = blockIdx.y * kAnyRows; n0 < N; n0 += gridDim.y * kAnyRows) {
    float v[kAnyRows][kColumns] = {};
    for (int i = 0; i < comps.r; ++i) {
      const Component& c = comps.c[i];
      const float alpha = f.alpha[i];
      if (c.identity == Identity::kA)
        add_component<Identity::kA, false>(f, c, alpha, n0, k, v);
      else if (c.identity == Identity::kB)
        add_component<Identity::kB, false>(f, c, alpha, n0, k, v);
      else if (c.mb < kAnyRows)
        add_component<Identity::kNone, false>(f, c, alpha, n0, k, v);
      else
        add_component<Identity::kNone, true>(f, c, alpha, n0, k, v);
    }
#pragma unroll
    for (int r = 0; r < kAnyRows; ++r) {
      if (n0 + r >= N) break;
      const int64_t e = static_cast<int64_t>(n0 + r) * K + k;
      if (vector) {
        base.add_columns(e, table, v[r]);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) v[r][i] += entry(base, e + i);
      }
      store_columns(out + e, v[r]);
    }
  }
}

}  // namespace moka::cuda
