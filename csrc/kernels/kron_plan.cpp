#include "kron_plan.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace moka {
namespace {

constexpr double kLanes = 16;  // of the widest instruction set; only ranks the orders

double padded(int64_t n) { return static_cast<double>((n + 15) / 16) * kLanes; }

// Multiply-adds per token of y = (A kron B) x, both orders.
double mix_cost(int64_t ma, int64_t na, int64_t mb, int64_t nb, int64_t g, bool a_first) {
  const double in = static_cast<double>(na * nb), out = static_cast<double>(ma * mb);
  return a_first ? static_cast<double>(g * ma * na) * padded(nb) + static_cast<double>(g * nb * ma) * padded(mb)
                 : in * padded(g * mb) + static_cast<double>(g * na) * out / static_cast<double>(mb) * padded(mb);
}

// Multiply-adds per token of P = dY B, V = A X, dB = dY^T V, dA = P X^T.
double grad_cost(int64_t ma, int64_t na, int64_t mb, int64_t nb, int64_t g, Identity identity) {
  const double in = static_cast<double>(na * nb), out = static_cast<double>(ma * mb);
  if (identity == Identity::kA) return out * padded(nb);
  if (identity == Identity::kB) return in * padded(ma);
  return 2 * out * padded(g * nb) + static_cast<double>(g * ma * na) * padded(nb) + in * padded(g * ma);
}

// dst[i*dst_row + j*dst_col] += scale * src[i*src_row + j*src_col]
template <class T>
void add_strided(const T* src, int64_t src_row, int64_t src_col, int64_t rows, int64_t cols, T scale, T* dst,
                 int64_t dst_row, int64_t dst_col) {
  if (src_col == 1 && dst_col == 1) {  // a loop the compiler can vectorize
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) dst[i * dst_row + j] += scale * src[i * src_row + j];
    return;
  }
  constexpr int64_t kBlock = 16;  // a block of both sides stays in the cache when one is transposed
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock)
    for (int64_t j0 = 0; j0 < cols; j0 += kBlock)
      for (int64_t i = i0; i < std::min(rows, i0 + kBlock); ++i)
        for (int64_t j = j0; j < std::min(cols, j0 + kBlock); ++j)
          dst[i * dst_row + j * dst_col] += scale * src[i * src_row + j * src_col];
}

struct Layout {  // of the packed B: strides of component, row ib and column jb
  int64_t component, row, col;
};

template <class T>
Layout b_layout(const KronGroup<T>& q, KronUse use) {
  const int64_t g = q.count;
  switch (use) {
    case KronUse::kMix:
    case KronUse::kMixTranspose:
      return q.a_first ? Layout{q.nb * q.mb, 1, q.mb} : Layout{q.mb, 1, g * q.mb};
    case KronUse::kGrad:
      return {q.nb, g * q.nb, 1};
    case KronUse::kContract:
      return {1, q.nb * g, g};
    case KronUse::kDense:
      break;
  }
  return {q.mb * q.nb, q.nb, 1};
}

}  // namespace

template <class T>
KronPlan<T> plan_kron(const KronParams& params, const T* A, const T* B, const T* alpha, KronUse use, bool need_a,
                      bool need_b) {
  KronPlan<T> plan;
  using Key = std::tuple<int64_t, int64_t, int64_t, Identity>;
  std::vector<Key> keys;
  for (int64_t i = 0; i < params.r; ++i) {
    const KronComponent& c = params.components[i];
    const Key key{c.ma, c.na, c.mb, c.identity};
    const size_t found = std::find(keys.begin(), keys.end(), key) - keys.begin();
    if (found == keys.size()) {
      keys.push_back(key);
      plan.members.emplace_back();
    }
    plan.members[found].push_back(i);
  }

  const bool gradient = use == KronUse::kGrad || use == KronUse::kContract;
  int64_t factor_elems = 0;
  for (const auto& members : plan.members) {
    const KronComponent& c = params.components[members[0]];
    const bool identity = c.identity != Identity::kNone;
    KronGroup<T> q{c.ma,       c.na, c.mb,  c.nb,    identity ? 1 : static_cast<int64_t>(members.size()),
                   c.identity, true, false, nullptr, nullptr,
                   -1,         -1};
    const auto turn = [&q] {
      std::swap(q.ma, q.na);
      std::swap(q.mb, q.nb);
    };
    if (use == KronUse::kMixTranspose) turn();
    if (use == KronUse::kMix || use == KronUse::kMixTranspose) {
      const double a_cost = mix_cost(q.ma, q.na, q.mb, q.nb, q.count, true);
      const double b_cost = mix_cost(q.ma, q.na, q.mb, q.nb, q.count, false);
      q.a_first = a_cost <= b_cost;
      plan.cost += std::min(a_cost, b_cost);
      plan.scratch_per_token = std::max(plan.scratch_per_token, q.count * (q.a_first ? q.ma * q.nb : q.na * q.mb));
    } else if (use == KronUse::kGrad) {
      const double cost = grad_cost(q.ma, q.na, q.mb, q.nb, q.count, q.identity);
      const double turned = grad_cost(q.na, q.ma, q.nb, q.mb, q.count, q.identity);
      if (turned < cost) {
        turn();
        q.flipped = true;
      }
      plan.cost += std::min(cost, turned);
      plan.scratch_per_token = std::max(plan.scratch_per_token, 2 * q.count * q.ma * q.nb);
    } else if (use == KronUse::kContract) {
      plan.scratch_per_token = std::max(plan.scratch_per_token, q.count * q.na);
    }
    if (gradient && need_a && q.identity != Identity::kA) {
      q.grad_a = plan.accumulator;
      plan.accumulator += q.na * q.count * q.ma;
    }
    if (gradient && need_b && q.identity != Identity::kB) {
      q.grad_b = plan.accumulator;
      plan.accumulator += q.mb * q.count * q.nb;
    }
    if (q.identity != Identity::kA) factor_elems += q.count * q.ma * q.na;
    if (q.identity != Identity::kB) factor_elems += q.count * q.mb * q.nb;
    plan.groups.push_back(q);
  }

  plan.factors.assign(factor_elems, T(0));
  T* next = plan.factors.data();
  for (size_t index = 0; index < plan.groups.size(); ++index) {
    KronGroup<T>& q = plan.groups[index];
    const bool turned = q.flipped || use == KronUse::kMixTranspose;
    T *a = nullptr, *b = nullptr;
    if (q.identity != Identity::kA) q.a = a = std::exchange(next, next + q.count * q.ma * q.na);
    if (q.identity != Identity::kB) q.b = b = std::exchange(next, next + q.count * q.mb * q.nb);
    const Layout layout = b_layout(q, use);
    for (size_t m = 0; m < plan.members[index].size(); ++m) {
      const int64_t i = plan.members[index][m];
      const KronComponent& c = params.components[i];
      const int64_t slot = q.count == 1 ? 0 : static_cast<int64_t>(m);  // identity components add up in slot 0
      const T scale = gradient ? T(1) : alpha[i];
      if (a) {
        add_strided(A + c.a_offset, turned ? 1 : c.na, turned ? c.na : 1, q.ma, q.na, b ? T(1) : scale,
                    a + slot * q.ma * q.na, q.na, int64_t{1});
      }
      if (b) {
        add_strided(B + c.b_offset, turned ? 1 : c.nb, turned ? c.nb : 1, q.mb, q.nb, scale,
                    b + slot * layout.component, layout.row, layout.col);
      }
    }
  }
  return plan;
}

template <class T>
void finish_gradients(const KronPlan<T>& plan, const KronParams& params, const T* accumulator, const T* A, const T* B,
                      const T* alpha, T* grad_A, T* grad_B, T* grad_alpha) {
  for (size_t index = 0; index < plan.groups.size(); ++index) {
    const KronGroup<T>& q = plan.groups[index];
    for (size_t m = 0; m < plan.members[index].size(); ++m) {
      const int64_t i = plan.members[index][m];
      const KronComponent& c = params.components[i];
      const int64_t slot = q.count == 1 ? 0 : static_cast<int64_t>(m);
      // One factor's gradient: raw[p*row + s*col] in the component's own orientation.
      const auto finish = [&](const T* raw, int64_t row, int64_t col, int64_t rows, int64_t cols, const T* factor,
                              T* grad, bool take_alpha) {
        double inner = 0;
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t s = 0; s < cols; ++s) {
            const T value = raw[p * row + s * col];
            inner += static_cast<double>(value) * static_cast<double>(factor[p * cols + s]);
            if (grad) grad[p * cols + s] = alpha[i] * value;
          }
        if (take_alpha && grad_alpha) grad_alpha[i] = static_cast<T>(inner);
      };
      if (q.grad_a >= 0) {
        const T* raw = accumulator + q.grad_a + slot * q.ma;  // dA^T [na, g, ma]
        const int64_t row = q.flipped ? q.count * q.ma : 1, col = q.flipped ? 1 : q.count * q.ma;
        finish(raw, row, col, c.ma, c.na, A + c.a_offset, grad_A ? grad_A + c.a_offset : nullptr, true);
      }
      if (q.grad_b >= 0) {
        const T* raw = accumulator + q.grad_b + slot * q.nb;  // dB [mb, g, nb]
        const int64_t row = q.flipped ? 1 : q.count * q.nb, col = q.flipped ? q.count * q.nb : 1;
        finish(raw, row, col, c.mb, c.nb, B + c.b_offset, grad_B ? grad_B + c.b_offset : nullptr, q.grad_a < 0);
      }
    }
  }
}

template KronPlan<float> plan_kron(const KronParams&, const float*, const float*, const float*, KronUse, bool, bool);
template KronPlan<double> plan_kron(const KronParams&, const double*, const double*, const double*, KronUse, bool,
                                    bool);
template void finish_gradients(const KronPlan<float>&, const KronParams&, const float*, const float*, const float*,
                               const float*, float*, float*, float*);
template void finish_gradients(const KronPlan<double>&, const KronParams&, const double*, const double*, const double*,
                               const double*, double*, double*, double*);

}  // namespace moka
