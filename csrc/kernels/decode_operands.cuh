// What the few-token kernel of a mixture multiplies: loads of factors and x, of any alignment or by vectors, in tf32.
#pragma once

#include "cuda_common.cuh"

namespace moka::cuda {

// Four consecutive factor entries.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <typename T>
__device__ __forceinline__ float4 load4(const T* p) {
  union {
    uint2 u;
    T t[4];
  } x;
  x.u = *reinterpret_cast<const uint2*>(p);
  return make_float4(to_float(x.t[0]), to_float(x.t[1]), to_float(x.t[2]), to_float(x.t[3]));
}

__device__ __forceinline__ uint32_t tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// d += a b for 16 rows, 16 terms and 8 columns. A lane holds four neighbouring terms of rows g and g + 8 of a, and
// of column g of b; which terms those are, the product need not know.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint4& low, const uint4& high, const uint4& b) {
  const auto step = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  };
  step(low.x, high.x, low.y, high.y, b.x, b.y);
  step(low.z, high.z, low.w, high.w, b.z, b.w);
}
__device__ __forceinline__ uint4 tf32(float4 v) { return make_uint4(tf32(v.x), tf32(v.y), tf32(v.z), tf32(v.w)); }

// The first `count` of four entries, of any alignment; zeros for the others.
template <typename T>
__device__ __forceinline__ float4 load_some(const T* p, int count) {
  return make_float4(count > 0 ? to_float(p[0]) : 0.f, count > 1 ? to_float(p[1]) : 0.f,
                     count > 2 ? to_float(p[2]) : 0.f, count > 3 ? to_float(p[3]) : 0.f);
}

// Four neighbouring terms of two rows of a factor that are eight apart, the first `count` of them.
template <bool kVector>
struct Rows {
  float4 low, high;

  template <typename TF>
  __device__ __forceinline__ void load(const TF* row, int64_t eight_rows, bool low_here, bool high_here, int count) {
    if (kVector) {
      low = high = make_float4(0.f, 0.f, 0.f, 0.f);
      if (low_here) low = load4(row);
      if (high_here) high = load4(row + eight_rows);
    } else {
      low = load_some(row, low_here ? count : 0);
      high = load_some(row + eight_rows, high_here ? count : 0);
    }
  }
};

// Four entries to shared memory, the first `count` of them if they are here, and zeros.
template <bool kVector, typename T>
__device__ __forceinline__ void copy4_async(T* to, const T* from, bool here, int count) {
  if (!kVector) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = here && i < count ? from[i] : from_acc<T>(0.f);
    return;
  }
  constexpr int kBytes = 4 * sizeof(T);
  const uint32_t at = shared_address(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes), "r"(here ? kBytes : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two neighbouring columns of X, four terms each: with A first, or one by one, four pairs of columns, else of terms.
template <typename T>
struct Columns {
  uint32_t pair[4];

  __device__ __forceinline__ void load(const T* x, const int64_t (&step)[3], bool here) {
    pair[0] = here ? *reinterpret_cast<const uint32_t*>(x) : 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) pair[i] = here ? *reinterpret_cast<const uint32_t*>(x + step[i - 1]) : 0;
  }
  // One by one, as far as there are so many.
  __device__ __forceinline__ void load(const T* x, int term_step, int column_step, int terms, int columns) {
    const auto* bits = reinterpret_cast<const uint16_t*>(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = i < terms && columns > 0 ? bits[i * term_step] : 0;
      const uint32_t high = i < terms && columns > 1 ? bits[i * term_step + column_step] : 0;
      pair[i] = low | high << 16;
    }
  }
  // Column 0 or 1 in tf32, which holds a T exactly.
  __device__ __forceinline__ uint4 column(bool a_first, int which) const {
    const uint32_t select = which ? 0x7632 : 0x5410;  // of two words, the upper halves or the lower ones
    const uint32_t first = a_first ? __byte_perm(pair[0], pair[1], select) : pair[2 * which];
    const uint32_t second = a_first ? __byte_perm(pair[2], pair[3], select) : pair[2 * which + 1];
    const auto bits = [](uint32_t two, int i) {
      const uint16_t half = static_cast<uint16_t>(two >> 16 * i);
      return __float_as_uint(to_float(*reinterpret_cast<const T*>(&half)));
    };
    return make_uint4(bits(first, 0), bits(first, 1), bits(second, 0), bits(second, 1));
  }
};

}  // namespace moka::cuda
