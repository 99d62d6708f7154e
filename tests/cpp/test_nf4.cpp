// The NF4 kernels of every instruction set against plain loops. All buffers are heap blocks of exactly the needed size,
// so that AddressSanitizer sees one element too many. Returns nonzero at the first failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/nf4_codebook.h"
#include "kernels/nf4_cpu.h"

using namespace moka;

namespace {

void require(bool ok, const char* what, const char* where) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what, where);
  std::exit(1);
}

template <typename T>
struct Buffer {  // exactly `size` elements, from malloc
  explicit Buffer(int64_t size) : size(size), data(static_cast<T*>(std::malloc(size * sizeof(T)))) {}
  int64_t size;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data;
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data.get()[i]; }
};

std::mt19937 generator(0);

Buffer<float> normal(int64_t size, float scale = 1.0f) {
  std::normal_distribution<float> distribution;
  Buffer<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = scale * distribution(generator);
  return values;
}

struct Weight {
  Buffer<uint8_t> packed;
  Buffer<float> absmax, dense;
  Nf4Params params;

  Weight(int64_t N, int64_t K, int64_t blocksize)
      : packed((N * K + 1) / 2), absmax((N * K + blocksize - 1) / blocksize), dense(N * K) {
    for (int64_t i = 0; i < packed.size; ++i) packed[i] = static_cast<uint8_t>(generator());
    for (int64_t i = 0; i < absmax.size; ++i) absmax[i] = 0.5f + static_cast<float>(generator() % 1024) / 1024;
    params = {packed.get(), absmax.get(), nullptr, nullptr, nullptr, nullptr, blocksize, 256, N, K};
    for (int64_t e = 0; e < N * K; ++e)
      dense[e] = kNf4Code[e % 2 ? packed[e / 2] & 15 : packed[e / 2] >> 4] * absmax[e / blocksize];
  }
};

struct MixtureCase {
  std::vector<KronComponent> components;
  int64_t a_size = 0, b_size = 0;

  void add(int64_t ma, int64_t na, int64_t mb, int64_t nb, Identity identity = Identity::kNone) {
    components.push_back({ma, na, mb, nb, identity, a_size, b_size});
    if (identity != Identity::kA) a_size += ma * na;
    if (identity != Identity::kB) b_size += mb * nb;
  }
  double at(int64_t n, int64_t j, const float* A, const float* B, const float* alpha) const {
    double sum = 0;
    for (size_t i = 0; i < components.size(); ++i) {
      const KronComponent& c = components[i];
      const int64_t ia = n / c.mb, ib = n % c.mb, ja = j / c.nb, jb = j % c.nb;
      const double a = c.identity == Identity::kA ? ia == ja : A[c.a_offset + ia * c.na + ja];
      const double b = c.identity == Identity::kB ? ib == jb : B[c.b_offset + ib * c.nb + jb];
      sum += alpha[i] * a * b;
    }
    return sum;
  }
};

int64_t smallest_divisor(int64_t n) {
  for (int64_t d = 2; d <= n; ++d)
    if (n % d == 0) return d;
  return 1;
}

void test_products(const Weight& weight, const Nf4Mixture* mixture, const Buffer<float>& dense, const char* where) {
  const Nf4Kernels& kernels = nf4_kernels();
  const int64_t N = weight.params.N, K = weight.params.K;
  for (int64_t M : {1, 2, 3, 4, 5, 9}) {
    const Buffer<float> x = normal(M * K), dy = normal(M * N), y(M * N), dx(M * K);
    const int64_t middle_row = N / 2, middle_col = K / 2 / kColumnStep * kColumnStep;
    kernels.linear(weight.params, mixture, x.get(), M, 0, middle_row, y.get());
    kernels.linear(weight.params, mixture, x.get(), M, middle_row, N, y.get());
    kernels.linear_transposed(weight.params, mixture, dy.get(), M, 0, middle_col, dx.get());
    kernels.linear_transposed(weight.params, mixture, dy.get(), M, middle_col, K, dx.get());
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0, size = 1;
        for (int64_t k = 0; k < K; ++k) {
          const double term = static_cast<double>(x[m * K + k]) * dense[n * K + k];
          sum += term;
          size += std::abs(term);
        }
        require(std::abs(y[m * N + n] - sum) < 1e-6 * size, "y = x W'^T", where);
      }
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0, size = 1;
        for (int64_t n = 0; n < N; ++n) {
          const double term = static_cast<double>(dy[m * N + n]) * dense[n * K + k];
          sum += term;
          size += std::abs(term);
        }
        require(std::abs(dx[m * K + k] - sum) < 1e-6 * size, "dx = dy W'", where);
      }
    }
  }
}

void test_weight(int64_t N, int64_t K, int64_t blocksize, const char* where) {
  const Nf4Kernels& kernels = nf4_kernels();
  const Weight weight(N, K, blocksize);
  const Buffer<float> out(N * K);
  kernels.dequantize_f32(weight.params, nullptr, {0, N, 0, K}, out.get());
  require(std::memcmp(out.get(), weight.dense.get(), 4 * N * K) == 0, "dequantize, bit for bit", where);
  test_products(weight, nullptr, out, where);

  // fp32 -> bf16 -> fp32 drops the low 16 bits after rounding to nearest even
  const Buffer<Bfloat16> bf16(N * K);
  const Buffer<Float16> f16(N * K);
  kernels.dequantize_bf16(weight.params, nullptr, {0, N, 0, K}, bf16.get());
  kernels.dequantize_f16(weight.params, nullptr, {0, N, 0, K}, f16.get());
  for (int64_t e = 0; e < N * K; ++e) {
    uint32_t bits;
    std::memcpy(&bits, &out[e], 4);
    require(bf16[e].bits == (bits + 0x7fff + (bits >> 16 & 1)) >> 16, "rounding to bf16", where);
  }

  // A part: some rows of the columns from the middle on.
  const int64_t row = N / 3, col = K / 2 / kColumnStep * kColumnStep;
  const Buffer<float> part((N - row) * (K - col));
  kernels.dequantize_f32(weight.params, nullptr, {row, N, col, K}, part.get());
  for (int64_t n = row; n < N; ++n)
    require(std::memcmp(&part[(n - row) * (K - col)], &weight.dense[n * K + col], 4 * (K - col)) == 0, "a part", where);

  MixtureCase mix;
  const int64_t p = smallest_divisor(N), q = smallest_divisor(K);
  mix.add(N / p, q, p, K / q);
  mix.add(p, K / q, N / p, q);
  mix.add(N / p, q, p, K / q);
  mix.add(1, K, N, 1);
  mix.add(N, 1, 1, K);
  if (N % q == 0) mix.add(q, q, N / q, K / q, Identity::kA);
  if (N % q == 0) mix.add(N / q, K / q, q, q, Identity::kB);
  if (K % 48 == 0) mix.add(N, K / 48, 1, 48);  // a period that divides neither a tile nor a vector's multiple
  const Buffer<float> A = normal(mix.a_size, 0.3f), B = normal(mix.b_size, 0.3f);
  const Buffer<float> alpha = normal(static_cast<int64_t>(mix.components.size()));
  const KronParams params{mix.components.data(), static_cast<int64_t>(mix.components.size()), N, K};
  const Nf4Mixture mixture(params, A.get(), B.get(), alpha.get());
  kernels.dequantize_f32(weight.params, &mixture, {0, N, 0, K}, out.get());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < K; ++j)
      require(std::abs(out[n * K + j] - (weight.dense[n * K + j] + mix.at(n, j, A.get(), B.get(), alpha.get()))) < 3e-6,
              "the merged mixture", where);
  test_products(weight, &mixture, out, where);
}

// The code of each value by the definition: the thresholds below it are counted.
void test_quantize(int64_t numel, int64_t blocksize, float scale, const char* where) {
  const Buffer<float> w = normal(numel, scale), absmax((numel + blocksize - 1) / blocksize);
  for (int64_t i = 0; i < numel / 5; ++i) w[i] = 0;
  const Buffer<uint8_t> packed((numel + 1) / 2);
  nf4_kernels().quantize_f32(w.get(), numel, blocksize, 0, absmax.size, packed.get(), absmax.get());
  for (int64_t e = 0; e < numel; ++e) {
    const int64_t begin = e / blocksize * blocksize;
    const bool full = begin + blocksize <= numel;
    float most = 0;
    for (int64_t i = begin; i < (full ? begin + blocksize : numel); ++i) most = std::max(most, std::abs(w[i]));
    const float divisor = std::max(most, kNf4SmallestAbsmax);
    require(absmax[e / blocksize] == (full ? most : divisor), "absmax", where);
    const float scaled = full ? w[e] * (1.0f / divisor) : w[e] / divisor;
    int code = 0;
    while (code < 15 && kNf4Bounds[code] < scaled) ++code;
    require((e % 2 ? packed[e / 2] & 15 : packed[e / 2] >> 4) == code, "code", where);
  }
  if (numel % 2) require((packed[numel / 2] & 15) == kNf4Zero, "the unused nibble", where);
}

// Double quantization: the product is rounded before the sum.
void test_nested() {
  const uint8_t packed[1] = {0xf0}, absmax_q[1] = {3};
  float code2[256] = {}, absmax2[1] = {1.0f + 0x1p-12f}, offset[1] = {-(1.0f + 0x1p-11f)};
  code2[3] = 1.0f + 0x1p-12f;  // the product is 1 + 2^-11 + 2^-24: rounded, it cancels with the offset
  const Nf4Params w{packed, nullptr, absmax_q, absmax2, code2, offset, 64, 256, 1, 2};
  float out[2];
  nf4_kernels().dequantize_f32(w, nullptr, {0, 1, 0, 2}, out);
  require(out[0] == 0 && out[1] == 0, "double quantization without FMA", isa_name(active_isa()));
}

}  // namespace

int main() {
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    if (!set_isa(isa)) {
      std::printf("%s: not available on this CPU\n", isa);
      continue;
    }
    const int64_t sizes[][3] = {{1, 1, 64},     {3, 17, 32},  {17, 31, 64},  {31, 33, 64},  {33, 33, 64}, {63, 65, 32},
                                {65, 127, 6},   {1, 257, 64}, {8, 1024, 64}, {10, 128, 64}, {12, 48, 16}, {5, 576, 64},
                                {24, 600, 128}, {5, 624, 48}, {16, 544, 32}, {257, 3, 4096}};
    for (const auto& [N, K, blocksize] : sizes) {
      char where[80];
      std::snprintf(where, sizeof(where), "%s, %lld x %lld, blocks of %lld", isa, (long long)N, (long long)K,
                    (long long)blocksize);
      test_weight(N, K, blocksize, where);
      for (float scale : {1.0f, 1e-37f, 1e-39f, 1e-44f}) test_quantize(N * K, blocksize, scale, where);
    }
    test_nested();
    std::printf("%s: ok\n", isa);
  }
  require(!set_isa("sse9"), "an unknown instruction set is refused", "set_isa");
  return 0;
}
