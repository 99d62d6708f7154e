// A frozen NF4 layer with a trained low-rank update (LoRA) and its gradients, in as few passes over x and y as other
// operators allow.
//
//   y = W x + b + s (x A^T) B^T                               A [r, K], B [N, r]
//   dx = W^T dy + s (dy B) A,  dA = s (dy B)^T x,  dB = s dy^T (x A^T),  db = sum dy; all first-order only
//
// Three dtypes: x, y and their gradients have the dtype of x; products with W run in `compute`, those with A and B in
// `low`, to which A and B are cast. Gradients of A and B have the parameters' own dtype.
#include "autograd.h"

namespace moka {
namespace {

// The casts below say which dtype a product has, also where backward runs under autocast.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

struct Weight {
  variable_list tensors;       // packed, absmax, absmax2, code2, offset
  std::vector<int64_t> sizes;  // blocksize, blocksize2, N, K
};

// W x + b + s u B^T with u = x A^T, or W^T x + s u A with u = x B, in `dtype`.
Tensor product(const Tensor& x, const Weight& w, const OptionalTensor& bias, const Tensor& A, const Tensor& B,
               const Tensor& u, double scale, bool transpose, at::ScalarType dtype) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t, int64_t, int64_t, int64_t, const OptionalTensor&, const Tensor&,
                     const Tensor&, const Tensor&, double, bool, at::ScalarType)>("moka::nf4_linear_lora");
  const auto& t = w.tensors;
  const auto& n = w.sizes;
  return op.call(x, t[0], t[1], optional(t[2]), optional(t[3]), optional(t[4]), n[0], n[1], n[2], n[3], bias, A, B, u,
                 scale, transpose, dtype);
}

Tensor rows(const Tensor& t, at::ScalarType dtype) { return cast(t.reshape_symint({-1, t.sym_size(-1)}), dtype); }

// grad_u = grad_y B, without the scale; grad_A = scale grad_u^T x and grad_B = scale grad_y^T u, in the parameters'
// dtypes.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_y, const OptionalTensor& x, const Tensor& A,
                                             const Tensor& B, const OptionalTensor& u, double scale,
                                             at::ScalarType dtype_A, at::ScalarType dtype_B) {
  static const auto op =
      find_op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                                 const OptionalTensor&, double, at::ScalarType, at::ScalarType)>(
          "moka::lora_grad");
  return op.call(grad_y, x, A, B, u, scale, dtype_A, dtype_B);
}

struct Lora : torch::autograd::Function<Lora> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const Tensor& A,
                        const Tensor& B, const Weight& weight, double scale, at::ScalarType compute,
                        at::ScalarType low) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
    const Tensor A_low = cast(A, low), B_low = cast(B, low);
    const Tensor u = at::mm(rows(x, low), A_low.t());
    const Tensor y = product(cast(x, compute), weight, bias, A_low, B_low, u, scale, false, x.scalar_type());
    variable_list saved = {A.requires_grad() ? x : Tensor(), B.requires_grad() ? u : Tensor(), A_low, B_low};
    saved.insert(saved.end(), weight.tensors.begin(), weight.tensors.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["args"] =
        c10::ivalue::Tuple::create(box(weight.sizes), bias.has_value(), scale, static_cast<int64_t>(compute),
                                   static_cast<int64_t>(A.scalar_type()), static_cast<int64_t>(B.scalar_type()));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(8);  // as many as forward has arguments
    // checkpointing recomputes them here, which takes autograd: before the guard
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
      const Tensor &grad_y = grads[0], &x = saved[0], &u = saved[1], &A = saved[2], &B = saved[3];
      // sizes, bias, scale, compute, dtypes of A and B
      const auto args = ctx->saved_data["args"].toTupleRef().elements().asArrayRef();
      const double scale = args[2].toDouble();
      auto dtype = [&](size_t i) { return static_cast<at::ScalarType>(args[i].toInt()); };
      size_t edge = 0;  // counts the tensors that were given
      const bool need_x = ctx->needs_input_grad(edge++);
      const bool need_bias = args[1].toBool() && ctx->needs_input_grad(edge++);
      const bool need_A = ctx->needs_input_grad(edge++), need_B = ctx->needs_input_grad(edge++);
      Tensor grad_u, grad_A, grad_B;
      if (need_x || need_A || need_B) {
        const at::ScalarType low = A.scalar_type();
        std::tie(grad_u, grad_A, grad_B) =
            gradients(rows(grad_y, low), need_A ? OptionalTensor(rows(x, low)) : std::nullopt, A, B,
                      need_B ? OptionalTensor(u) : std::nullopt, scale, dtype(4), dtype(5));
      }
      if (need_A) out[2] = grad_A;
      if (need_B) out[3] = grad_B;
      if (need_x || need_bias) {
        const Tensor grad = cast(grad_y, dtype(3));
        if (need_bias) out[1] = rows(grad, grad.scalar_type()).sum(0);
        if (need_x) {
          const Weight weight = {{saved.begin() + 4, saved.end()}, unbox(args[0])};
          out[0] = product(grad, weight, std::nullopt, A, B, grad_u, scale, true, grad_y.scalar_type());
        }
      }
    }
    return once_differentiable(std::move(out));
  }
};

Tensor nf4_lora(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2,
                int64_t N, int64_t K, const OptionalTensor& bias, const Tensor& A, const Tensor& B, double scale,
                at::ScalarType compute, at::ScalarType low) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.sym_size(-1) == K, "x: expected shape [..., ", K, "], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(
      A.dim() == 2 && B.dim() == 2 && A.sym_size(1) == K && B.sym_size(0) == N && B.sym_size(1) == A.sym_size(0),
      "A, B: expected [r, ", K, "] and [", N, ", r], got ", A.sym_sizes(), " and ", B.sym_sizes());
  const Weight weight = {{packed, absmax, tensor(absmax2), tensor(code2), tensor(offset)},
                         {blocksize, blocksize2, N, K}};
  return Lora::apply(x, bias, A, B, weight, scale, compute, low);
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CompositeImplicitAutograd, m) { m.impl("nf4_lora", &nf4_lora); }

}  // namespace moka
