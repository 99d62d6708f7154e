// Parameter gradients from G = dY^T X, and the steps every way of computing them ends with.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "build_cuda.h"
#include "kron_grad_sm90.h"

namespace moka::cuda {

// Floats of scratch that launch_contract needs.
int64_t contract_scratch(const KronParams& mixture);

// raw_A, raw_B: the gradients before alpha, flat like A and B; G [N, K].
// raw_A [i] = sum_{ib,jb} B[ib,jb] G[ia mb + ib, ja nb + jb], raw_B alike; an identity factor has none.
cudaError_t launch_contract(const float* G, const MixtureArgs& mix, float* scratch, float* raw_A, float* raw_B,
                            cudaStream_t stream);

// grad_A = alpha raw_A, grad_B = alpha raw_B in the factors' dtype, grad_alpha_i = <raw_A_i, A_i> in fp32; a null
// output is left out.
cudaError_t launch_finish_grads(const float* raw_A, const float* raw_B, const MixtureArgs& mix, void* grad_A,
                                void* grad_B, float* grad_alpha, cudaStream_t stream);

constexpr int kFinishDots = 8;  // floats of scratch for each component that launch_finish_slabs needs

// The same from the slabs that launch_kron_grad_sm90 left; every output is needed.
cudaError_t launch_finish_slabs(const float* partial, const MixtureArgs& mix, const GradPlan& plan, float* dots,
                                void* grad_A, void* grad_B, float* grad_alpha, cudaStream_t stream);

}  // namespace moka::cuda
