// Parameter gradients of the mixture on Hopper tensor cores, without forming dY^T X.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace moka::cuda {

// Two components of one shape (or one and an empty slot) whose gradients one set of thread blocks computes.
struct GradGroup {
  int side;                  // s: min(ma, na); one of 16, 32, 64
  int mirrored;              // 0: A is [s, 4096/s] and B [4096/s, s]; 1: the transposes, and x and dy change places
  int first, second;         // components; second is -1 when there is none
  int cta_begin, cta_count;  // its thread blocks, and its slabs of `partial`
};

constexpr int kMaxGradGroups = 8;
constexpr int kGradWidth = 4096;               // N and K this kernel is written for
constexpr int64_t kGradSlab = 4 * kGradWidth;  // floats each thread block leaves in `partial`

// Fills `groups` for these components on `sms` multiprocessors; returns their number, 0 when a shape is not supported.
int plan_grad_groups(const KronParams& mixture, int sms, GradGroup* groups);

// partial [sms][2][4096/s][2 s]: for group slab b, first the A side then the B side, summed over the tokens that
// thread block b worked on. x, dy: [M, 4096] bf16 or fp16, 16-byte aligned; A, B, alpha unscaled.
// factor_fp32: A and B are fp32, else of x's dtype. bf16: x's dtype is bf16, else fp16.
cudaError_t launch_kron_grad_sm90(const void* x, const void* dy, const void* A, const void* B, bool factor_fp32,
                                  bool bf16, int64_t M, const KronParams& mixture, const GradGroup* groups,
                                  int num_groups, int sms, float* partial, cudaStream_t stream);

}  // namespace moka::cuda
