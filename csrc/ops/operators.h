// Operators that others call, through the dispatcher.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace moka {

using OptionalTensor = std::optional<at::Tensor>;

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// W x + b, or W^T x, of an NF4 weight alone.
inline at::Tensor call_nf4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                                  const OptionalTensor& absmax2, const OptionalTensor& code2,
                                  const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                                  int64_t K, const OptionalTensor& bias, bool transpose) {
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, int64_t, int64_t, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, at::IntArrayRef, bool, c10::string_view)>("moka::nf4_linear");
  return op.call(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, std::nullopt,
                 std::nullopt, std::nullopt, {}, transpose, "auto");
}

}  // namespace moka
