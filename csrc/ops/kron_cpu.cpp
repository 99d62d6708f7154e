// Kronecker mixture operators on the CPU: y = [add +] sum_i alpha_i (A_i kron B_i) x, its parameter gradients and its
// dense form. Threads take ranges of tokens; the arithmetic is in kernels/kron_*.
#include "kron_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "../checks.h"
#include "../kernels/kron_kernels.h"

namespace moka {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // tokens worked on at once, with their intermediates: half of a 2 MiB L2
constexpr int64_t kMaxBlock = 64;         // tokens

// Costs in multiply-adds at the factored kernels' speed, measured at 576x576 and 4096x4096 with AVX-512:
constexpr double kProduct = 0.8;     // one of a large matrix product
constexpr double kContraction = 45;  // contracting one element of G with both factors of a group

const auto kFloats = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

at::ScalarType compute_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The factors in the compute dtype.
template <class T>
struct Factors {
  at::Tensor A, B, alpha;
  Factors(const at::Tensor& A_, const at::Tensor& B_, const at::Tensor& alpha_)
      : A(as_compute(A_)), B(as_compute(B_)), alpha(as_compute(alpha_)) {}
  static at::Tensor as_compute(const at::Tensor& t) { return t.to(c10::CppTypeToScalarType<T>::value).contiguous(); }
  KronPlan<T> plan(const KronParams& params, KronUse use, bool need_a = true, bool need_b = true) const {
    return plan_kron<T>(params, A.const_data_ptr<T>(), B.const_data_ptr<T>(), alpha.const_data_ptr<T>(), use, need_a,
                        need_b);
  }
};

template <class T>
KronGroups<T> view(const KronPlan<T>& plan, const KronParams& params) {
  return {plan.groups.data(), static_cast<int64_t>(plan.groups.size()), params.N, params.K};
}

int64_t block_rows(int64_t elements_per_token, size_t element_bytes) {
  const int64_t rows = kBlockBytes / (elements_per_token * static_cast<int64_t>(element_bytes));
  return std::clamp<int64_t>(rows, 1, kMaxBlock);
}

// How many parts to split the items into: one per thread, fewer where starting a thread costs more than it saves.
int64_t thread_chunks(int64_t items, double cost_per_item) {
  constexpr double kMinCost = 2e5;  // multiply-adds, about 4 us
  const double worthwhile = static_cast<double>(items) * cost_per_item / kMinCost;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), items));
  return worthwhile < static_cast<double>(most) ? std::max<int64_t>(1, static_cast<int64_t>(worthwhile)) : most;
}

// Calls f(chunk, begin, end) for a fixed split of [0, items), whichever thread runs which chunk. Worker threads do not
// inherit the caller's "below autograd" state, so it is set here.
template <class F>
void for_each_chunk(int64_t items, int64_t chunks, const F& f) {
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t c = first; c < last; ++c) f(c, items * c / chunks, items * (c + 1) / chunks);
  });
}

// Rows [row, row + rows) of a contiguous matrix in the compute dtype; `holder` owns the copy if one was needed.
template <class T>
const T* rows_of(const at::Tensor& matrix, int64_t row, int64_t rows, at::Tensor& holder) {
  holder = matrix.narrow(0, row, rows).to(c10::CppTypeToScalarType<T>::value);
  return holder.const_data_ptr<T>();
}

template <class T>
void mix_tokens(const at::Tensor& x, const Factors<T>& factors, const Mixture& mix, bool transpose,
                const std::optional<at::Tensor>& add, at::Tensor& y) {
  constexpr auto kCompute = c10::CppTypeToScalarType<T>::value;
  const auto plan = factors.plan(mix.params(), transpose ? KronUse::kMixTranspose : KronUse::kMix);
  const auto groups = view(plan, mix.params());
  const auto kernels = active_kron_kernels<T>();
  const int64_t in = x.size(1), out = y.size(1), block = block_rows(plan.scratch_per_token + in + out, sizeof(T));
  for_each_chunk(x.size(0), thread_chunks(x.size(0), plan.cost), [&](int64_t, int64_t begin, int64_t end) {
    at::Tensor x_holder, scratch = at::empty({block * plan.scratch_per_token}, kCompute);
    for (int64_t t = begin; t < end; t += block) {
      const int64_t rows = std::min(block, end - t);
      at::Tensor y_rows = y.narrow(0, t, rows);
      at::Tensor sum = y.scalar_type() == kCompute ? y_rows : at::empty({rows, out}, kCompute);
      if (add)
        sum.copy_(add->narrow(0, t, rows));
      else
        sum.zero_();
      kernels.mix(groups, rows_of<T>(x, t, rows, x_holder), sum.data_ptr<T>(), rows, in, out, scratch.data_ptr<T>());
      if (y.scalar_type() != kCompute) y_rows.copy_(sum);
    }
  });
}

template <class T>
at::Tensor grads_by_token(const at::Tensor& x, const at::Tensor& grad_y, const KronPlan<T>& plan, const Mixture& mix) {
  constexpr auto kCompute = c10::CppTypeToScalarType<T>::value;
  const auto groups = view(plan, mix.params());
  const auto kernels = active_kron_kernels<T>();
  const int64_t block = block_rows(plan.scratch_per_token + mix.N + mix.K, sizeof(T));
  const int64_t chunks = thread_chunks(x.size(0), plan.cost);
  at::Tensor sums = at::zeros({chunks, plan.accumulator}, kCompute);  // one per chunk, added in order
  for_each_chunk(x.size(0), chunks, [&](int64_t c, int64_t begin, int64_t end) {
    at::Tensor x_holder, dy_holder, scratch = at::empty({(block + 1) * plan.scratch_per_token}, kCompute);
    T* sum = sums.data_ptr<T>() + c * plan.accumulator;
    for (int64_t t = begin; t < end; t += block) {
      const int64_t rows = std::min(block, end - t);
      kernels.grad(groups, rows_of<T>(x, t, rows, x_holder), rows_of<T>(grad_y, t, rows, dy_holder), rows, sum,
                   scratch.data_ptr<T>());
    }
  });
  for (int64_t c = 1; c < chunks; ++c) sums[0].add_(sums[c]);
  return sums[0];
}

// The gradients through G = dY^T X, a panel of rows at a time; each group's A and B is one task.
template <class T>
at::Tensor grads_by_panel(const at::Tensor& x, const at::Tensor& grad_y, const KronPlan<T>& plan, const Mixture& mix) {
  constexpr auto kCompute = c10::CppTypeToScalarType<T>::value;
  const auto kernels = active_kron_kernels<T>();
  const at::Tensor X = x.to(kCompute), dY = grad_y.to(kCompute);
  const int64_t panel = std::min(mix.N, std::max<int64_t>(16, kBlockBytes / (mix.K * static_cast<int64_t>(sizeof(T)))));
  const int64_t tasks = 2 * static_cast<int64_t>(plan.groups.size());
  at::Tensor sums = at::zeros({plan.accumulator}, kCompute), buffer = at::empty({panel, mix.K}, kCompute);
  for (int64_t row = 0; row < mix.N; row += panel) {
    const int64_t rows = std::min(panel, mix.N - row);
    at::Tensor G = buffer.narrow(0, 0, rows);
    at::mm_out(G, dY.narrow(1, row, rows).t(), X);
    const int64_t chunks = thread_chunks(tasks, kContraction / 2 * static_cast<double>(rows * mix.K));
    for_each_chunk(tasks, chunks, [&](int64_t, int64_t begin, int64_t end) {
      at::Tensor scratch = at::empty({plan.scratch_per_token}, kCompute);
      for (int64_t task = begin; task < end; ++task) {
        const KronGroup<T>& group = plan.groups[task / 2];
        if (task % 2 == 0 && group.grad_a >= 0)
          kernels.contract_a(group, G.const_data_ptr<T>(), row, rows, mix.K, sums.data_ptr<T>(), scratch.data_ptr<T>());
        if (task % 2 == 1 && group.grad_b >= 0)
          kernels.contract_b(group, G.const_data_ptr<T>(), row, rows, mix.K, sums.data_ptr<T>());
      }
    });
  }
  return sums;
}

// Whether forming G and contracting it costs less than running every token through the factors.
bool panels_pay(double factored_cost, int64_t tokens, const Mixture& mix, size_t groups) {
  const double G = static_cast<double>(mix.N * mix.K);
  const double t = static_cast<double>(tokens);
  return factored_cost * t > G * (kProduct * t + kContraction * static_cast<double>(groups));
}

struct Gradients {
  at::Tensor A, B, alpha;
};

template <class T>
Gradients gradients(const at::Tensor& x, const at::Tensor& grad_y, const Factors<T>& factors, const Mixture& mix,
                    bool need_A, bool need_B, bool need_alpha) {
  bool has_identity_a = false, has_identity_b = false;
  for (const auto& c : mix.components) {
    has_identity_a |= c.identity == Identity::kA;
    has_identity_b |= c.identity == Identity::kB;
  }
  // The gate's gradient comes from either factor's.
  const bool sum_a = need_A || (need_alpha && (!need_B || has_identity_b));
  const bool sum_b = need_B || (need_alpha && has_identity_a);
  auto plan = factors.plan(mix.params(), KronUse::kGrad, sum_a, sum_b);
  const bool by_panel = panels_pay(plan.cost, x.size(0), mix, plan.groups.size());
  if (by_panel) plan = factors.plan(mix.params(), KronUse::kContract, sum_a, sum_b);
  const at::Tensor sums = by_panel ? grads_by_panel<T>(x, grad_y, plan, mix) : grads_by_token<T>(x, grad_y, plan, mix);

  const auto output = [](bool needed, const at::Tensor& like) {
    return needed ? at::empty_like(like) : at::empty({0}, like.options());
  };
  Gradients g{output(need_A, factors.A), output(need_B, factors.B), output(need_alpha, factors.alpha)};
  finish_gradients<T>(plan, mix.params(), sums.const_data_ptr<T>(), factors.A.template const_data_ptr<T>(),
                      factors.B.template const_data_ptr<T>(), factors.alpha.template const_data_ptr<T>(),
                      need_A ? g.A.data_ptr<T>() : nullptr, need_B ? g.B.data_ptr<T>() : nullptr,
                      need_alpha ? g.alpha.data_ptr<T>() : nullptr);
  return g;
}

at::Tensor kron_add(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes) {
  const Mixture mix = parse_shapes(shapes);
  check_dtype("weight", weight, kFloats);
  check_factors(mix, A, B, alpha, weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == mix.N && weight.size(1) == mix.K, "weight: expected shape [",
                    mix.N, ", ", mix.K, "], got ", weight.sizes());
  const auto add_dense = [&](auto zero) {
    using T = decltype(zero);
    const auto plan = Factors<T>(A, B, alpha).plan(mix.params(), KronUse::kDense);
    const auto groups = view(plan, mix.params());
    const auto kernels = active_kron_kernels<T>();
    at::Tensor merged = at::empty(weight.sizes(), weight.options());
    const int64_t block = block_rows(mix.K, sizeof(T));
    const double row_cost = static_cast<double>(mix.K * static_cast<int64_t>(mix.components.size()));
    for_each_chunk(mix.N, thread_chunks(mix.N, row_cost), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += block) {
        const int64_t rows = std::min(block, end - row);
        at::Tensor sum = weight.narrow(0, row, rows).to(c10::CppTypeToScalarType<T>::value, false, /*copy=*/true);
        sum = sum.contiguous();
        kernels.add_dense(groups, sum.data_ptr<T>(), row, rows);
        merged.narrow(0, row, rows).copy_(sum);
      }
    });
    return merged;
  };
  return compute_type(weight) == at::kDouble ? add_dense(double{}) : add_dense(float{});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kron_mix_grad(const at::Tensor& x, const at::Tensor& grad_y,
                                                             const at::Tensor& A, const at::Tensor& B,
                                                             const at::Tensor& alpha, at::IntArrayRef shapes,
                                                             bool need_A, bool need_B, bool need_alpha) {
  const Mixture mix = parse_shapes(shapes);
  check_dtype("x", x, kFloats);
  check_dtype("grad_y", grad_y, {x.scalar_type()});
  check_factors(mix, A, B, alpha, x, "x");
  check_device("grad_y", grad_y, "x", x);
  check_last_dim("x", x, mix.K);
  check_last_dim("grad_y", grad_y, mix.N);
  check_grad_y(grad_y, x);
  const at::Tensor X = x.reshape({-1, mix.K}).contiguous(), dY = grad_y.reshape({-1, mix.N}).contiguous();
  const Gradients g = compute_type(x) == at::kDouble
                          ? gradients(X, dY, Factors<double>(A, B, alpha), mix, need_A, need_B, need_alpha)
                          : gradients(X, dY, Factors<float>(A, B, alpha), mix, need_A, need_B, need_alpha);
  const auto finish = [](const at::Tensor& grad, const at::Tensor& parameter, bool needed) {
    return needed ? grad.to(parameter.scalar_type()).view_as(parameter) : at::empty({0}, parameter.options());
  };
  return {finish(g.A, A, need_A), finish(g.B, B, need_B), finish(g.alpha, alpha, need_alpha)};
}

}  // namespace

at::Tensor kron_mix_cpu(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                        at::IntArrayRef shapes, bool transpose, const std::optional<at::Tensor>& add) {
  const Mixture mix = parse_shapes(shapes);
  const int64_t in = transpose ? mix.N : mix.K, out = transpose ? mix.K : mix.N;
  check_dtype("x", x, kFloats);
  check_factors(mix, A, B, alpha, x, "x");
  check_last_dim("x", x, in);
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  std::optional<at::Tensor> add_rows;
  if (add) {
    check_dtype("add", *add, {x.scalar_type(), compute_type(x)});
    check_device("add", *add, "x", x);
    TORCH_CHECK_VALUE(add->sizes().equals(sizes), "add: expected shape ", at::IntArrayRef(sizes), ", got ",
                      add->sizes());
    add_rows = add->reshape({-1, out});
  }
  const at::Tensor X = x.reshape({-1, in}).contiguous();
  at::Tensor y = at::empty({X.size(0), out}, x.options());
  if (compute_type(x) == at::kDouble)
    mix_tokens(X, Factors<double>(A, B, alpha), mix, transpose, add_rows, y);
  else
    mix_tokens(X, Factors<float>(A, B, alpha), mix, transpose, add_rows, y);
  return y.view(sizes);
}

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("kron_add", &kron_add);
  m.impl("kron_mix", &kron_mix_cpu);
  m.impl("kron_mix_grad", &kron_mix_grad);
}

}  // namespace moka
