// Parameter gradients of the mixture on Hopper tensor cores, without forming dY^T X.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "build_cuda.h"

namespace moka::cuda {

// Two components of one shape (or one and an empty slot) whose gradients one set of thread blocks computes.
struct GradGroup {
  int shape;                 // which of its family's GradShapes
  int mirrored;              // 0: T1 is dY and T2 is X, see kron_grad_sm90.cuh; 1: they change places
  int s1, l2;                // A's sides, at most the GradShape's
  int first, second;         // components; second is -1 when there is none
  int cta_begin, cta_count;  // its thread blocks, and its slabs of `partial`
};

constexpr int kMaxGradGroups = 8;

// Which thread blocks compute which gradients, and the slab of floats each of them leaves:
// [A of first][A of second][B of first][B of second], in the factors' own order; what belongs to no second is void.
struct GradPlan {
  int family;  // of layer shapes
  int count;   // groups
  int64_t slab;
  GradGroup group[kMaxGradGroups];
};

// Plans for `sms` thread blocks; false when a shape is not supported.
bool plan_grad(const KronParams& mixture, int sms, GradPlan* plan);

// partial [sms][plan.slab], summed over the tokens that each thread block worked on, before alpha.
// x [M, K], dy [M, N]: bf16, 16-byte aligned. Factors in bf16 or fp32.
cudaError_t launch_kron_grad_sm90(const void* x, const void* dy, int64_t M, const MixtureArgs& mix,
                                  const GradPlan& plan, int sms, float* partial, cudaStream_t stream);

}  // namespace moka::cuda
