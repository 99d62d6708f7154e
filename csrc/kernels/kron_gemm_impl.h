// Small matrix products, the only arithmetic of the Kronecker kernels; compiled once per instruction set (simd.h):
//
//   C[m, n] (+)= sum_{o < outer, k < inner} a[m*a_row + o*a_outer + k*a_inner] * b[o*b_outer + k*b_inner + n]
//
// repeated over `panels` (tokens) that share `a`. One operand is broadcast and may have any strides; the other is read
// in vectors along n and must be contiguous there. Every product of the mixture and of its gradients takes this form
// once a small intermediate is transposed, so the large activations never are.
//
// A tile of C stays in registers over the sum. Each element is one chain of multiply-adds in the order of (o, k),
// whatever the tile, so results do not depend on how rows and tokens are grouped.
namespace moka {
namespace MOKA_SIMD {

// fp64 goes one lane at a time: it is there for gradient checks.
MOKA_INLINE double set1(double s) { return s; }
MOKA_INLINE double add(double a, double b) { return a + b; }
MOKA_INLINE double fma(double a, double b, double c) { return a * b + c; }
MOKA_INLINE double load(const double* p) { return *p; }
MOKA_INLINE double load(const double* p, int) { return *p; }
MOKA_INLINE void store(double* p, double v) { *p = v; }
MOKA_INLINE void store(double* p, double v, int) { *p = v; }

template <class T>
struct Tile;
template <>
struct Tile<float> {  // 2 accumulators per row, 2 vectors of b and 2 registers to spare
  using V = Vec;
  static constexpr int kLanes = kWidth, kRows = kWidth == 16 ? 14 : 6;
};
template <>
struct Tile<double> {
  using V = double;
  static constexpr int kLanes = 1, kRows = 4;
};

template <class T>
struct SmallGemm {
  int64_t m, n;
  const T* a;
  int64_t a_row;
  const T* b;
  T* c;
  int64_t c_row;
  int64_t inner, a_inner, b_inner;
  bool accumulate = false;
  int64_t outer = 1, a_outer = 0, b_outer = 0;
  int64_t panels = 1, b_panel = 0, c_panel = 0;
};

// Two adjacent column vectors of C, perhaps of two panels; fewer lanes than the width at a right edge.
template <class T>
struct Columns {
  const T* b[2];
  T* c[2];
  int lanes[2];
};

template <class T, int kRows, int kVecs, bool kPartial>
void gemm_tile(const SmallGemm<T>& g, const T* a, int64_t row, const Columns<T>& cols) {
  using V = typename Tile<T>::V;
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[r][v] = set1(T(0));

  const int64_t s = g.a_row, s3 = 3 * g.a_row;
  for (int64_t o = 0; o < g.outer; ++o) {
    // Row r is a0, a5 or a10 plus 0..4 strides, which fits x86 addressing and spares registers.
    const T *a0 = a + o * g.a_outer, *a5 = a0 + 5 * s, *a10 = a0 + 10 * s;
    const T *b0 = cols.b[0] + o * g.b_outer, *b1 = cols.b[kVecs - 1] + o * g.b_outer;
    for (int64_t k = 0; k < g.inner; ++k) {
      V b[kVecs];
      b[0] = kPartial ? load(b0, cols.lanes[0]) : load(b0);
      if constexpr (kVecs == 2) b[1] = kPartial ? load(b1, cols.lanes[1]) : load(b1);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const T* p = r < 5 ? a0 : r < 10 ? a5 : a10;
        const int q = r % 5;
        const V x = set1(q == 0 ? p[0] : q == 1 ? p[s] : q == 2 ? p[2 * s] : q == 3 ? p[s3] : p[4 * s]);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
      }
      a0 += g.a_inner;
      a5 += g.a_inner;
      a10 += g.a_inner;
      b0 += g.b_inner;
      b1 += g.b_inner;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      T* c = cols.c[v] + (row + r) * g.c_row;
      if constexpr (kPartial) {
        store(c, g.accumulate ? add(load(c, cols.lanes[v]), acc[r][v]) : acc[r][v], cols.lanes[v]);
      } else {
        store(c, g.accumulate ? add(load(c), acc[r][v]) : acc[r][v]);
      }
    }
}

template <class T, int kRows>
MOKA_INLINE void gemm_rows(const SmallGemm<T>& g, const T* a, int64_t row, const Columns<T>& cols, bool two,
                           bool partial) {
  if (two && partial) return gemm_tile<T, kRows, 2, true>(g, a, row, cols);
  if (two) return gemm_tile<T, kRows, 2, false>(g, a, row, cols);
  if (partial) return gemm_tile<T, kRows, 1, true>(g, a, row, cols);
  return gemm_tile<T, kRows, 1, false>(g, a, row, cols);
}

// Runs the tile of exactly `rows` rows, 1 <= rows <= kRows.
template <class T, int kRows = Tile<T>::kRows>
MOKA_INLINE void gemm_dispatch(int64_t rows, const SmallGemm<T>& g, const T* a, int64_t row, const Columns<T>& cols,
                               bool two, bool partial) {
  if constexpr (kRows > 1)
    if (rows < kRows) return gemm_dispatch<T, kRows - 1>(rows, g, a, row, cols, two, partial);
  gemm_rows<T, kRows>(g, a, row, cols, two, partial);
}

// All of C for a part of the sum.
template <class T>
void gemm_part(const SmallGemm<T>& g) {
  constexpr int64_t kLanes = Tile<T>::kLanes, kRows = Tile<T>::kRows;
  const int64_t per_panel = (g.n + kLanes - 1) / kLanes, vectors = per_panel * g.panels;
  const int64_t row_tiles = (g.m + kRows - 1) / kRows;  // of nearly equal height
  Columns<T> cols;
  for (int64_t v = 0; v < vectors; v += 2) {
    const bool two = v + 1 < vectors;
    bool partial = false;
    for (int i = 0; i < 1 + two; ++i) {
      const int64_t panel = (v + i) / per_panel, column = (v + i) % per_panel * kLanes;
      cols.b[i] = g.b + panel * g.b_panel + column;
      cols.c[i] = g.c + panel * g.c_panel + column;
      cols.lanes[i] = static_cast<int>(g.n - column < kLanes ? g.n - column : kLanes);
      partial |= cols.lanes[i] < kLanes;
    }
    if (!two) cols.b[1] = cols.b[0];
    for (int64_t tile = 0, row = 0; tile < row_tiles; ++tile) {
      const int64_t rows = g.m / row_tiles + (tile < g.m % row_tiles);
      gemm_dispatch<T>(rows, g, g.a + row * g.a_row, row, cols, two, partial);
      row += rows;
    }
  }
}

// Rounding errors grow with the square root of a chain's length, so long sums are cut into parts. At 128 the errors are
// near those of PyTorch's own products; 64 would lower them by a third and cost 3 percent.
constexpr int64_t kChain = 128;

template <class T>
void small_gemm(SmallGemm<T> g) {
  const T *a = g.a, *b = g.b;
  const int64_t inner = g.inner, outer = g.outer, outer_step = inner < kChain ? kChain / inner : 1;
  for (int64_t o = 0; o < outer; o += outer_step)
    for (int64_t k = 0; k < inner; k += kChain) {
      g.outer = outer - o < outer_step ? outer - o : outer_step;
      g.inner = inner - k < kChain ? inner - k : kChain;
      g.a = a + o * g.a_outer + k * g.a_inner;
      g.b = b + o * g.b_outer + k * g.b_inner;
      gemm_part(g);
      g.accumulate = true;
    }
}

}  // namespace MOKA_SIMD
}  // namespace moka
