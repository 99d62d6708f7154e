// NF4 operators on CUDA.
#include <torch/library.h>

#include "choose_cuda.h"
#include "kron_cuda.h"

namespace moka::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> nf4_quantize(const at::Tensor& w, int64_t blocksize) {
  TORCH_CHECK_VALUE(blocksize >= 2 && blocksize % 2 == 0, "blocksize: expected a positive even number, got ",
                    blocksize);
  check_dtype("w", w, {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble});
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
  if (mix.A.defined())
    TORCH_CHECK_VALUE(mix.shapes.N == p.N && mix.shapes.K == p.K, "shapes: expected products of ", p.N, " x ", p.K,
                      " like the weight, got ", mix.shapes.N, " x ", mix.shapes.K);
  const bool apart = mix.A.defined() && mix.fp64;
  at::Tensor out = at::empty({p.N, p.K}, w.packed.options().dtype(apart ? at::kDouble : dtype));
  const MixtureArgs args = mix.A.defined() && !apart ? mix.args : MixtureArgs{};
  C10_CUDA_CHECK(launch_build_from_nf4(p, args, dtype_of(out.scalar_type()), out.mutable_data_ptr(), current_stream()));
  return apart ? out.add_(mix.dense_fp64()).to(dtype) : out;
}

CudaMixture mixture(const OptionalTensor& A, const OptionalTensor& B, const OptionalTensor& alpha,
                    at::IntArrayRef shapes, const at::Tensor& packed, at::ScalarType result) {
  if (!A) return {};
  TORCH_CHECK_VALUE(B && alpha, "A is given, so B and alpha are needed too");
  const Mixture parsed = parse_shapes(shapes);
  check_numel("A", *A, parsed.a_numel);
  check_numel("B", *B, parsed.b_numel);
  check_numel("alpha", *alpha, static_cast<int64_t>(parsed.components.size()));
  for (const auto& [name, t] : {std::pair{"A", *A}, {"B", *B}, {"alpha", *alpha}})
    check_device(name, t, "packed", packed);
  return CudaMixture(*A, *B, *alpha, shapes, result);
}

at::Tensor nf4_dequantize(const at::Tensor& packed, const at::Tensor& absmax, const OptionalTensor& absmax2,
                          const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize,
                          int64_t blocksize2, int64_t N, int64_t K, at::ScalarType dtype, const OptionalTensor& A,
                          const OptionalTensor& B, const OptionalTensor& alpha, at::IntArrayRef shapes) {
  const c10::cuda::CUDAGuard guard(packed.device());
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  return build(w, mixture(A, B, alpha, shapes, packed, dtype), dtype);
}

at::Tensor nf4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                      const OptionalTensor& absmax2, const OptionalTensor& code2, const OptionalTensor& offset,
                      int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, const OptionalTensor& bias,
                      const OptionalTensor& A, const OptionalTensor& B, const OptionalTensor& alpha,
                      at::IntArrayRef shapes, bool transpose, c10::string_view path) {
  const int64_t in = transpose ? N : K, out = transpose ? K : N;
  check_last_dim("x", x, in);
  check_dtype("x", x, {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble});
  check_device("packed", packed, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Nf4Args w(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K);
  const CudaMixture mix = mixture(A, B, alpha, shapes, packed, x.scalar_type());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(out);
  const at::Tensor x2 = aligned_rows(x, in);
  const int64_t tokens = x2.size(0);
  std::optional<at::Tensor> b;
  if (bias) {
    check_numel("bias", *bias, out);
    check_device("bias", *bias, "x", x);
    b = bias->to(x.scalar_type()).contiguous();
  }
  if (path != "merged" && tokens > 0 &&
      choose_linear(tokens, w.params, mix.args, x.scalar_type(), transpose) == LinearKernel::kDecode) {
    at::Tensor y = at::empty({tokens, out}, x.options());
    const at::Tensor scratch = at::empty({decode_scratch(mix.args.shapes, tokens)}, x.options().dtype(at::kFloat));
    C10_CUDA_CHECK(launch_decode(x2.const_data_ptr(), dtype_of(x.scalar_type()), tokens, w.params,
                                 b ? b->const_data_ptr() : nullptr, mix.A.defined() ? mix.args : MixtureArgs{},
                                 scratch.mutable_data_ptr<float>(), y.mutable_data_ptr(), current_stream()));
    return y.view(sizes);
  }
  const bool factored = A.has_value() && path == "factored";
  const at::Tensor dense = build(w, factored ? CudaMixture() : mix, x.scalar_type());
  const at::Tensor weight = transpose ? dense : dense.t();
  at::Tensor y = (b ? at::addmm(*b, x2, weight) : at::mm(x2, weight)).view(sizes);
  return factored ? kron_mix(x, *A, *B, *alpha, shapes, transpose, y) : y;
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("nf4_quantize", &nf4_quantize);
  m.impl("nf4_dequantize", &nf4_dequantize);
  m.impl("nf4_linear", &nf4_linear);
}

}  // namespace moka::cuda
