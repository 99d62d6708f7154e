// NF4 weights to dense ones, with or without a mixture; and quantization.
#include "build_cuda.cuh"

namespace moka::cuda {
namespace {

// Index of the nearest NF4 value: thresholds halfway between neighbours, as bitsandbytes rounds them.
__device__ __forceinline__ int nearest_code(float v) {
  constexpr float kThresholds[15] = {
      -0.8480964004993439f,  -0.6106329262256622f,   -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
      -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f,   0.2035212516784668f,
      0.2920137718319893f,   0.3893125355243683f,    0.5016634166240692f,  0.6427869200706482f,   0.8614784181118011f};
  int code = 0;
#pragma unroll
  for (int i = 0; i < 15; ++i) code += v > kThresholds[i];
  return code;
}

// Subnormals count as zero, as for rcp.approx.ftz.
__device__ __forceinline__ float multiply(float a, float b) {
  float product;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

// One warp per block of `blocksize` entries; two entries, one byte, per lane and step.
template <typename T>
__global__ void quantize_kernel(const T* w, int64_t numel, int64_t blocksize, uint8_t* packed, float* absmax) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int64_t begin = block * blocksize;
  if (begin >= numel) return;
  const int64_t end = begin + blocksize < numel ? begin + blocksize : numel;
  const int lane = threadIdx.x % kLanes;
  float largest = 0.f;
  for (int64_t e = begin + lane; e < end; e += kLanes) largest = fmaxf(largest, fabsf(to_float(w[e])));
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  largest = multiply(largest, 1.f);
  if (lane == 0) absmax[block] = largest;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(largest));
  for (int64_t e = begin + 2 * lane; e < end; e += 2 * kLanes) {
    const float low = e + 1 < end ? to_float(w[e + 1]) : 0.f;
    // in a block of zeros or subnormals 0 * inf is NaN, which exceeds no threshold: code 0, as bitsandbytes has it
    const int first = nearest_code(multiply(to_float(w[e]), inverse)), second = nearest_code(multiply(low, inverse));
    packed[e / 2] = static_cast<uint8_t>(first << 4 | second);
  }
}

template <typename T>
cudaError_t quantize(const void* w, int64_t numel, int64_t blocksize, uint8_t* packed, float* absmax,
                     cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  const int64_t warps = ceil_div(numel, blocksize), blocks = ceil_div(warps, kBuildThreads / kLanes);
  quantize_kernel<T><<<static_cast<unsigned>(blocks), kBuildThreads, 0, stream>>>(static_cast<const T*>(w), numel,
                                                                                  blocksize, packed, absmax);
  return cudaGetLastError();
}

constexpr int kDequantizeBlocks = 4;  // per multiprocessor, for 32 KB of table each

// W without a mixture, eight entries per step; the loads of the next four steps run ahead.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads, kDequantizeBlocks)
    dequantize_kernel(Nf4Base base, int64_t numel, T* out) {
  extern __shared__ __align__(16) uint8_t smem[];
  constexpr int kSteps = 4, kStride = kBuildThreads * 8;
  struct Raw {
    uint32_t codes;
    Nf4Base::Scale scale;
  } next[kSteps] = {};
  auto load = [&](int64_t e) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (const int64_t at = e + i * kStride; at < numel)
        next[i] = {__ldg(reinterpret_cast<const uint32_t*>(base.w.packed) + at / 8),
                   base.load_scale(at >> base.block_shift)};
  };
  const int64_t pitch = static_cast<int64_t>(gridDim.x) * kSteps * kStride;
  int64_t e = static_cast<int64_t>(blockIdx.x) * kSteps * kStride + threadIdx.x * 8;
  base.fill(smem);
  wait_for_previous();
  load(e);
  __syncthreads();
  for (; e < numel; e += pitch) {
    Raw now[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) now[i] = next[i];
    load(e + pitch);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (e + i * kStride >= numel) break;
      float v[8] = {};
      base.decode(now[i].codes, base.scale(now[i].scale), smem, v);
      store8(out + e + i * kStride, v);
    }
  }
}

template <typename T>
cudaError_t dequantize(const Nf4Base& base, bool vector, T* out, cudaStream_t stream) {
  const int64_t numel = base.w.N * base.w.K;
  if (!vector || numel % 8 || !aligned(out, 16))
    return build<T, float>(base, false, base.w.N, base.w.K, MixtureArgs{}, out, stream);
  int resident = 0;
  const cudaError_t error = resident_blocks(kDequantizeBlocks, &resident);
  if (error != cudaSuccess || numel == 0) return error;
  const int64_t pieces = ceil_div(numel, kBuildThreads * 32);
  const dim3 grid(static_cast<unsigned>(pieces < resident ? pieces : resident));
  return launch_overlapping(dequantize_kernel<T>, grid, kBuildThreads, Nf4Base::kTableBytes, stream, can_overlap(),
                            base, numel, out);
}

template <typename T>
cudaError_t from_nf4(const Nf4Params& w, const MixtureArgs& mix, void* out, cudaStream_t stream) {
  const Nf4Base base = nf4_base(w);
  const bool vector = w.blocksize >= 32 && int64_t{1} << base.block_shift == w.blocksize && aligned(w.packed, 16) &&
                      (w.absmax || int64_t{1} << base.block2_shift == w.blocksize2);
  if (mix.shapes.r == 0) return dequantize(base, vector, static_cast<T*>(out), stream);
  if constexpr (sizeof(T) > 4)
    return cudaErrorInvalidValue;  // fp64 mixtures are the operators' business
  else if (mix.factor_dtype != Dtype::kF32)
    return build<T, T>(base, vector, w.N, w.K, mix, static_cast<T*>(out), stream);
  else
    return build<T, float>(base, vector, w.N, w.K, mix, static_cast<T*>(out), stream);
}

}  // namespace

cudaError_t launch_nf4_quantize(const void* w, Dtype dtype, int64_t numel, int64_t blocksize, uint8_t* packed,
                                float* absmax, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kF32:
      return quantize<float>(w, numel, blocksize, packed, absmax, stream);
    case Dtype::kF16:
      return quantize<__half>(w, numel, blocksize, packed, absmax, stream);
    case Dtype::kBF16:
      return quantize<__nv_bfloat16>(w, numel, blocksize, packed, absmax, stream);
    default:
      return quantize<double>(w, numel, blocksize, packed, absmax, stream);
  }
}

cudaError_t launch_build_from_nf4(const Nf4Params& w, const MixtureArgs& mix, Dtype dtype, void* out,
                                  cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kF32:
      return from_nf4<float>(w, mix, out, stream);
    case Dtype::kF16:
      return from_nf4<__half>(w, mix, out, stream);
    case Dtype::kBF16:
      return from_nf4<__nv_bfloat16>(w, mix, out, stream);
    default:
      return from_nf4<double>(w, mix, out, stream);
  }
}

}  // namespace moka::cuda
