// NF4 operators on the CPU: quantize, dequantize and multiply, with a Kronecker mixture merged into the decoded weight
// or added by the factored path. Threads take ranges of blocks, rows or columns; the arithmetic is in kernels/nf4_*.
#include "../kernels/nf4_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "../checks.h"
#include "../kernels/kron_kernels.h"
#include "choose.h"
#include "kron_cpu.h"

namespace moka {
namespace {

constexpr int64_t kRowGrain = 8, kBlockGrain = 256;  // the least work worth handing to another thread

const auto kFloats = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

at::ScalarType compute_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f(begin, end) for a split of [0, size) into a few ranges that start at multiples of `step`.
template <class F>
void split(int64_t size, int64_t step, const F& f) {
  at::parallel_for(0, (size + step - 1) / step, 1,
                   [&](int64_t begin, int64_t end) { f(begin * step, std::min(size, end * step)); });
}

// W, or W' = W + sum_i alpha_i (A_i kron B_i), decoded a range of rows at a time.
class DecodedWeight {
 public:
  explicit DecodedWeight(const Nf4Params& w) : w_(w) {}

  // From now on the rows include the mixture, added in `compute` (fp32 or fp64).
  void merge(const Mixture& mix, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
             at::ScalarType compute) {
    for (const auto& [held, given] : {std::pair{&A_, &A}, {&B_, &B}, {&alpha_, &alpha}})
      *held = given->to(compute).contiguous();
    if (compute == at::kDouble)
      plan_ = plan_kron<double>(mix.params(), A_.const_data_ptr<double>(), B_.const_data_ptr<double>(),
                                alpha_.const_data_ptr<double>(), KronUse::kDense);
    else
      mixture_ = std::make_unique<Nf4Mixture>(mix.params(), A_.const_data_ptr<float>(), B_.const_data_ptr<float>(),
                                              alpha_.const_data_ptr<float>());
  }

  const Nf4Params& params() const { return w_; }
  const Nf4Mixture* mixture() const { return mixture_.get(); }  // fp32 only

  // out [rows, columns] = this part of W', rounded once to out's dtype.
  void decode(const Nf4Part& part, at::Tensor& out) const {
    const int64_t rows = part.row_end - part.row_begin, cols = part.col_end - part.col_begin;
    const auto fill = [&](auto kernel, auto* to) {
      split(rows, kRowGrain, [&](int64_t begin, int64_t end) {
        kernel(w_, mixture(), {part.row_begin + begin, part.row_begin + end, part.col_begin, part.col_end},
               to + begin * cols);
      });
    };
    const Nf4Kernels& kernels = nf4_kernels();
    switch (out.scalar_type()) {
      case at::kFloat:
        return fill(kernels.dequantize_f32, out.data_ptr<float>());
      case at::kBFloat16:
        return fill(kernels.dequantize_bf16, reinterpret_cast<Bfloat16*>(out.data_ptr()));
      case at::kHalf:
        return fill(kernels.dequantize_f16, reinterpret_cast<Float16*>(out.data_ptr()));
      default:
        return decode_f64(part, out);
    }
  }

 private:
  // fp64 is for checks: the mixture is formed for whole rows, of which the part is taken.
  void decode_f64(const Nf4Part& part, at::Tensor& out) const {
    at::Tensor decoded = at::empty(out.sizes(), at::kFloat);
    decode(part, decoded);
    out.copy_(decoded);
    if (plan_.groups.empty()) return;
    const KronGroups<double> groups{plan_.groups.data(), (int64_t)plan_.groups.size(), w_.N, w_.K};
    at::Tensor mixture_row = at::empty({1, w_.K}, at::kDouble);
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      active_kron_kernels<double>().add_dense(groups, mixture_row.zero_().data_ptr<double>(), row, 1);
      out[row - part.row_begin].add_(mixture_row[0].slice(0, part.col_begin, part.col_end));
    }
  }

  Nf4Params w_;
  at::Tensor A_, B_, alpha_;
  std::unique_ptr<Nf4Mixture> mixture_;
  KronPlan<double> plan_;
};

// y = x W'^T, or dx = dy W', for a few tokens of fp32.
at::Tensor fused_linear(const at::Tensor& x, const DecodedWeight& weight, bool transpose) {
  const Nf4Params& w = weight.params();
  const int64_t M = x.size(0), out = transpose ? w.K : w.N;
  at::Tensor y = at::empty({M, out}, x.options());
  const auto kernel = transpose ? nf4_kernels().linear_transposed : nf4_kernels().linear;
  split(out, transpose ? kColumnStep : kRowGrain, [&](int64_t begin, int64_t end) {
    kernel(w, weight.mixture(), x.const_data_ptr<float>(), M, begin, end, y.data_ptr<float>());
  });
  return y;
}

// The same for any count, a panel of W' at a time: columns of W' for y, rows of it for dx, so that every panel adds to
// the whole result, and x is packed by the GEMM library once only.
at::Tensor panel_linear(const at::Tensor& x, const DecodedWeight& weight, int64_t width, bool transpose) {
  const auto [N, K] = std::pair{weight.params().N, weight.params().K};
  const int64_t summed = transpose ? N : K;
  at::Tensor y = at::empty({x.size(0), transpose ? K : N}, x.options());
  at::Tensor buffer = at::empty({std::min(width, summed) * y.size(1)}, x.options());
  for (int64_t begin = 0; begin < summed; begin += width) {
    const int64_t end = std::min(summed, begin + width);
    const Nf4Part part = transpose ? Nf4Part{begin, end, 0, K} : Nf4Part{0, N, begin, end};
    at::Tensor panel = buffer.narrow(0, 0, (end - begin) * y.size(1))
                           .view({part.row_end - part.row_begin, part.col_end - part.col_begin});
    weight.decode(part, panel);
    const at::Tensor factor = transpose ? panel : panel.t(), x_part = x.slice(1, begin, end);
    if (begin == 0)
      at::mm_out(y, x_part, factor);
    else
      y.addmm_(x_part, factor);
  }
  return y;
}

std::tuple<at::Tensor, at::Tensor> nf4_quantize(const at::Tensor& w, int64_t blocksize) {
  check_dtype("w", w, {at::kFloat, at::kBFloat16, at::kHalf});
  check_blocksize(blocksize);
  const at::Tensor flat = w.contiguous();
  const int64_t numel = flat.numel(), blocks = (numel + blocksize - 1) / blocksize;
  at::Tensor packed = at::empty({(numel + 1) / 2}, w.options().dtype(at::kByte));
  at::Tensor absmax = at::empty({blocks}, w.options().dtype(at::kFloat));
  const auto run = [&](auto kernel, const auto* from) {
    at::parallel_for(0, blocks, kBlockGrain, [&](int64_t begin, int64_t end) {
      kernel(from, numel, blocksize, begin, end, packed.data_ptr<uint8_t>(), absmax.data_ptr<float>());
    });
  };
  const Nf4Kernels& kernels = nf4_kernels();
  if (w.scalar_type() == at::kFloat)
    run(kernels.quantize_f32, flat.const_data_ptr<float>());
  else if (w.scalar_type() == at::kBFloat16)
    run(kernels.quantize_bf16, reinterpret_cast<const Bfloat16*>(flat.const_data_ptr()));
  else
    run(kernels.quantize_f16, reinterpret_cast<const Float16*>(flat.const_data_ptr()));
  return {packed, absmax};
}

at::Tensor nf4_dequantize(const at::Tensor& packed, const at::Tensor& absmax, const std::optional<at::Tensor>& absmax2,
                          const std::optional<at::Tensor>& code2, const std::optional<at::Tensor>& offset,
                          int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, at::ScalarType dtype,
                          const std::optional<at::Tensor>& A, const std::optional<at::Tensor>& B,
                          const std::optional<at::Tensor>& alpha, at::IntArrayRef shapes) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Nf4Args args(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  at::Tensor out = at::empty({N, K}, packed.options().dtype(dtype));
  check_dtype("dtype", out, kFloats);
  DecodedWeight weight(args.params);
  if (A)
    weight.merge(parse_mixture(N, K, *A, B, alpha, shapes, dtype, packed, "packed"), *A, *B, *alpha,
                 compute_type(dtype));
  if (out.numel() > 0) weight.decode({0, N, 0, K}, out);
  return out;
}

at::Tensor nf4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                      const std::optional<at::Tensor>& absmax2, const std::optional<at::Tensor>& code2,
                      const std::optional<at::Tensor>& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                      int64_t K, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& A,
                      const std::optional<at::Tensor>& B, const std::optional<at::Tensor>& alpha,
                      at::IntArrayRef shapes, bool transpose, c10::string_view path) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_dtype("x", x, kFloats);
  check_device("packed", packed, "x", x);
  check_last_dim("x", x, transpose ? N : K);
  const Nf4Args args(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  const int64_t in = transpose ? N : K, out = transpose ? K : N;
  if (bias) check_bias(*bias, out, x);
  std::optional<Mixture> mix;
  if (A) mix = parse_mixture(N, K, *A, B, alpha, shapes, x.scalar_type(), x, "x");

  const at::ScalarType compute = compute_type(x.scalar_type());
  const int64_t tokens = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const Nf4Choice choice = choose_nf4_linear(tokens, N, K, transpose, compute, mix ? &*mix : nullptr, path);
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  at::Tensor y;
  if (tokens == 0 || in == 0 || out == 0) {
    y = at::zeros({tokens, out}, x.options().dtype(compute));
  } else {
    const at::Tensor rows = x.reshape({tokens, in}).to(compute).contiguous();
    DecodedWeight weight(args.params);
    if (choice.merged) weight.merge(*mix, *A, *B, *alpha, compute);
    y = choice.fused ? fused_linear(rows, weight, transpose) : panel_linear(rows, weight, choice.panel, transpose);
  }
  if (bias) y.add_(*bias);
  y = y.view(sizes);
  if (mix && !choice.merged) return kron_mix_cpu(x, *A, *B, *alpha, shapes, transpose, y);
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("nf4_quantize", &nf4_quantize);
  m.impl("nf4_dequantize", &nf4_dequantize);
  m.impl("nf4_linear", &nf4_linear);
}

}  // namespace moka
