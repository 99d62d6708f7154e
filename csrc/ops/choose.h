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
  bool fused;          // straight from the packed weight; otherwise panels of rows of W' and a GEMM for each
  bool merged;         // the mixture is added to W while it is decoded; otherwise kron_mix adds it to the result
  int64_t panel_rows;  // rows of one panel

  std::string str() const {
    std::ostringstream out;
    out << (fused ? "fused" : "panels of " + std::to_string(panel_rows) + " rows")
        << (merged ? ", mixture merged" : ", mixture factored");
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

// Measured on two AVX-512 cores (Sapphire Rapids) with benchmarks/bench_nf4.py, layers 576x576 to 4096x4096:
//   kFusedTokens   above it the GEMM library overtakes the fused kernel in spite of the panels' traffic;
//   kPanelBytes    smaller panels starve the GEMM, larger ones leave the cache. This bounds the decoded part of W;
//   kFactoredGain  how many multiply-adds of the factored path take the time of one multiply-add of the merged path.
inline Nf4Choice choose_nf4_linear(int64_t M, int64_t N, int64_t K, at::ScalarType compute, const Mixture* mix,
                                   c10::string_view path) {
  constexpr int64_t kFusedTokens = 16, kPanelBytes = 4 << 20, kPanelStep = 16;
  constexpr double kFactoredGain = 1.0;
  TORCH_CHECK_VALUE(path == "auto" || path == "merged" || path == "factored",
                    "path: expected 'auto', 'merged' or 'factored', got '", path, "'");
  const bool fused = M <= kFusedTokens && compute == at::kFloat;
  bool merged = mix != nullptr && path == "merged";
  if (mix && path == "auto") {
    const double merged_cost = static_cast<double>(N) * static_cast<double>(K * (int64_t)mix->components.size());
    merged = static_cast<double>(M) * factored_cost(*mix) > kFactoredGain * merged_cost;
  }
  const int64_t row_bytes = std::max<int64_t>(1, K * static_cast<int64_t>(c10::elementSize(compute)));
  const int64_t most = std::clamp<int64_t>(kPanelBytes / row_bytes, kPanelStep, std::max(N, kPanelStep));
  const int64_t panels = std::max<int64_t>(1, (N + most - 1) / most);
  const int64_t even = (N + panels - 1) / panels;  // panels of equal size
  return {fused, merged, (even + kPanelStep - 1) / kPanelStep * kPanelStep};
}
static_assert(kMaxFusedTokens >= 16);

}  // namespace moka
