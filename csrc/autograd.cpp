// Gradients of the adapted layer y = W x + b + sum_i alpha_i (A_i kron B_i) x and of its gate, for every base and
// backend, once.
//
//   dx = W^T dy + sum_i alpha_i (A_i^T kron B_i^T) dy; dA, dB and d alpha from kron_mix_grad; all first-order only.
//
// The nodes are C++ because in Python they cost more time than a small layer's kernels. torch.compile traces through
// them: they call nothing but operators that have fakes.
#include "autograd.h"

#ifdef MOKA_WITH_CUDA
#include "ops/merge_dense.h"
#endif

namespace moka {
namespace {

// The frozen weight. NF4: the five tensors and four sizes of the schema's group; dense: one tensor; or none at all.
struct Base {
  std::vector<Tensor> tensors;
  std::vector<int64_t> sizes;
};

struct FlatMixture {
  OptionalTensor A, B, alpha;  // none for the base alone
  at::IntArrayRef shapes;
};

Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                  const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2,
                  int64_t N, int64_t K, const OptionalTensor& bias, const OptionalTensor& A, const OptionalTensor& B,
                  const OptionalTensor& alpha, at::IntArrayRef shapes, bool transpose, c10::string_view path);

// Whether the mixture is added to a dense base before the product.
bool merges(const Tensor& weight, const FlatMixture& mix, c10::string_view path) {
#ifdef MOKA_WITH_CUDA
  if (path == "auto") return cuda::merges(weight, *mix.A, mix.shapes);
#endif
  return path == "merged";
}

Tensor apply_layer(const Tensor& x, const Base& base, const OptionalTensor& bias, const FlatMixture& mix,
                   bool transpose, c10::string_view path) {
  if (!base.sizes.empty()) {
    static const auto op = find_op<decltype(nf4_linear)>("moka::nf4_linear");
    const auto& t = base.tensors;
    const auto& n = base.sizes;
    return op.call(x, t[0], t[1], optional(t[2]), optional(t[3]), optional(t[4]), n[0], n[1], n[2], n[3], bias, mix.A,
                   mix.B, mix.alpha, mix.shapes, transpose, path);
  }
  OptionalTensor y;
  if (!base.tensors.empty()) {
    Tensor weight = cast(base.tensors[0], x.scalar_type());
    const bool merged = merges(weight, mix, path);
    if (merged) {
      static const auto op =
          find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef)>(
              "moka::kron_add");
      weight = op.call(weight, *mix.A, *mix.B, *mix.alpha, mix.shapes);
    }
    y = transpose ? at::matmul(x, weight)
                  : at::linear(x, weight, bias ? OptionalTensor(cast(*bias, x.scalar_type())) : std::nullopt);
    if (merged) return *y;
  }
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                                        bool, const OptionalTensor&)>("moka::kron_mix");
  return op.call(x, *mix.A, *mix.B, *mix.alpha, mix.shapes, transpose, y);
}

struct Layer : torch::autograd::Function<Layer> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const OptionalTensor& A,
                        const OptionalTensor& B, const OptionalTensor& alpha, const Base& base, at::IntArrayRef shapes,
                        bool transpose, c10::string_view path) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto trained = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    // x is needed for the gradients of the mixture alone: a frozen layer keeps no activation alive
    const bool keep_x = trained(A) || trained(B) || trained(alpha);
    variable_list saved = {keep_x ? x : Tensor(), tensor(A), tensor(B), tensor(alpha)};
    saved.insert(saved.end(), base.tensors.begin(), base.tensors.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["args"] =
        c10::ivalue::Tuple::create(box(base.sizes), bias.has_value(), box(shapes), transpose, std::string(path));
    return apply_layer(x, base, bias, {A, B, alpha, shapes}, transpose, path);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(9);  // as many as forward has arguments
    // checkpointing recomputes them here, which takes autograd: before the guard
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const Tensor& grad_y = grads[0];
      // sizes, bias, shapes, transpose, path
      const auto args = ctx->saved_data["args"].toTupleRef().elements().asArrayRef();
      const std::vector<int64_t> shapes = unbox(args[2]);
      const FlatMixture mix = {optional(saved[1]), optional(saved[2]), optional(saved[3]), shapes};
      const bool transpose = args[3].toBool();
      size_t edge = 0;  // counts the tensors that were given
      auto needed = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
      if (needed(true)) {
        const Base base = {{saved.begin() + 4, saved.end()}, unbox(args[0])};
        out[0] = apply_layer(grad_y, base, std::nullopt, mix, !transpose, args[4].toStringRef());
      }
      if (needed(args[1].toBool())) out[1] = grad_y.reshape_symint({-1, grad_y.sym_size(-1)}).sum(0);
      const bool mixed = mix.A.has_value();
      const bool need_A = needed(mixed), need_B = needed(mixed), need_alpha = needed(mixed);
      if (need_A || need_B || need_alpha) {
        static const auto op =
            find_op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                       const Tensor&, at::IntArrayRef, bool, bool, bool)>(
                "moka::kron_mix_grad");
        const Tensor& x = saved[0];
        const auto [dA, dB, dalpha] = op.call(transpose ? grad_y : x, transpose ? x : grad_y, *mix.A, *mix.B,
                                              *mix.alpha, shapes, need_A, need_B, need_alpha);
        if (need_A) out[2] = dA;
        if (need_B) out[3] = dB;
        if (need_alpha) out[4] = dalpha;
      }
    }
    return once_differentiable(std::move(out));
  }
};

struct Gate : torch::autograd::Function<Gate> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_op<Tensor(const Tensor&, double)>("moka::gate");
    const Tensor alpha = op.call(logits, scale);
    ctx->save_for_backward({alpha});
    ctx->saved_data["scale"] = scale;
    return alpha;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list out(2);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      static const auto op = find_op<Tensor(const Tensor&, const Tensor&, double)>("moka::gate_grad");
      out[0] = op.call(saved[0], grads[0], ctx->saved_data["scale"].toDouble());
    }
    return once_differentiable(std::move(out));
  }
};

Tensor gate(const Tensor& logits, double scale) { return Gate::apply(logits, scale); }

Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                  const OptionalTensor& code2, const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2,
                  int64_t N, int64_t K, const OptionalTensor& bias, const OptionalTensor& A, const OptionalTensor& B,
                  const OptionalTensor& alpha, at::IntArrayRef shapes, bool transpose, c10::string_view path) {
  const Base base = {{packed, absmax, tensor(absmax2), tensor(code2), tensor(offset)}, {blocksize, blocksize2, N, K}};
  return Layer::apply(x, bias, A, B, alpha, base, shapes, transpose, path);
}

Tensor dense_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& A,
                    const Tensor& B, const Tensor& alpha, at::IntArrayRef shapes, c10::string_view path) {
  Base base;
  if (weight) base.tensors.push_back(*weight);
  return Layer::apply(x, bias, OptionalTensor(A), OptionalTensor(B), OptionalTensor(alpha), base, shapes, false, path);
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, Autograd, m) {
  m.impl("nf4_linear", &nf4_linear);
  m.impl("gate", &gate);
}
TORCH_LIBRARY_IMPL(moka, CompositeImplicitAutograd, m) { m.impl("dense_linear", &dense_linear); }

}  // namespace moka
