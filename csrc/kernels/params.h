// Plain structs handed from the operators to the kernels. No torch type appears here or in any
// other file of this folder, so that CMake and nvcc can compile the kernels alone.
//
// Letters used everywhere: a layer is W [N, K] (out, in); component i is A_i [ma, na] kron B_i [mb, nb]
// with ma*mb = N and na*nb = K; x is [M, K], y is [M, N]. Every pointer is to contiguous memory.
#pragma once

#include <cstdint>

namespace moka {

// Which factor of a component is the identity matrix, and therefore not stored.
enum class Identity : int32_t { kNone = 0, kA = 1, kB = 2 };

struct KronComponent {
  int64_t ma, na, mb, nb;
  Identity identity;
  int64_t a_offset;  // first element of A_i in the flat A, in elements; unused when A_i is the identity
  int64_t b_offset;  // first element of B_i in the flat B, in elements; unused when B_i is the identity
};

struct KronParams {
  const KronComponent* components;  // [r], host memory
  int64_t r;
  int64_t N, K;
};

// An NF4 weight in bitsandbytes' layout: element e of the row-major [N, K] matrix is the high nibble of
// packed[e/2] when e is even, the low nibble when e is odd, scaled by the absmax of block e / blocksize.
struct Nf4Params {
  const uint8_t* packed;    // [ceil(N*K / 2)]
  const float* absmax;      // [ceil(N*K / blocksize)]; null when the absmax is itself quantized
  const uint8_t* absmax_q;  // [ceil(N*K / blocksize)]; null when absmax is given. Then
  const float* absmax2;     //   absmax[i] = code2[absmax_q[i]] * absmax2[i / blocksize2] + offset[0],
  const float* code2;       //   a multiplication and an addition, each rounded to fp32 (no FMA).
  const float* offset;      // [1]
  int64_t blocksize, blocksize2;
  int64_t N, K;
};

}  // namespace moka
