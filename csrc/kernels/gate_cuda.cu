// One warp: a mixture has few components.
#include "gate_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kWarp = 32;

template <typename Combine>
__device__ float reduce(float v, Combine combine) {
  for (int offset = kWarp / 2; offset; offset /= 2) v = combine(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

__device__ float sum(float v) {
  return reduce(v, [](float a, float b) { return a + b; });
}

__global__ void gate_kernel(const float* logits, float scale, int r, float* alpha) {
  float largest = -INFINITY, total = 0;
  for (int i = threadIdx.x; i < r; i += kWarp) largest = fmaxf(largest, logits[i]);
  largest = reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < r; i += kWarp) total += expf(logits[i] - largest);
  total = sum(total);
  for (int i = threadIdx.x; i < r; i += kWarp) alpha[i] = scale * (expf(logits[i] - largest) / total);
}

__global__ void gate_grad_kernel(const float* alpha, const float* grad_alpha, float scale, int r, float* grad_logits) {
  float dot = 0;
  for (int i = threadIdx.x; i < r; i += kWarp) dot += alpha[i] * grad_alpha[i];
  dot = sum(dot) / scale;
  for (int i = threadIdx.x; i < r; i += kWarp) grad_logits[i] = alpha[i] * (grad_alpha[i] - dot);
}

}  // namespace

cudaError_t launch_gate(const float* logits, float scale, int r, float* alpha, cudaStream_t stream) {
  gate_kernel<<<1, kWarp, 0, stream>>>(logits, scale, r, alpha);
  return cudaGetLastError();
}

cudaError_t launch_gate_grad(const float* alpha, const float* grad_alpha, float scale, int r, float* grad_logits,
                             cudaStream_t stream) {
  gate_grad_kernel<<<1, kWarp, 0, stream>>>(alpha, grad_alpha, scale, r, grad_logits);
  return cudaGetLastError();
}

}  // namespace moka::cuda
