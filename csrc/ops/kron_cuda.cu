// Kronecker mixture operators on CUDA.
#include <torch/library.h>

#include "choose_cuda.h"
#include "kernels/kron_grad_cuda.h"
#include "kron_cuda.h"
#include "merge_dense.h"

namespace moka::cuda {
namespace {

at::Tensor kron_add(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes) {
  at::AutoDispatchBelowADInplaceOrView below;  // gradients belong to moka.functional
  check_dtype("weight", weight, kFloats);
  const CudaMixture mix(A, B, alpha, shapes, weight.scalar_type());
  check_factors(mix.shapes, A, B, alpha, weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == mix.shapes.N && weight.size(1) == mix.shapes.K,
                    "weight: expected shape [", mix.shapes.N, ", ", mix.shapes.K, "], got ", weight.sizes());
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor base = weight.contiguous();
  if (mix.fp64) return base.to(at::kDouble).add(mix.dense_fp64()).to(weight.scalar_type());
  at::Tensor out = at::empty_like(base);
  C10_CUDA_CHECK(launch_build_from_dense(base.const_data_ptr(), mix.args, dtype_of(weight.scalar_type()),
                                         out.mutable_data_ptr(), current_stream()));
  return out;
}

// The mixture alone as a dense [N, K] matrix of the given dtype.
at::Tensor dense_mixture(const CudaMixture& mix, at::ScalarType dtype) {
  if (mix.fp64) return mix.dense_fp64();
  at::Tensor out = at::empty({mix.shapes.N, mix.shapes.K}, mix.A.options().dtype(dtype));
  C10_CUDA_CHECK(launch_build_from_dense(nullptr, mix.args, dtype_of(dtype), out.mutable_data_ptr(), current_stream()));
  return out;
}

struct Grads {
  at::Tensor A, B, alpha;
};

Grads grads_fp64(const CudaMixture& mix, const at::Tensor& x, const at::Tensor& dy) {
  const at::Tensor G = at::mm(dy.to(at::kDouble).t(), x.to(at::kDouble));
  Grads out = {at::zeros_like(mix.A), at::zeros_like(mix.B), at::zeros_like(mix.alpha)};
  for (size_t i = 0; i < mix.shapes.components.size(); ++i) {
    const KronComponent& c = mix.shapes.components[i];
    const at::Tensor a = mix.factor_a(c), b = mix.factor_b(c), al = mix.alpha[static_cast<int64_t>(i)];
    const at::Tensor g = G.view({c.ma, c.mb, c.na, c.nb});
    const at::Tensor da = at::einsum("pqrs,qs->pr", {g, b}), db = at::einsum("pqrs,pr->qs", {g, a});
    out.alpha[static_cast<int64_t>(i)].copy_((da * a).sum());
    if (c.identity != Identity::kA) out.A.narrow(0, c.a_offset, c.ma * c.na).copy_((al * da).view(-1));
    if (c.identity != Identity::kB) out.B.narrow(0, c.b_offset, c.mb * c.nb).copy_((al * db).view(-1));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kron_mix_grad(const at::Tensor& x, const at::Tensor& grad_y,
                                                             const at::Tensor& A, const at::Tensor& B,
                                                             const at::Tensor& alpha, at::IntArrayRef shapes,
                                                             bool need_A, bool need_B, bool need_alpha) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dtype("x", x, kFloats);
  const CudaMixture mix(A, B, alpha, shapes, x.scalar_type());
  check_factors(mix.shapes, A, B, alpha, x, "x");
  check_last_dim("x", x, mix.shapes.K);
  check_last_dim("grad_y", grad_y, mix.shapes.N);
  check_device("grad_y", grad_y, "x", x);
  check_grad_y(grad_y, x);
  check_dtype("grad_y", grad_y, {x.scalar_type()});
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor x2 = aligned_rows(x, mix.shapes.K);
  const at::Tensor dy2 = aligned_rows(grad_y, mix.shapes.N);
  const int64_t tokens = x2.size(0);
  auto pick = [](bool needed, const at::Tensor& grad, const at::Tensor& like) {
    return needed ? grad.to(like.scalar_type()).view_as(like) : at::empty({0}, like.options());
  };
  if (mix.fp64) {
    const Grads g = grads_fp64(mix, x2, dy2);
    return {pick(need_A, g.A, A), pick(need_B, g.B, B), pick(need_alpha, g.alpha, alpha)};
  }

  Grads g;
  if (tokens == 0) {
    g = {at::zeros_like(mix.A), at::zeros_like(mix.B), at::zeros_like(mix.alpha)};
  } else {
    g = {at::empty_like(mix.A), at::empty_like(mix.B), at::empty_like(mix.alpha)};
    const cudaStream_t stream = current_stream();
    const KronParams& p = mix.args.shapes;
    const auto fp32 = mix.A.options().dtype(at::kFloat);
    void *grad_A = g.A.mutable_data_ptr(), *grad_B = g.B.mutable_data_ptr();
    float* grad_alpha = g.alpha.mutable_data_ptr<float>();
    GradPlan plan;
    const GradKernel kernel = choose_grad(tokens, p, x.scalar_type(), &plan);
    if (kernel == GradKernel::kFactoredSm90) {
      const int sms = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
      at::Tensor scratch = at::empty({sms * plan.slab + kFinishDots * p.r}, fp32);
      float *partial = scratch.mutable_data_ptr<float>(), *dots = partial + sms * plan.slab;
      C10_CUDA_CHECK(launch_kron_grad_sm90(x2.const_data_ptr(), dy2.const_data_ptr(), tokens, mix.args, plan, sms,
                                           partial, stream));
      C10_CUDA_CHECK(launch_finish_slabs(partial, mix.args, plan, dots, grad_A, grad_B, grad_alpha, stream));
    } else if (kernel == GradKernel::kOuter) {
      const auto other = [&](const at::Tensor& t, const at::Tensor& factor, int64_t width) {  // [tokens, r]
        return at::mm(t, factor.to(x.scalar_type()).view({p.r, width}).t());
      };
      const at::Tensor raw_A = mm_fp32(other(x2, mix.B, p.K).t(), dy2), raw_B = mm_fp32(other(dy2, mix.A, p.N).t(), x2);
      C10_CUDA_CHECK(launch_finish_grads(raw_A.const_data_ptr<float>(), raw_B.const_data_ptr<float>(), mix.args, grad_A,
                                         grad_B, grad_alpha, stream));
    } else {
      const at::Tensor G = mm_fp32(dy2.t(), x2);
      at::Tensor raw = at::empty({mix.shapes.a_numel + mix.shapes.b_numel}, fp32);
      at::Tensor scratch = at::empty({contract_scratch(p)}, fp32);
      float *raw_A = raw.mutable_data_ptr<float>(), *raw_B = raw_A + mix.shapes.a_numel;
      C10_CUDA_CHECK(launch_contract(G.const_data_ptr<float>(), mix.args, scratch.mutable_data_ptr<float>(), raw_A,
                                     raw_B, stream));
      C10_CUDA_CHECK(launch_finish_grads(raw_A, raw_B, mix.args, grad_A, grad_B, grad_alpha, stream));
    }
  }
  return {pick(need_A, g.A, A), pick(need_B, g.B, B), pick(need_alpha, g.alpha, alpha)};
}

}  // namespace

bool merges(const at::Tensor& weight, const at::Tensor& A, at::IntArrayRef shapes) {
  if (!weight.is_cuda()) return false;
  const Mixture mix = parse_shapes(shapes);
  return merges_dense(weight, mix.params(), A.scalar_type());
}

at::Tensor kron_mix(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                    at::IntArrayRef shapes, bool transpose, const std::optional<at::Tensor>& add) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dtype("x", x, kFloats);
  const CudaMixture mix(A, B, alpha, shapes, x.scalar_type());
  check_factors(mix.shapes, A, B, alpha, x, "x");
  const int64_t in = transpose ? mix.shapes.N : mix.shapes.K, out = transpose ? mix.shapes.K : mix.shapes.N;
  check_last_dim("x", x, in);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(out);
  if (add) {
    TORCH_CHECK_VALUE(add->sizes() == at::IntArrayRef(sizes), "add: expected shape ", at::IntArrayRef(sizes), ", got ",
                      add->sizes());
    check_device("add", *add, "x", x);
    check_dtype("add", *add, {x.scalar_type(), at::kFloat});
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = dense_mixture(mix, x.scalar_type());
  const at::Tensor x2 = aligned_rows(x, in), w = (transpose ? dense : dense.t()).to(x.scalar_type());
  if (!add) return at::mm(x2, w).view(sizes);
  const at::Tensor add2 = add->reshape({-1, out});
  const bool half = sixteen_bit(x.scalar_type());
  if (half && add2.scalar_type() == x.scalar_type()) return at::addmm(add2, x2, w).view(sizes);
  // fp32 and fp64, and an fp32 base beside 16-bit activations: the sum is rounded once
  const at::Tensor y = half ? mm_fp32(x2, w) : at::mm(x2, w);
  return y.add(add2).to(x.scalar_type()).view(sizes);
}

TORCH_LIBRARY_IMPL(moka, CUDA, m) {
  m.impl("kron_add", &kron_add);
  m.impl("kron_mix", &kron_mix);
  m.impl("kron_mix_grad", &kron_mix_grad);
}

}  // namespace moka::cuda
