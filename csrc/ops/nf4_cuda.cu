// NF4 operators on CUDA.
#include <torch/library.h>

#include "choose_cuda.h"
#include "kron_cuda.h"
#include "rows.h"

namespace moka::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> nf4_quantize(const at::Tensor& w, int64_t blocksize) {
  at::AutoDispatchBelowADInplaceOrView below;  // gradients belong to moka.functional
  check_dtype("w", w, {at::kFloat, at::kHalf, at::kBFloat16});
  check_blocksize(blocksize);
  const c10::cuda::CUDAGuard guard(w.device());
  const at::Tensor flat = w.contiguous();
  const int64_t numel = flat.numel();
  at::Tensor packed = at::empty({(numel + 1) / 2}, w.options().dtype(at::kByte));
  at::Tensor absmax = at::empty({(numel + blocksize - 1) / blocksize}, w.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_nf4_quantize(flat.const_data_ptr(), dtype_of(w.scalar_type()), numel, blocksize,
                                     packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(),
                                     current_stream()));
  return {packed, absmax};
}

// The dense weight, with the mixture unless `mix` is empty.
at::Tensor build(const Nf4Args& w, const CudaMixture& mix, at::ScalarType dtype) {
  const auto& p = w.params;
  const bool apart = mix.A.defined() && mix.fp64;
  at::Tensor out = at::empty({p.N, p.K}, w.packed.options().dtype(apart ? at::kDouble : dtype));
  check_dtype("dtype", out, kFloats);
  const MixtureArgs args = mix.A.defined() && !apart ? mix.args : MixtureArgs{};
  C10_CUDA_CHECK(launch_build_from_nf4(p, args, dtype_of(out.scalar_type()), out.mutable_data_ptr(), current_stream()));
  return apart ? out.add_(mix.dense_fp64()).to(dtype) : out;
}

CudaMixture mixture(const Nf4Args& w, const OptionalTensor& A, const OptionalTensor& B, const OptionalTensor& alpha,
                    at::IntArrayRef shapes, at::ScalarType result) {
  if (!A) return {};
  parse_mixture(w.params.N, w.params.K, *A, B, alpha, shapes, result, w.packed, "packed");
  return CudaMixture(*A, *B, *alpha, shapes, result);
}

at::Tensor nf4_dequantize(const at::Tensor& packed, const at::Tensor& absmax, const OptionalTensor& absmax2,
                          const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize,
                          int64_t blocksize2, int64_t N, int64_t K, at::ScalarType dtype, const OptionalTensor& A,
                          const OptionalTensor& B, const OptionalTensor& alpha, at::IntArrayRef shapes) {
  at::AutoDispatchBelowADInplaceOrView below;
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  const CudaMixture mix = mixture(w, A, B, alpha, shapes, dtype);
  const c10::cuda::CUDAGuard guard(packed.device());
  return build(w, mix, dtype);
}

// In x's dtype, contiguous.
OptionalTensor bias_of(const OptionalTensor& bias, int64_t out, const at::Tensor& x) {
  if (!bias) return std::nullopt;
  check_bias(*bias, out, x);
  return bias->to(x.scalar_type()).contiguous();
}

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// y of x [tokens, K] straight from the 4-bit weight.
at::Tensor few_tokens(LinearKernel kernel, const at::Tensor& x, const Nf4Params& w, const OptionalTensor& bias,
                      const MixtureArgs& mix) {
  const int64_t tokens = x.size(0);
  at::Tensor y = at::empty({tokens, w.N}, x.options());
  const at::Tensor scratch = at::empty({decode_scratch(mix.shapes, tokens)}, x.options().dtype(at::kFloat));
  auto* launch = kernel == LinearKernel::kDecode ? launch_decode : launch_nf4_gemm_sm90;
  C10_CUDA_CHECK(launch(x.const_data_ptr(), dtype_of(x.scalar_type()), tokens, w, data(bias), mix,
                        scratch.mutable_data_ptr<float>(), y.mutable_data_ptr(), current_stream()));
  return y;
}

at::Tensor nf4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                      const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                      int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias,
                      const OptionalTensor& A, const OptionalTensor& B, const OptionalTensor& alpha,
                      at::IntArrayRef shapes, bool transpose, c10::string_view path) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t in = transpose ? N : K, out = transpose ? K : N;
  check_dtype("x", x, kFloats);
  check_device("packed", packed, "x", x);
  check_last_dim("x", x, in);
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  const CudaMixture mix = mixture(w, A, B, alpha, shapes, x.scalar_type());
  check_path(path);
  const c10::cuda::CUDAGuard guard(x.device());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(out);
  const at::Tensor x2 = aligned_rows(x, in);
  const int64_t tokens = x2.size(0);
  const OptionalTensor b = bias_of(bias, out, x);
  const MixtureArgs args = mix.A.defined() ? mix.args : MixtureArgs{};
  const auto kernel =
      tokens == 0 ? LinearKernel::kBuild : choose_linear(tokens, w.params, args, x.scalar_type(), transpose);
  if (kernel != LinearKernel::kBuild && (!A || path != "merged"))
    return few_tokens(kernel, x2, w.params, b, args).view(sizes);
  const bool factored = A.has_value() && path == "factored";
  const at::Tensor dense = build(w, factored ? CudaMixture() : mix, x.scalar_type());
  const at::Tensor weight = transpose ? dense : dense.t();
  // In fp32 the bias is added apart: for a product that ends with it, cuBLASLt takes one chain of K additions,
  // whose error (18 u at K = 4096) is above the limits and twice that of the product alone.
  const bool ends_with_bias = b && sixteen_bit(x.scalar_type());
  at::Tensor y = (ends_with_bias ? at::addmm(*b, x2, weight) : at::mm(x2, weight)).view(sizes);
  if (b && !ends_with_bias) y.add_(*b);
  return factored ? kron_mix(x, *A, *B, *alpha, shapes, transpose, y) : y;
}

at::Tensor nf4_linear_rows(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                           const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                           int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias,
                           const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha, const at::Tensor& adapter,
                           at::IntArrayRef shapes) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dtype("x", x, kFloats);
  const Mixture one = parse_rows(x, N, K, A, B, alpha, adapter, shapes);
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  check_device("packed", packed, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const CudaMixture mix(A, B, alpha, shapes, x.scalar_type());
  const at::Tensor rows = aligned_rows(x, K), of_row = adapter.contiguous();
  MixtureArgs args = mix.args;
  args.adapter = of_row.const_data_ptr<int32_t>();
  args.a_stride = one.a_numel, args.b_stride = one.b_numel;
  const auto kernel = mix.fp64 || rows.size(0) == 0
                          ? LinearKernel::kBuild
                          : choose_linear(rows.size(0), w.params, args, x.scalar_type(), false);
  if (kernel != LinearKernel::kBuild) return few_tokens(kernel, rows, w.params, bias_of(bias, N, x), args);
  return nf4_linear_masked(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, A, B, alpha,
                           adapter, shapes);
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("nf4_quantize", &nf4_quantize);
  m.impl("nf4_dequantize", &nf4_dequantize);
  m.impl("nf4_linear", &nf4_linear);
  m.impl("nf4_linear_rows", &nf4_linear_rows);
}

}  // namespace moka::cuda
