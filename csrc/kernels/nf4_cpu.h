// CPU kernels of the NF4 weight: quantize, dequantize and multiply, for a range of blocks, rows or columns, so that
// the caller shares out the work. One table of functions per instruction set.
//
//   w[e] = code[nibble e] * absmax[e / blocksize]                          (QLoRA, arXiv 2305.14314)
//   W'   = W + sum_i alpha_i (A_i kron B_i)    added in fp32 while decoding ("merged on the fly")
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"
#include "simd.h"

namespace moka {

// Floats on a cache line boundary, so that no vector load straddles two lines.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t count);
  ~AlignedFloats();  // the functions of these classes that touch the standard library are compiled in nf4_cpu.cpp,
                     // never for a particular instruction set
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// A mixture made ready for adding to rows of W: the terms of row n = ia * mb + ib are
// alpha * A[ia, j / nb] * B[ib, j % nb] for column j. The factors must outlive this object.
class Nf4Mixture {
 public:
  struct Term {
    int64_t ma, na, mb, nb;
    float alpha;
    const float* a;  // [ma, na]; null when A is the identity
    const float* b;  // [mb, b_stride]; null when B is the identity
    // Row ib of b holds B[ib, j % nb] for j < b_stride, so that a vector load at j % period never leaves it. Where
    // possible period is a multiple of the widest vector too, which keeps the loads aligned.
    int64_t period, b_stride;
  };

  Nf4Mixture(const KronParams& params, const float* A, const float* B, const float* alpha);
  ~Nf4Mixture();

  std::vector<Term> dense;     // equal shapes next to each other
  std::vector<Term> identity;  // one factor is not stored

 private:
  AlignedFloats repeated_b_;
};

// One thread's rows of A spread over the columns [col_begin, col_end): values[j - col_begin] = alpha A[ia, j / nb].
// A row is spread once while the thread walks down the rows of W, and kept as long as a tile may need it.
class Nf4SpreadRows {
 public:
  Nf4SpreadRows(const Nf4Mixture* mixture, int64_t col_begin, int64_t col_end, int64_t tile_rows);
  ~Nf4SpreadRows();

  // Pointer to the value of col_begin; readable, with any content, up to 15 floats past col_end.
  const float* row(size_t term, int64_t ia) {
    Slots& s = slots_[term];
    const int64_t slot = ia & s.mask;
    if (s.held[slot] != ia) spread(term, ia);
    return s.values + slot * width_;
  }

 private:
  struct Slots {
    int64_t mask;  // number of slots (a power of two, at least the different ia that one tile can meet) less one
    int64_t* held;
    float* values;  // [slots, width_]
  };
  void spread(size_t term, int64_t ia);

  const Nf4Mixture* mixture_;
  int64_t col_begin_, col_end_, width_;
  std::vector<Slots> slots_;
  std::vector<int64_t> held_;
  AlignedFloats values_;
};

constexpr int64_t kMaxFusedTokens = 32;
constexpr int64_t kColumnStep = 16;  // ranges of columns begin at multiples of this

struct Nf4Part {
  int64_t row_begin, row_end, col_begin, col_end;  // col_begin is a multiple of kColumnStep
};

struct Nf4Kernels {
  // Blocks [block_begin, block_end) of w [numel]: packed bytes and absmax, bit-equal to bitsandbytes.
  template <typename T>
  using Quantize = void (*)(const T* w, int64_t numel, int64_t blocksize, int64_t block_begin, int64_t block_end,
                            uint8_t* packed, float* absmax);
  Quantize<float> quantize_f32;
  Quantize<Bfloat16> quantize_bf16;
  Quantize<Float16> quantize_f16;

  // A part of W' rounded once to T; out [rows, columns]. mixture may be null.
  template <typename T>
  using Dequantize = void (*)(const Nf4Params& w, const Nf4Mixture* mixture, const Nf4Part& part, T* out);
  Dequantize<float> dequantize_f32;
  Dequantize<Bfloat16> dequantize_bf16;
  Dequantize<Float16> dequantize_f16;

  // y[m, n] = sum_k W'[n, k] x[m, k] for n in [row_begin, row_end); x [M, K], y [M, N], M <= kMaxFusedTokens.
  void (*linear)(const Nf4Params& w, const Nf4Mixture* mixture, const float* x, int64_t M, int64_t row_begin,
                 int64_t row_end, float* y);
  // dx[m, k] = sum_n W'[n, k] dy[m, n] for k in [col_begin, col_end); M as above.
  void (*linear_transposed)(const Nf4Params& w, const Nf4Mixture* mixture, const float* dy, int64_t M,
                            int64_t col_begin, int64_t col_end, float* dx);
};

const Nf4Kernels& nf4_kernels();  // for the active instruction set

// One absmax of the weight; under double quantization a product and a sum, each rounded to fp32.
inline float nf4_absmax(const Nf4Params& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  volatile float product = w.code2[w.absmax_q[block]] * w.absmax2[block / w.blocksize2];  // volatile: no FMA
  return product + *w.offset;
}

}  // namespace moka
