// Adds a Kronecker mixture to a tile of W in fp32, written once for every instruction set (simd.h has the recipe).
//
//   tile[r, c] += sum_i (alpha_i A_i[ia, j / nb]) B_i[ib, j % nb]      n = row + r = ia * mb + ib,  j = col + c
//
// Rows of A come spread over the columns (Nf4SpreadRows); rows of B are read in place, wrapping at nb. Two terms and
// four rows at a time: a vector of A serves four rows, and the tile is read and written once for two terms.

namespace moka {
namespace MOKA_SIMD {
namespace {

constexpr int kMergeRows = 4, kMergeTerms = 2;

// b[t]: row ib of the first of kRows rows, which share a[t]
template <int kTerms, int kRows>
MOKA_INLINE void add_rows(const Nf4Mixture::Term* terms, const float* const* a, const float* const* b, int64_t col,
                          int cols, float* tile, int64_t stride) {
  int64_t phase[kTerms], period[kTerms], b_stride[kTerms];
  for (int t = 0; t < kTerms; ++t) {
    period[t] = terms[t].period;
    b_stride[t] = terms[t].b_stride;
    phase[t] = col % period[t];
  }
  for (int c = 0; c < cols; c += kWidth) {
    Vec w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = load(tile + r * stride + c);
    for (int t = 0; t < kTerms; ++t) {
      const Vec spread = load(a[t] + c);
      const float* from = b[t] + phase[t];
      for (int r = 0; r < kRows; ++r) w[r] = fma(spread, load(from + r * b_stride[t]), w[r]);
      phase[t] += kWidth;
      phase[t] -= phase[t] >= period[t] ? period[t] : 0;
    }
    for (int r = 0; r < kRows; ++r) store(tile + r * stride + c, w[r]);
  }
}

template <int kTerms>
MOKA_INLINE void add_terms(const Nf4Mixture::Term* terms, Nf4SpreadRows& spread, size_t first, int64_t row, int rows,
                           int64_t col, int64_t spread_col, int cols, float* tile, int64_t stride) {
  for (int r = 0; r < rows;) {
    int64_t together = rows - r < kMergeRows ? rows - r : kMergeRows;  // the next rows with the same ia in every term
    const float *a[kTerms], *b[kTerms];
    for (int t = 0; t < kTerms; ++t) {
      const int64_t ia = (row + r) / terms[t].mb, ib = (row + r) - ia * terms[t].mb;
      a[t] = spread.row(first + t, ia) + spread_col;
      b[t] = terms[t].b + ib * terms[t].b_stride;
      together = terms[t].mb - ib < together ? terms[t].mb - ib : together;
    }
    float* to = tile + r * stride;
    switch (together) {
      case 4:
        add_rows<kTerms, 4>(terms, a, b, col, cols, to, stride);
        break;
      case 3:
        add_rows<kTerms, 3>(terms, a, b, col, cols, to, stride);
        break;
      case 2:
        add_rows<kTerms, 2>(terms, a, b, col, cols, to, stride);
        break;
      default:
        add_rows<kTerms, 1>(terms, a, b, col, cols, to, stride);
    }
    r += static_cast<int>(together);
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
  size_t t = 0;
  for (; t + kMergeTerms <= count; t += kMergeTerms)
    add_terms<kMergeTerms>(terms + t, spread, t, row, rows, col, spread_col, cols, tile, stride);
  for (; t < count; ++t) add_terms<1>(terms + t, spread, t, row, rows, col, spread_col, cols, tile, stride);
  for (const Nf4Mixture::Term& term : mixture.identity)
    for (int r = 0; r < rows; ++r) add_identity(term, row + r, col, cols, tile + r * stride);
}

}  // namespace
}  // namespace MOKA_SIMD
}  // namespace moka
