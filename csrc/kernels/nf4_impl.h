// Decoding and encoding of NF4, written once for every instruction set (simd.h has the recipe).
//
// W' is decoded in tiles of kTileRows x kTileCols fp32 that stay in the L1 cache. The 16 code values are multiplied by
// the block's absmax first, so that one table look-up per entry gives the rounded product.

namespace moka {
namespace MOKA_SIMD {
namespace {

constexpr int kTileRows = 8, kTileCols = 512;

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

// kWidth bytes: their high nibbles are the even entries, their low nibbles the odd ones.
MOKA_INLINE void decode_split(const uint8_t* bytes, const Table& table, Vec& even, Vec& odd) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  even = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table.values);
  odd = _mm512_permutexvar_ps(index, table.values);
}

#elif defined(MOKA_SIMD_AVX2) && MOKA_X86

struct Table {
  Vec low, high;
};
MOKA_INLINE Table scaled_code(float absmax) {
  return {mul(load(kNf4Code), set1(absmax)), mul(load(kNf4Code + 8), set1(absmax))};
}

// Two look-ups of three bits each; bit 3, moved to the sign, chooses between them.
MOKA_INLINE Vec look_up(__m256i index, const Table& table) {
  const Vec sign = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          sign);
}
MOKA_INLINE void decode_split(const uint8_t* bytes, const Table& table, Vec& even, Vec& odd) {
  const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  even = look_up(_mm256_srli_epi32(index, 4), table);
  odd = look_up(index, table);
}
MOKA_INLINE void decode16(const uint8_t* bytes, const Table& table, float* out) {
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (int half = 0; half < 2; ++half) {
    int32_t dword;
    __builtin_memcpy(&dword, bytes + 4 * half, 4);
    store(out + 8 * half, look_up(_mm256_srlv_epi32(_mm256_set1_epi32(dword), shifts), table));
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
MOKA_INLINE void decode_split(const uint8_t* bytes, const Table& table, Vec& even, Vec& odd) {
  for (int i = 0; i < kWidth; ++i) {
    even[i] = table.values[bytes[i] >> 4];
    odd[i] = table.values[bytes[i] & 15];
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

  // to = W'[row : row + rows, col : col + cols], in rows of `stride` that hold a multiple of 16 columns; the columns
  // after `cols` become 0. A row may be overrun by one vector while it is decoded unless `aligned`.
  MOKA_INLINE void fill(int64_t row, int rows, int64_t col, int cols, float* to, int64_t stride) {
    for (int r = 0; r < rows; ++r) {
      const int64_t begin = (row + r) * w.K + col;
      decode(w, begin, begin + cols, to + r * stride);
      for (int c = cols; c % 16; ++c) to[r * stride + c] = 0;
    }
    if (mixture) add_mixture(*mixture, spread, row, rows, col, col - col_begin, cols, to, stride);
  }
  MOKA_INLINE void fill(int64_t row, int rows, int64_t col, int cols) {
    fill(row, rows, col, cols, tile.rows[0], Tile::kStride);
  }

  // Whether every run of entries that is decoded at once is a whole number of vectors.
  bool aligned(int64_t cols) const { return w.K % 16 == 0 && w.blocksize % 16 == 0 && cols % 16 == 0; }
};

MOKA_INLINE int at_most(int64_t left, int most) { return static_cast<int>(left < most ? left : most); }

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

template <typename T>
void dequantize(const Nf4Params& w, const Nf4Mixture* mixture, const Nf4Part& part, T* out) {
  Decoder decoder(w, mixture, part.col_begin, part.col_end);
  const int64_t ld = part.col_end - part.col_begin;
  for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
    const int rows = at_most(part.row_end - row, kTileRows);
    for (int64_t col = part.col_begin; col < part.col_end; col += kTileCols) {
      const int cols = at_most(part.col_end - col, kTileCols);
      T* to = out + (row - part.row_begin) * ld + col - part.col_begin;
      if constexpr (kIsFloat<T>) {
        if (decoder.aligned(cols)) {
          decoder.fill(row, rows, col, cols, to, ld);
          continue;
        }
      }
      decoder.fill(row, rows, col, cols);
      for (int r = 0; r < rows; ++r) {
        const float* from = decoder.tile.rows[r];
        int c = 0;
        for (; c + kWidth <= cols; c += kWidth) store(to + r * ld + c, load(from + c));
        if (c < cols) store(to + r * ld + c, load(from + c), cols - c);
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
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = block * blocksize;
    const bool full = begin + blocksize <= numel;
    const int64_t end = full ? begin + blocksize : numel;
    uint32_t bits =
        0;  // of the largest |w|: bit patterns order like the values, a NaN above all, as torch's max has it
    for (int64_t at = begin; at < end; at += kChunk) {
      const int n = at_most(end - at, kChunk);
      read(at, n);
      bits = most_bits(v, n, bits);
    }
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const float divisor = most < kNf4SmallestAbsmax ? kNf4SmallestAbsmax : most, reciprocal = 1.0f / divisor;
    absmax[block] = full ? most : divisor;
    for (int64_t at = begin; at < end; at += kChunk) {
      const int n = at_most(end - at, kChunk);
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
