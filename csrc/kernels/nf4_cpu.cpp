#include "nf4_cpu.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <tuple>

namespace moka {

extern const Nf4Kernels kNf4Scalar, kNf4Avx2, kNf4Avx512;

const Nf4Kernels& nf4_kernels() { return *select_isa(&kNf4Scalar, &kNf4Avx2, &kNf4Avx512); }

namespace {

constexpr int64_t kLanes = 16;  // of the widest vector
constexpr std::align_val_t kCacheLine{64};

int64_t period_of(int64_t nb) {
  constexpr int64_t kLongestPeriod = 256;  // bounds the memory that repeating a row takes
  const int64_t aligned = std::lcm(nb, kLanes);
  return aligned <= std::max(nb, kLongestPeriod) ? aligned : nb;
}

int64_t stride_of(int64_t period) { return period % kLanes == 0 ? period : period + kLanes; }

int64_t repeated_size(const KronParams& params) {
  int64_t size = 0;
  for (int64_t i = 0; i < params.r; ++i)
    size += params.components[i].mb * stride_of(period_of(params.components[i].nb));
  return size;
}

int64_t slot_count(const Nf4Mixture::Term& term, int64_t tile_rows) {
  const int64_t needed = std::min(term.ma, (tile_rows - 1) / term.mb + 2);
  int64_t count = 1;
  while (count < needed) count *= 2;
  return count;
}

int64_t all_slots(const Nf4Mixture* mixture, int64_t tile_rows) {
  int64_t count = 0;
  if (mixture)
    for (const Nf4Mixture::Term& term : mixture->dense) count += slot_count(term, tile_rows);
  return count;
}

}  // namespace

AlignedFloats::AlignedFloats(int64_t count) : data_(new (kCacheLine) float[static_cast<size_t>(count)]) {}
AlignedFloats::~AlignedFloats() { operator delete[](data_, kCacheLine); }

Nf4Mixture::Nf4Mixture(const KronParams& params, const float* A, const float* B, const float* alpha)
    : repeated_b_(repeated_size(params)) {
  float* next = repeated_b_.data();
  for (int64_t i = 0; i < params.r; ++i) {
    const KronComponent& c = params.components[i];
    Term term{c.ma, c.na, c.mb, c.nb, alpha[i], nullptr, nullptr, period_of(c.nb), 0};
    term.b_stride = stride_of(term.period);
    if (c.identity != Identity::kA) term.a = A + c.a_offset;
    if (c.identity != Identity::kB) {
      term.b = next;
      for (int64_t ib = 0; ib < c.mb; ++ib, next += term.b_stride) {
        const float* from = B + c.b_offset + ib * c.nb;
        for (int64_t j = 0; j < term.b_stride; j += c.nb)
          std::copy_n(from, std::min(c.nb, term.b_stride - j), next + j);
      }
    }
    (c.identity == Identity::kNone ? dense : identity).push_back(term);
  }
  std::stable_sort(dense.begin(), dense.end(),
                   [](const Term& s, const Term& t) { return std::tie(s.mb, s.nb) < std::tie(t.mb, t.nb); });
}

Nf4Mixture::~Nf4Mixture() = default;

Nf4SpreadRows::Nf4SpreadRows(const Nf4Mixture* mixture, int64_t col_begin, int64_t col_end, int64_t tile_rows)
    : mixture_(mixture),
      col_begin_(col_begin),
      col_end_(col_end),
      width_((col_end - col_begin + kLanes - 1) / kLanes * kLanes),
      held_(static_cast<size_t>(all_slots(mixture, tile_rows)), -1),
      values_(static_cast<int64_t>(held_.size()) * width_) {
  std::fill_n(values_.data(), held_.size() * static_cast<size_t>(width_), 0.0f);
  if (!mixture) return;
  int64_t slot = 0;
  for (const Nf4Mixture::Term& term : mixture->dense) {
    const int64_t count = slot_count(term, tile_rows);
    slots_.push_back({count - 1, held_.data() + slot, values_.data() + slot * width_});
    slot += count;
  }
}

Nf4SpreadRows::~Nf4SpreadRows() = default;

void Nf4SpreadRows::spread(size_t index, int64_t ia) {
  const Nf4Mixture::Term& term = mixture_->dense[index];
  const int64_t slot = ia & slots_[index].mask;
  slots_[index].held[slot] = ia;
  const float* a = term.a + ia * term.na;
  float* out = slots_[index].values + slot * width_;
  for (int64_t ja = col_begin_ / term.nb, j = col_begin_; j < col_end_; ++ja) {
    const int64_t stop = std::min((ja + 1) * term.nb, col_end_);
    out = std::fill_n(out, stop - j, term.alpha * a[ja]);
    j = stop;
  }
}

}  // namespace moka
