// What the CUDA kernels share: conversions, the NF4 code book, block scales, components by value.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "nf4_codebook.h"
#include "params.h"

namespace moka::cuda {

constexpr int kMaxComponents = 64;  // they travel as kernel arguments, at most 4 KB

struct Component {
  int ma, na, mb, nb;
  Identity identity;
  int a_offset, b_offset;
  int a_row_step, a_column_step;  // in A, when a row advances by one period, or a column; periodic kernels only
};

struct Components {
  int r;
  Component c[kMaxComponents];
};

// The flat factors in fp32 (or fp64 beside fp64) or in the activations' dtype, and scale times gate.
template <typename TF>
struct Factors {
  const TF* A;
  const TF* B;
  const float* alpha;
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Spelled out, because torch's build turns the implicit conversions of the 16-bit types off.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(double v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_acc(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two numbers rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

static __constant__ float kNf4[16] = {MOKA_NF4_CODE};

// Undoes double quantization with two roundings, as bitsandbytes does.
__device__ __forceinline__ float block_scale(const Nf4Params& w, int64_t block) {
  if (w.absmax) return __ldg(w.absmax + block);
  const float scale = __ldg(w.code2 + __ldg(w.absmax_q + block));
  return __fadd_rn(__fmul_rn(scale, __ldg(w.absmax2 + block / w.blocksize2)), __ldg(w.offset));
}

// Eight consecutive values, 16-byte accesses.
template <typename T>
__device__ __forceinline__ void load8(const T* p, float (&v)[8]) {
  constexpr int kVectors = sizeof(T) * 8 / 16;
  union {
    uint4 u[kVectors];
    T t[8];
  } x;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) x.u[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = to_float(x.t[i]);
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const float (&v)[8]) {
  constexpr int kVectors = sizeof(T) * 8 / 16;
  union {
    uint4 u[kVectors];
    T t[8];
  } x;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.t[i] = from_acc<T>(v[i]);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(p)[i] = x.u[i];
}

// Row ib of B_i from column jb on, eight entries; the identity is not stored.
template <bool kIdentity, typename TF>
__device__ __forceinline__ void load_b8(const Factors<TF>& f, const Component& c, int ib, int jb, float (&b)[8]) {
  if (kIdentity && c.identity == Identity::kB) {
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = float(ib == jb + i);
  } else {
    load8(f.B + c.b_offset + ib * c.nb + jb, b);
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes into shared memory, of which those after the first `bytes` are zeros.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Four 8 x 8 matrices, whose rows the lanes name, eight lanes a matrix.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// d += a b on tensor cores: a 16 x 16, b 16 x 8, of T.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Lets the next kernel of the stream start, and waits until the kernels before this one are complete; both do
// nothing unless the launch says so.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline bool can_overlap() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// A launch that, where the device can, overlaps the kernel in front of it: this one has to wait_for_previous() before
// it reads what others wrote, and before it writes what others may still read.
template <typename... Params, typename... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, int threads, int bytes, cudaStream_t stream,
                               bool overlapping, Args... args) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlapping ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace moka::cuda
