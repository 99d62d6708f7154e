// What the autograd nodes share: saving arguments, refusing second derivatives.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/operators.h"

namespace moka {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor tensor(const OptionalTensor& t) { return t.value_or(Tensor()); }
inline Tensor cast(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

// Integers as a tuple: compiled autograd hashes what a node saves, and a list has no hash.
inline c10::IValue box(at::IntArrayRef v) {
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(v.begin(), v.end()));
}
inline std::vector<int64_t> unbox(const c10::IValue& tuple) {
  std::vector<int64_t> v;
  for (const c10::IValue& i : tuple.toTupleRef().elements().asArrayRef()) v.push_back(i.toInt());
  return v;
}

struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
  static Tensor forward(AutogradContext*, const Tensor& grad) { return grad.view_as(grad); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "moka: trying to differentiate twice a function that is once_differentiable");
  }
};

// Under create_graph=True a second derivative then raises an error, rather than being left out.
inline variable_list once_differentiable(variable_list grads) {
  if (at::GradMode::is_enabled())
    for (Tensor& grad : grads)
      if (grad.defined()) grad = OnceDifferentiable::apply(grad.requires_grad_());
  return grads;
}

}  // namespace moka
