// The Kronecker kernels against the definition, on integers (so bits must agree) and on buffers of exactly the needed
// size, so that AddressSanitizer sees any access beyond them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/kron_kernels.h"
#include "kernels/simd.h"

namespace {

using moka::Identity;
using moka::KronComponent;
using moka::KronUse;

template <class T>
using Buffer = std::unique_ptr<T[]>;  // a heap block of its own, without spare capacity

uint32_t random_state = 1;
int random_integer() {  // -2..2
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int>(random_state >> 16) % 5 - 2;
}

template <class T>
Buffer<T> integers(int64_t n) {
  Buffer<T> b(new T[n]);
  for (int64_t i = 0; i < n; ++i) b[i] = static_cast<T>(random_integer());
  return b;
}

template <class T>
Buffer<T> zeros(int64_t n) {
  return Buffer<T>(new T[n]());
}

int failures = 0;
void check(bool ok, const char* what, const char* isa, int test_case, int64_t index) {
  if (ok) return;
  if (++failures <= 20)
    std::printf("FAILED %s: %s, case %d, element %ld\n", what, isa, test_case, static_cast<long>(index));
}

struct Shape {
  int64_t ma, na, mb, nb;
  Identity identity;
};

constexpr Identity kNone = Identity::kNone, kA = Identity::kA, kB = Identity::kB;
const std::vector<std::vector<Shape>> kCases = {
    {{1, 1, 1, 1, kNone}},
    {{3, 5, 7, 2, kNone}, {7, 2, 3, 5, kNone}, {3, 5, 7, 2, kNone}},
    {{17, 31, 13, 2, kNone}, {13, 1, 17, 62, kNone}},
    {{4, 32, 24, 4, kNone}, {24, 4, 4, 32, kNone}, {12, 16, 8, 8, kNone}, {12, 16, 8, 8, kNone}},
    {{6, 6, 4, 5, kA}, {4, 5, 6, 6, kB}, {6, 6, 4, 5, kA}, {4, 10, 6, 3, kNone}},
    {{24, 24, 3, 3, kB}, {3, 3, 24, 24, kA}, {24, 24, 3, 3, kNone}},
};

template <class T>
void run(int test_case, const moka::KronKernels<T>& kernels, const char* isa) {
  std::vector<KronComponent> components;
  int64_t a_numel = 0, b_numel = 0, N = 0, K = 0;
  for (const Shape& s : kCases[test_case]) {
    components.push_back({s.ma, s.na, s.mb, s.nb, s.identity, a_numel, b_numel});
    if (s.identity != kA) a_numel += s.ma * s.na;
    if (s.identity != kB) b_numel += s.mb * s.nb;
    N = s.ma * s.mb;
    K = s.na * s.nb;
  }
  const auto r = static_cast<int64_t>(components.size());
  const moka::KronParams params{components.data(), r, N, K};
  const int64_t rows = 5;
  const auto A = integers<T>(a_numel), B = integers<T>(b_numel), x = integers<T>(rows * K), dy = integers<T>(rows * N);
  auto alpha = zeros<T>(r);
  for (int64_t i = 0; i < r; ++i) alpha[i] = static_cast<T>(i % 2 ? 0.5 : 2.0);

  const auto factor_a = [&](const KronComponent& c, int64_t i, int64_t j) -> double {
    return c.identity == kA ? i == j : A[c.a_offset + i * c.na + j];
  };
  const auto factor_b = [&](const KronComponent& c, int64_t i, int64_t j) -> double {
    return c.identity == kB ? i == j : B[c.b_offset + i * c.nb + j];
  };
  std::vector<double> W(N * K), G(N * K);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < r; ++i) {
        const KronComponent& c = components[i];
        W[n * K + k] += alpha[i] * factor_a(c, n / c.mb, k / c.nb) * factor_b(c, n % c.mb, k % c.nb);
      }
      for (int64_t t = 0; t < rows; ++t) G[n * K + k] += static_cast<double>(dy[t * N + n]) * x[t * K + k];
    }

  const auto plan_for = [&](KronUse use) { return moka::plan_kron<T>(params, A.get(), B.get(), alpha.get(), use); };
  const auto groups_of = [&](const moka::KronPlan<T>& plan) {
    return moka::KronGroups<T>{plan.groups.data(), static_cast<int64_t>(plan.groups.size()), N, K};
  };

  for (const bool transpose : {false, true}) {
    const auto plan = plan_for(transpose ? KronUse::kMixTranspose : KronUse::kMix);
    const int64_t in = transpose ? N : K, out = transpose ? K : N;
    auto y = zeros<T>(rows * out), scratch = zeros<T>(rows * plan.scratch_per_token);
    const T* v = transpose ? dy.get() : x.get();
    kernels.mix(groups_of(plan), v, y.get(), rows, in, out, scratch.get());
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < in; ++i) sum += (transpose ? W[i * K + o] : W[o * K + i]) * v[t * in + i];
        check(y[t * out + o] == sum, transpose ? "mix transposed" : "mix", isa, test_case, t * out + o);
      }
  }

  const auto check_gradients = [&](const moka::KronPlan<T>& plan, const T* accumulator, const char* what) {
    auto grad_A = zeros<T>(a_numel), grad_B = zeros<T>(b_numel), grad_alpha = zeros<T>(r);
    moka::finish_gradients<T>(plan, params, accumulator, A.get(), B.get(), alpha.get(), grad_A.get(), grad_B.get(),
                              grad_alpha.get());
    std::vector<double> dA(a_numel), dB(b_numel), dalpha(r);
    for (int64_t i = 0; i < r; ++i) {
      const KronComponent& c = components[i];
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) {
          const double g = G[n * K + k], a = factor_a(c, n / c.mb, k / c.nb), b = factor_b(c, n % c.mb, k % c.nb);
          if (c.identity != kA) dA[c.a_offset + n / c.mb * c.na + k / c.nb] += alpha[i] * g * b;
          if (c.identity != kB) dB[c.b_offset + n % c.mb * c.nb + k % c.nb] += alpha[i] * g * a;
          dalpha[i] += g * a * b;
        }
    }
    for (int64_t e = 0; e < a_numel; ++e) check(grad_A[e] == dA[e], what, isa, test_case, e);
    for (int64_t e = 0; e < b_numel; ++e) check(grad_B[e] == dB[e], what, isa, test_case, e);
    for (int64_t e = 0; e < r; ++e) check(grad_alpha[e] == dalpha[e], what, isa, test_case, e);
  };

  {
    const auto plan = plan_for(KronUse::kGrad);
    auto sums = zeros<T>(plan.accumulator), scratch = zeros<T>((rows - 1) * plan.scratch_per_token);
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, rows - 2}, {rows - 2, 2}})  // two blocks add up
      kernels.grad(groups_of(plan), x.get() + first * K, dy.get() + first * N, count, sums.get(), scratch.get());
    check_gradients(plan, sums.get(), "grad by token");
  }
  {
    const auto plan = plan_for(KronUse::kContract);
    auto sums = zeros<T>(plan.accumulator), scratch = zeros<T>(plan.scratch_per_token);
    const int64_t height = N / 3 + 1;  // panels that cut components in the middle
    for (int64_t row = 0; row < N; row += height) {
      const int64_t count = N - row < height ? N - row : height;
      auto panel = zeros<T>(count * K);
      for (int64_t e = 0; e < count * K; ++e) panel[e] = static_cast<T>(G[row * K + e]);
      for (const auto& group : plan.groups) {
        if (group.grad_a >= 0) kernels.contract_a(group, panel.get(), row, count, K, sums.get(), scratch.get());
        if (group.grad_b >= 0) kernels.contract_b(group, panel.get(), row, count, K, sums.get());
      }
    }
    check_gradients(plan, sums.get(), "grad by panel");
  }
  {
    const auto plan = plan_for(KronUse::kDense);
    const int64_t first = N / 3, count = N - first;
    auto w = zeros<T>(count * K);
    kernels.add_dense(groups_of(plan), w.get(), first, count);
    for (int64_t e = 0; e < count * K; ++e) check(w[e] == W[first * K + e], "add_dense", isa, test_case, e);
  }
}

}  // namespace

int main() {
  for (int test_case = 0; test_case < static_cast<int>(kCases.size()); ++test_case) {
    for (const char* isa : {"scalar", "avx2", "avx512"}) {
      if (moka::set_isa(isa))
        run(test_case, moka::active_kron_kernels<float>(), isa);
      else if (test_case == 0)
        std::printf("skipped: this CPU has no %s\n", isa);
    }
    run(test_case, moka::active_kron_kernels<double>(), "fp64");
  }
  std::printf(failures ? "%d failures\n" : "kron kernels: all cases agree\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
