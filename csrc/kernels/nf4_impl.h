// Decoding and encoding of NF4, written once for every instruction set (simd.h has the recipe).
//
// W' is decoded in tiles of kTileRows x kTileCols fp32 that stay in the L1 cache. The 16 code values are multiplied by
// the block's absmax first, so that one table look-up per entry gives the rounded product.

namespace moka {
namespace MOKA_SIMD {
namespace {

constexpr int kTileRows = 8, kTileCols = 256;

struct Tile {
  static constexpr int kStride = kTileCols + 16;  // a row may be overrun by one vector while it is being decoded
  alignas(64) float rows[kTileRows][kStride];
};

#if defined(MOKA_SIMD_AVX512) && MOKA_X86

struct Table {
  Vec values;
};
MOKA_INLINE Table scaled_code(float absmax) { return {mul(load(kNf4Code), set1(absmax))}; }

// Lane i of 16 takes nibble i of 8 bytes: lanes 0-7 hold the first four bytes and lanes 8-15 the others, shifted so
// that the wanted nibble is lowest (even entries are high nibbles). The permutation looks at four bits only.
MOKA_INLINE Vec decode16(const uint8_t* bytes, const Table& table) {
  int32_t low, high;
  __builtin_memcpy(&low, bytes, 4);
  __builtin_memcpy(&high, bytes + 4, 4);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i dwords = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, shifts), table.values);
}
MOKA_INLINE void decode16(const uint8_t* bytes, const Table& table, float* out) { store(out, decode16(bytes, table)); }

#elif defined(MOKA_SIMD_AVX2) && MOKA_X86

struct Table {
  Vec low, high;
};
MOKA_INLINE Table scaled_code(float absmax) {
  return {mul(load(kNf4Code), set1(absmax)), mul(load(kNf4Code + 8), set1(absmax))};
}

// Two look-ups of three bits each; bit 3, moved to the sign, chooses between them.
MOKA_INLINE void decode16(const uint8_t* bytes, const Table& table, float* out) {
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (int half = 0; half < 2; ++half) {
    int32_t dword;
    __builtin_memcpy(&dword, bytes + 4 * half, 4);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(dword), shifts);
    const Vec sign = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    store(out + 8 * half, _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                                           _mm256_permutevar8x32_ps(table.high, index), sign));
  }
}

#else

struct Table {
  float values[16];
};
MOKA_INLINE Table scaled_code(float absmax) {
  Table table;
  for (int i = 0; i < 16; ++i) table.values[i] = kNf4Code[i] * absmax;
  return table;
}
MOKA_INLINE void decode16(const uint8_t* bytes, const Table& table, float* out) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = table.values[bytes[i] >> 4];
    out[2 * i + 1] = table.values[bytes[i] & 15];
  }
}

#endif

// Entries [begin, end) of the flat weight; writes up to 15 floats past the last one.
MOKA_INLINE void decode(const Nf4Params& w, int64_t begin, int64_t end, float* out) {
  const int64_t blocksize = w.blocksize;
  const uint8_t* packed = w.packed;
  int64_t block = begin / blocksize;
  for (int64_t stop = (block + 1) * blocksize; begin < end; ++block, stop += blocksize) {
    const float absmax = nf4_absmax(w, block);
    const Table table = scaled_code(absmax);
    if (stop > end) stop = end;
    if (begin % 2) {
      *out++ = kNf4Code[packed[begin / 2] & 15] * absmax;
      ++begin;
    }
    const uint8_t* bytes = packed + begin / 2;
    for (; begin + 64 <= stop; begin += 64, bytes += 32, out += 64)
      for (int i = 0; i < 4; ++i) decode16(bytes + 8 * i, table, out + 16 * i);
    for (; begin + 16 <= stop; begin += 16, bytes += 8, out += 16) decode16(bytes, table, out);
    if (begin < stop) {
      uint8_t last[8] = {};  // the 8 bytes may reach past the end of `packed`
      __builtin_memcpy(last, bytes, static_cast<size_t>(stop - begin + 1) / 2);
      decode16(last, table, out);
      out += stop - begin;
      begin = stop;
    }
  }
}

// Decodes W', tile by tile, for one thread that walks down the rows of columns [col_begin, col_end).
struct Decoder {
  const Nf4Params& w;
  const Nf4Mixture* mixture;
  int64_t col_begin;
  Nf4SpreadRows spread;
  Tile tile;

  Decoder(const Nf4Params& weight, const Nf4Mixture* mix, int64_t begin, int64_t end)
      : w(weight), mixture(mix), col_begin(begin), spread(mix, begin, end, kTileRows) {}

  // tile = W'[row : row + rows, col : col + cols]; lanes up to the next multiple of 16 columns are zeroed
  MOKA_INLINE void fill(int64_t row, int rows, int64_t col, int cols) {
    for (int r = 0; r < rows; ++r) {
      const int64_t begin = (row + r) * w.K + col;
      decode(w, begin, begin + cols, tile.rows[r]);
      for (int c = cols; c % 16; ++c) tile.rows[r][c] = 0;
    }
    if (mixture) add_mixture(*mixture, spread, row, rows, col, col - col_begin, cols, tile.rows[0], Tile::kStride);
  }
};

template <typename T>
void dequantize(const Nf4Params& w, const Nf4Mixture* mixture, int64_t row_begin, int64_t row_end, T* out) {
  Decoder decoder(w, mixture, 0, w.K);
  const Tile& tile = decoder.tile;
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int rows = static_cast<int>(row_end - row < kTileRows ? row_end - row : kTileRows);
    for (int64_t col = 0; col < w.K; col += kTileCols) {
      const int cols = static_cast<int>(w.K - col < kTileCols ? w.K - col : kTileCols);
      decoder.fill(row, rows, col, cols);
      for (int r = 0; r < rows; ++r) {
        T* to = out + (row - row_begin + r) * w.K + col;
        int c = 0;
        for (; c + kWidth <= cols; c += kWidth) store(to + c, load(tile.rows[r] + c));
        if (c < cols) store(to + c, load(tile.rows[r] + c), cols - c);
      }
    }
  }
}

MOKA_INLINE uint32_t most_bits(const float* v, int n, uint32_t most) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, v + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

// A full block is multiplied by the reciprocal, and keeps its absmax; a last, partial block is divided, and its absmax
// is raised to kNf4SmallestAbsmax: the two rules of bitsandbytes.
template <typename T>
void quantize(const T* w, int64_t numel, int64_t blocksize, int64_t block_begin, int64_t block_end, uint8_t* packed,
              float* absmax) {
  constexpr int kChunk = 64;
  float v[kChunk];
  int32_t codes[kChunk];
  const auto read = [&](int64_t at, int n) {
    int i = 0;
    for (; i + kWidth <= n; i += kWidth) store(v + i, load(w + at + i));
    if (i < n) store(v + i, load(w + at + i, n - i), n - i);
  };
  const auto chunk = [](int64_t left) { return static_cast<int>(left < kChunk ? left : kChunk); };
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = block * blocksize;
    const bool full = begin + blocksize <= numel;
    const int64_t end = full ? begin + blocksize : numel;
    uint32_t bits =
        0;  // of the largest |w|: bit patterns order like the values, a NaN above all, as torch's max has it
    for (int64_t at = begin; at < end; at += kChunk) {
      read(at, chunk(end - at));
      bits = most_bits(v, chunk(end - at), bits);
    }
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const float divisor = most < kNf4SmallestAbsmax ? kNf4SmallestAbsmax : most, reciprocal = 1.0f / divisor;
    absmax[block] = full ? most : divisor;
    for (int64_t at = begin; at < end; at += kChunk) {
      const int n = chunk(end - at);
      read(at, n);
      for (int i = n; i < kChunk; ++i) v[i] = 0;
      for (int i = 0; i < kChunk; ++i) {
        const float scaled = full ? v[i] * reciprocal : v[i] / divisor;
        int32_t code = 0;
        for (int t = 0; t < 15; ++t) code += !(scaled <= kNf4Bounds[t]);
        codes[i] = code;
      }
      if (n % 2) codes[n] = kNf4Zero;
      for (int i = 0; i < n; i += 2) packed[(at + i) / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
    }
  }
}

}  // namespace
}  // namespace MOKA_SIMD
}  // namespace moka
