// One warp: a mixture has few components. The launches overlap their neighbours', since waiting is most of their time.
#include "cuda_common.cuh"
#include "gate_cuda.h"

namespace moka::cuda {
namespace {

constexpr int kWarp = 32;

template <typename T>
__device__ T warp_sum(T v) {
  for (int offset = kWarp / 2; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

template <typename T>
__device__ T warp_max(T v) {
  for (int offset = kWarp / 2; offset; offset /= 2) v = max(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

template <typename T>
__global__ void gate_kernel(const T* logits, T scale, int r, T* alpha) {
  let_next_start();
  wait_for_previous();
  T largest = -INFINITY, total = 0;
  for (int i = threadIdx.x; i < r; i += kWarp) largest = max(largest, logits[i]);
  largest = warp_max(largest);
  for (int i = threadIdx.x; i < r; i += kWarp) total += exp(logits[i] - largest);
  total = warp_sum(total);
  for (int i = threadIdx.x; i < r; i += kWarp) alpha[i] = scale * (exp(logits[i] - largest) / total);
}

template <typename T>
__global__ void gate_grad_kernel(const T* alpha, const T* grad_alpha, T scale, int r, T* grad_logits) {
  let_next_start();
  wait_for_previous();
  T dot = 0;
  for (int i = threadIdx.x; i < r; i += kWarp) dot += alpha[i] * grad_alpha[i];
  dot = warp_sum(dot) / scale;
  for (int i = threadIdx.x; i < r; i += kWarp) grad_logits[i] = alpha[i] * (grad_alpha[i] - dot);
}

}  // namespace

template <typename T>
cudaError_t launch_gate(const T* logits, T scale, int r, T* alpha, cudaStream_t stream) {
  return launch_overlapping(gate_kernel<T>, dim3(1), kWarp, 0, stream, can_overlap(), logits, scale, r, alpha);
}

template <typename T>
cudaError_t launch_gate_grad(const T* alpha, const T* grad_alpha, T scale, int r, T* grad_logits, cudaStream_t stream) {
  return launch_overlapping(gate_grad_kernel<T>, dim3(1), kWarp, 0, stream, can_overlap(), alpha, grad_alpha, scale, r,
                            grad_logits);
}

template cudaError_t launch_gate(const float*, float, int, float*, cudaStream_t);
template cudaError_t launch_gate(const double*, double, int, double*, cudaStream_t);
template cudaError_t launch_gate_grad(const float*, const float*, float, int, float*, cudaStream_t);
template cudaError_t launch_gate_grad(const double*, const double*, double, int, double*, cudaStream_t);

}  // namespace moka::cuda
