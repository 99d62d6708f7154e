// Adds a Kronecker mixture to a tile of W in fp32, written once for every instruction set (simd.h has the recipe).
//
//   tile[r, c] += sum_i (alpha_i A_i[ia, j / nb]) B_i[ib, j % nb]      n = row + r = ia * mb + ib,  j = col + c
//
// Rows of A come spread over the columns (Nf4SpreadRows). Up to two components of equal shape and four rows that share
// ia are added at a time; their vectors of B, which come back every `period` columns, stay in registers meanwhile.

namespace moka {
namespace MOKA_SIMD {
namespace {

constexpr int kMergeRows = 4;

// a[t] serves all kRows rows; b[t] is row ib of the first of them.
template <int kTerms, int kRows>
MOKA_INLINE void add_rows(const Nf4Mixture::Term& shape, const float* const* a, const float* const* b, int64_t phase,
                          int cols, float* tile, int64_t stride) {
  const int64_t period = shape.period, b_stride = shape.b_stride;
  const int64_t span = period % kWidth == 0 && period < cols ? period : cols;
  for (int64_t first = 0; first < span; first += kWidth) {
    Vec held[kTerms][kRows];
    for (int t = 0; t < kTerms; ++t)
      for (int r = 0; r < kRows; ++r) held[t][r] = load(b[t] + r * b_stride + phase);
    phase += kWidth;
    phase -= phase >= period ? period : 0;
    for (int64_t c = first; c < cols; c += span) {
      Vec spread[kTerms];
      for (int t = 0; t < kTerms; ++t) spread[t] = load(a[t] + c);
      for (int r = 0; r < kRows; ++r) {
        Vec w = load(tile + r * stride + c);
        for (int t = 0; t < kTerms; ++t) w = fma(spread[t], held[t][r], w);
        store(tile + r * stride + c, w);
      }
    }
  }
}

// The terms [first, first + kTerms), which have one shape.
template <int kTerms>
MOKA_INLINE void add_terms(const Nf4Mixture& mixture, size_t first, Nf4SpreadRows& spread, int64_t row, int rows,
                           int64_t col, int64_t spread_col, int cols, float* tile, int64_t stride) {
  const Nf4Mixture::Term* terms = mixture.dense.data() + first;
  const Nf4Mixture::Term& shape = terms[0];
  const int64_t phase = col % shape.period;
  int64_t ia = row / shape.mb, ib = row - ia * shape.mb;
  for (int r = 0; r < rows;) {
    const float *a[kTerms], *b[kTerms];
    for (int t = 0; t < kTerms; ++t) {
      a[t] = spread.row(first + t, ia) + spread_col;
      b[t] = terms[t].b + ib * shape.b_stride;
    }
    float* to = tile + r * stride;
    const int64_t left = shape.mb - ib < rows - r ? shape.mb - ib : rows - r;  // rows with this ia
    const int done = left >= kMergeRows ? kMergeRows : left >= 2 ? 2 : 1;
    if (done == kMergeRows)
      add_rows<kTerms, kMergeRows>(shape, a, b, phase, cols, to, stride);
    else if (done == 2)
      add_rows<kTerms, 2>(shape, a, b, phase, cols, to, stride);
    else
      add_rows<kTerms, 1>(shape, a, b, phase, cols, to, stride);
    r += done;
    ib += done;
    if (ib == shape.mb) {
      ib = 0;
      ++ia;
    }
  }
}

// One factor is the identity: few columns of each row are touched.
MOKA_INLINE void add_identity(const Nf4Mixture::Term& term, int64_t n, int64_t col, int cols, float* tile) {
  const int64_t ia = n / term.mb, ib = n % term.mb, end = col + cols;
  if (!term.a) {  // I kron B: the block of columns ja = ia
    const int64_t first = ia * term.nb, last = first + term.nb;
    for (int64_t j = first > col ? first : col; j < (last < end ? last : end); ++j)
      tile[j - col] += term.alpha * term.b[ib * term.b_stride + j - first];
  } else {  // A kron I: the columns with jb = ib
    for (int64_t ja = col <= ib ? 0 : (col - ib + term.nb - 1) / term.nb; ja * term.nb + ib < end; ++ja)
      tile[ja * term.nb + ib - col] += term.alpha * term.a[ia * term.na + ja];
  }
}

// tile[0 : rows, 0 : cols] belongs to W[row.., col..]; its rows are padded to a multiple of 16 columns.
void add_mixture(const Nf4Mixture& mixture, Nf4SpreadRows& spread, int64_t row, int rows, int64_t col,
                 int64_t spread_col, int cols, float* tile, int64_t stride) {
  const size_t count = mixture.dense.size();
  const Nf4Mixture::Term* terms = mixture.dense.data();
  for (size_t t = 0; t < count;) {
    if (t + 1 < count && terms[t].mb == terms[t + 1].mb && terms[t].nb == terms[t + 1].nb) {
      add_terms<2>(mixture, t, spread, row, rows, col, spread_col, cols, tile, stride);
      t += 2;
    } else {
      add_terms<1>(mixture, t, spread, row, rows, col, spread_col, cols, tile, stride);
      t += 1;
    }
  }
  for (const Nf4Mixture::Term& term : mixture.identity)
    for (int r = 0; r < rows; ++r) add_identity(term, row + r, col, cols, tile + r * stride);
}

}  // namespace
}  // namespace MOKA_SIMD
}  // namespace moka
