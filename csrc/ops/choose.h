// The one place that decides how nf4_linear runs on the CPU: which kernel, and how the mixture is added.
#pragma once

#include <ATen/core/ScalarType.h>
#include <c10/util/string_view.h>

#include <algorithm>
#include <sstream>
#include <string>

#include "../checks.h"
#include "../kernels/nf4_cpu.h"

namespace moka {

struct Nf4Choice {
  bool fused;     // straight from the packed weight; otherwise panels of W', each followed by a GEMM
  bool mixed;     // there is a mixture
  bool merged;    // it is added to W while W is decoded; otherwise kron_mix adds it to the result
  int64_t panel;  // width of a panel along the dimension that is summed over

  std::string str() const {
    std::ostringstream out;
    out << (fused ? "fused" : "panels of " + std::to_string(panel))
        << (merged  ? ", mixture merged"
            : mixed ? ", mixture factored"
                    : "");
    return out.str();
  }
};

// Multiply-adds per token of the mixture, each component in its cheaper order; an identity factor costs nothing.
inline double factored_cost(const Mixture& mix) {
  double cost = 0;
  for (const KronComponent& c : mix.components) {
    const double a_side = c.identity == Identity::kA ? 0 : static_cast<double>(c.ma * c.na);
    const double b_side = c.identity == Identity::kB ? 0 : static_cast<double>(c.mb * c.nb);
    const auto nb = static_cast<double>(c.nb), na = static_cast<double>(c.na);
    const auto ma = static_cast<double>(c.ma), mb = static_cast<double>(c.mb);
    cost += std::min(a_side * nb + b_side * ma, b_side * na + a_side * mb);
  }
  return cost;
}

// Measured on two AVX-512 cores (Sapphire Rapids, 2 MiB of L2 each), layers of 576x576 to 4096x4096, both alternatives
// in turn in one process (as benchmarks/bench_ops.py does), the least CPU time of one thread:
//   kFusedTokens, kFusedTokensTransposed   above them the GEMM library overtakes the fused kernel: at 4096x4096 and
//       M = 32, 13.0 ms fused against 15.5 ms in panels forward, but 12.5 against 11.5 ms for dx;
//   kPanel   narrower panels make the GEMM read and write its result too often (256 and 512 tie; 128 costs 15%), and
//       decode more slowly. A layer is cut in two at least, so W is never decoded as a whole;
//   kFactoredGain   the multiply-adds that the factored path does in the time of one of the merged path: with the ten
//       balanced components they meet at about M = 130 for 4096x4096 (2.0) and M = 34 for 576x576 (1.4).
inline Nf4Choice choose_nf4_linear(int64_t M, int64_t N, int64_t K, bool transpose, at::ScalarType compute,
                                   const Mixture* mix, c10::string_view path) {
  constexpr int64_t kFusedTokens = 32, kFusedTokensTransposed = 16, kPanel = 512;
  constexpr double kFactoredGain = 1.6;
  static_assert(kFusedTokens <= kMaxFusedTokens && kFusedTokensTransposed <= kMaxFusedTokens);
  check_path(path);
  bool merged = mix != nullptr && path == "merged";
  if (mix && path == "auto") {
    const double merged_cost = static_cast<double>(N * K) * static_cast<double>(mix->components.size());
    merged = static_cast<double>(M) * factored_cost(*mix) > kFactoredGain * merged_cost;
  }
  const int64_t summed = transpose ? N : K;
  const int64_t panels = std::max<int64_t>(2, (summed + kPanel - 1) / kPanel);
  const int64_t width = (summed + panels - 1) / panels;  // all panels of about one width
  return {compute == at::kFloat && M <= (transpose ? kFusedTokensTransposed : kFusedTokens), mix != nullptr, merged,
          (width + kColumnStep - 1) / kColumnStep * kColumnStep};
}

inline std::string describe_nf4_linear(int64_t tokens, int64_t N, int64_t K, const std::vector<int64_t>& shapes,
                                       bool transpose, const std::string& path) {
  std::optional<Mixture> mix;
  if (!shapes.empty()) mix = parse_shapes(shapes);
  return choose_nf4_linear(tokens, N, K, transpose, at::kFloat, mix ? &*mix : nullptr, path).str();
}

}  // namespace moka
