// Products with an NF4 weight for few tokens, written once for every instruction set (simd.h has the recipe).
//
// W' exists only as a tile in the L1 cache. Forward: lanes run along k; a micro-kernel of 4 tokens x kMicroRows rows
// keeps its sums in registers over one tile, and in memory between tiles. Transposed: lanes run along k too, now the
// output, and the sums over n live in dx.

namespace moka {
namespace MOKA_SIMD {
namespace {

constexpr int kMicroTokens = 4, kMicroRows = kWidth == 16 ? 4 : 2, kMicroVecs = kMicroRows;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// sums[m, r] += tile[r, :] . x[m, :] lane by lane; sums has kTileRows vectors per token
template <int kTokens>
MOKA_INLINE void dot_tile(const float* tile, const float* x, int64_t ldx, int cols, Vec* sums) {
  Vec acc[kTokens][kMicroRows];
  for (int m = 0; m < kTokens; ++m)
    for (int r = 0; r < kMicroRows; ++r) acc[m][r] = sums[m * kTileRows + r];
  const auto step = [&](int c, bool whole) __attribute__((always_inline)) {
    Vec w[kMicroRows];
    for (int r = 0; r < kMicroRows; ++r) w[r] = load(tile + r * Tile::kStride + c);
    for (int m = 0; m < kTokens; ++m) {
      const Vec v = whole ? load(x + m * ldx + c) : load(x + m * ldx + c, cols - c);
      for (int r = 0; r < kMicroRows; ++r) acc[m][r] = fma(v, w[r], acc[m][r]);
    }
  };
  int c = 0;
  for (; c + kWidth <= cols; c += kWidth) step(c, true);
  if (c < cols) step(c, false);
  for (int m = 0; m < kTokens; ++m)
    for (int r = 0; r < kMicroRows; ++r) sums[m * kTileRows + r] = acc[m][r];
}

// Very few tokens, no tile: the weight goes from its look-up into the sums. Each token's x is sorted into even and odd
// entries first, the order in which bytes fall apart into nibbles. Rows must begin a block of a multiple of 32 entries.
constexpr int kGemvTokens = 4, kGemvRows = kMicroRows;
MOKA_INLINE bool suits_gemv(const Nf4Params& w, const Nf4Mixture* mixture, int64_t M) {
  return !mixture && M <= kGemvTokens && w.blocksize % 32 == 0 && w.K % w.blocksize == 0;
}

template <int kTokens, int kRows>
MOKA_INLINE void gemv_rows(const Nf4Params& w, const float* sorted, int64_t row, float* y) {
  const int64_t blocks = w.K / w.blocksize, row_bytes = w.K / 2;
  const uint8_t* bytes = w.packed + row * row_bytes;
  Vec acc[kTokens][kRows];
  for (int m = 0; m < kTokens; ++m)
    for (int r = 0; r < kRows; ++r) acc[m][r] = zero();
  for (int64_t block = 0; block < blocks; ++block) {
    Table tables[kRows];
    for (int r = 0; r < kRows; ++r) tables[r] = scaled_code(nf4_absmax(w, (row + r) * blocks + block));
    for (int64_t i = 0; i < w.blocksize; i += 2 * kWidth, bytes += kWidth, sorted += 2 * kWidth) {
      for (int r = 0; r < kRows; ++r) {
        Vec even, odd;
        decode_split(bytes + r * row_bytes, tables[r], even, odd);
        for (int m = 0; m < kTokens; ++m) {
          acc[m][r] = fma(even, load(sorted + m * w.K), acc[m][r]);
          acc[m][r] = fma(odd, load(sorted + m * w.K + kWidth), acc[m][r]);
        }
      }
    }
  }
  for (int m = 0; m < kTokens; ++m)
    for (int r = 0; r < kRows; ++r) y[m * w.N + row + r] = sum(acc[m][r]);
}

template <int kTokens>
void gemv(const Nf4Params& w, const float* x, int64_t row_begin, int64_t row_end, float* y) {
  AlignedFloats sorted(kTokens * w.K);
  float* to = sorted.data();
  for (const float* from = x; from < x + kTokens * w.K; from += 2 * kWidth, to += 2 * kWidth)
    for (int i = 0; i < kWidth; ++i) {
      to[i] = from[2 * i];
      to[kWidth + i] = from[2 * i + 1];
    }
  int64_t row = row_begin;
  for (; row + kGemvRows <= row_end; row += kGemvRows) gemv_rows<kTokens, kGemvRows>(w, sorted.data(), row, y);
  for (; row < row_end; ++row) gemv_rows<kTokens, 1>(w, sorted.data(), row, y);
}

void linear(const Nf4Params& w, const Nf4Mixture* mixture, const float* x, int64_t M, int64_t row_begin,
            int64_t row_end, float* y) {
  if (suits_gemv(w, mixture, M)) {
    if (M == 1) return gemv<1>(w, x, row_begin, row_end, y);
    if (M == 2) return gemv<2>(w, x, row_begin, row_end, y);
    if (M == 3) return gemv<3>(w, x, row_begin, row_end, y);
    if (M == 4) return gemv<4>(w, x, row_begin, row_end, y);
  }
  Decoder decoder(w, mixture, 0, w.K);
  Tile& tile = decoder.tile;
  __builtin_memset(&tile, 0, sizeof(tile));  // rows past the last one are multiplied too, and not used
  Vec sums[kMaxFusedTokens * kTileRows];
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int rows = at_most(row_end - row, kTileRows);
    for (int64_t i = 0; i < M * kTileRows; ++i) sums[i] = zero();
    for (int64_t col = 0; col < w.K; col += kTileCols) {
      const int cols = at_most(w.K - col, kTileCols);
      decoder.fill(row, rows, col, cols);
      for (int r = 0; r < rows; r += kMicroRows) {
        const float* from = tile.rows[r];
        int64_t m = 0;
        for (; m + kMicroTokens <= M; m += kMicroTokens)
          dot_tile<kMicroTokens>(from, x + m * w.K + col, w.K, cols, sums + m * kTileRows + r);
        for (; m < M; ++m) dot_tile<1>(from, x + m * w.K + col, w.K, cols, sums + m * kTileRows + r);
      }
    }
    for (int64_t m = 0; m < M; ++m)
      for (int r = 0; r < rows; ++r) y[m * w.N + row + r] = sum(sums[m * kTileRows + r]);
  }
}

// dx[m, :] += sum_r dy[m, r] tile[r, :] for kVecs vectors of columns, of which the last holds `lanes` columns. The
// tile is summed by itself first: adding row by row to dx would round N times instead of N / kTileRows times.
template <int kTokens, int kVecs>
MOKA_INLINE void add_tile(const float* tile, int rows, const float* dy, int64_t ldy, float* dx, int64_t ldx,
                          int lanes) {
  Vec acc[kTokens][kVecs];
  for (int m = 0; m < kTokens; ++m)
    for (int v = 0; v < kVecs; ++v) acc[m][v] = zero();
  for (int r = 0; r < rows; ++r) {
    Vec w[kVecs];
    for (int v = 0; v < kVecs; ++v) w[v] = load(tile + r * Tile::kStride + v * kWidth);
    for (int m = 0; m < kTokens; ++m) {
      const Vec d = set1(dy[m * ldy + r]);
      for (int v = 0; v < kVecs; ++v) acc[m][v] = fma(d, w[v], acc[m][v]);
    }
  }
  for (int m = 0; m < kTokens; ++m)
    for (int v = 0; v < kVecs; ++v) {
      float* to = dx + m * ldx + v * kWidth;
      if (v + 1 < kVecs || lanes == kWidth)
        store(to, add(load(to), acc[m][v]));
      else
        store(to, add(load(to, lanes), acc[m][v]), lanes);
    }
}

void linear_transposed(const Nf4Params& w, const Nf4Mixture* mixture, const float* dy, int64_t M, int64_t col_begin,
                       int64_t col_end, float* dx) {
  Decoder decoder(w, mixture, col_begin, col_end);
  const Tile& tile = decoder.tile;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = col_begin; k < col_end; ++k) dx[m * w.K + k] = 0;
  for (int64_t row = 0; row < w.N; row += kTileRows) {
    const int rows = at_most(w.N - row, kTileRows);
    for (int64_t col = col_begin; col < col_end; col += kTileCols) {
      const int cols = at_most(col_end - col, kTileCols);
      decoder.fill(row, rows, col, cols);
      const auto tokens = [&](auto count, int64_t m) {
        constexpr int kTokens = decltype(count)::value;
        const float* from_dy = dy + m * w.N + row;
        float* to = dx + m * w.K + col;
        int c = 0;
        for (; c + kMicroVecs * kWidth <= cols; c += kMicroVecs * kWidth)
          add_tile<kTokens, kMicroVecs>(tile.rows[0] + c, rows, from_dy, w.N, to + c, w.K, kWidth);
        for (; c < cols; c += kWidth)
          add_tile<kTokens, 1>(tile.rows[0] + c, rows, from_dy, w.N, to + c, w.K,
                               cols - c < kWidth ? cols - c : kWidth);
      };
      int64_t m = 0;
      for (; m + kMicroTokens <= M; m += kMicroTokens) tokens(Count<kMicroTokens>{}, m);
      for (; m < M; ++m) tokens(Count<1>{}, m);
    }
  }
}

// What this instruction set offers, in the order of Nf4Kernels.
constexpr Nf4Kernels nf4_table() {
  return {&quantize<float>,
          &quantize<Bfloat16>,
          &quantize<Float16>,
          &dequantize<float>,
          &dequantize<Bfloat16>,
          &dequantize<Float16>,
          &linear,
          &linear_transposed};
}

}  // namespace
}  // namespace MOKA_SIMD
}  // namespace moka
