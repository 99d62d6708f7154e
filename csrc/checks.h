// Argument checks shared by every backend: tensors in, the plain structs of kernels/params.h out.
// Each message names the argument, what it got and what was expected.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

#include "kernels/params.h"

namespace moka {

constexpr int64_t kShapeFields = 5;  // ma, na, mb, nb, identity

struct Mixture {
  std::vector<KronComponent> components;
  int64_t N = 0, K = 0;
  int64_t a_numel = 0, b_numel = 0;  // elements in the flat A and B
  KronParams params() const { return {components.data(), (int64_t)components.size(), N, K}; }
};

inline Mixture parse_shapes(at::IntArrayRef shapes) {
  TORCH_CHECK_VALUE(!shapes.empty() && shapes.size() % kShapeFields == 0,
                    "shapes: expected 5 integers per component "
                    "(ma, na, mb, nb, identity), got ",
                    shapes.size(), " integers");
  Mixture mix;
  mix.components.reserve(shapes.size() / kShapeFields);
  for (size_t i = 0; i < shapes.size(); i += kShapeFields) {
    const int64_t ma = shapes[i], na = shapes[i + 1], mb = shapes[i + 2], nb = shapes[i + 3], id = shapes[i + 4];
    const size_t index = i / kShapeFields;
    TORCH_CHECK_VALUE(ma > 0 && na > 0 && mb > 0 && nb > 0 && id >= 0 && id <= 2, "shapes[", index,
                      "]: expected positive factor sizes and identity in {0, 1, 2}, got (", ma, ", ", na, ", ", mb,
                      ", ", nb, ", ", id, ")");
    TORCH_CHECK_VALUE(id != 1 || ma == na, "shapes[", index, "]: an identity A must be square, got ", ma, " x ", na);
    TORCH_CHECK_VALUE(id != 2 || mb == nb, "shapes[", index, "]: an identity B must be square, got ", mb, " x ", nb);
    if (index == 0) {
      mix.N = ma * mb;
      mix.K = na * nb;
    }
    TORCH_CHECK_VALUE(ma * mb == mix.N && na * nb == mix.K, "shapes[", index, "]: expected a product of ", mix.N, " x ",
                      mix.K, " like component 0, got ", ma * mb, " x ", na * nb);
    mix.components.push_back({ma, na, mb, nb, static_cast<Identity>(id), mix.a_numel, mix.b_numel});
    if (id != 1) mix.a_numel += ma * na;
    if (id != 2) mix.b_numel += mb * nb;
  }
  return mix;
}

inline void check_dtype(const char* name, const at::Tensor& t, std::initializer_list<at::ScalarType> allowed) {
  for (auto d : allowed)
    if (t.scalar_type() == d) return;
  std::string list;
  for (auto d : allowed) list += std::string(list.empty() ? "" : ", ") + c10::toString(d);
  TORCH_CHECK_TYPE(false, name, ": expected dtype ", list, ", got ", t.scalar_type());
}

inline void check_numel(const char* name, const at::Tensor& t, int64_t expected) {
  TORCH_CHECK_VALUE(t.numel() == expected, name, ": expected ", expected, " elements, got ", t.numel(), " (shape ",
                    t.sizes(), ")");
}

inline void check_device(const char* name, const at::Tensor& t, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK(t.device() == other.device(), name, " is on ", t.device(), " but ", other_name, " is on ", other.device(),
              "; move one of them");
}

inline void check_last_dim(const char* name, const at::Tensor& t, int64_t expected) {
  TORCH_CHECK_VALUE(t.dim() >= 1 && t.size(-1) == expected, name, ": expected shape [..., ", expected, "], got ",
                    t.sizes());
}

// Factors may be fp32 beside any activation dtype, or of that dtype itself.
inline void check_factors(const Mixture& mix, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                          at::ScalarType dtype, const at::Tensor& like, const char* like_name) {
  check_dtype("A", A, {at::kFloat, dtype});
  TORCH_CHECK_TYPE(B.scalar_type() == A.scalar_type(), "B: expected dtype ", A.scalar_type(), " like A, got ",
                   B.scalar_type());
  check_dtype("alpha", alpha, {at::kFloat, A.scalar_type()});
  check_numel("A", A, mix.a_numel);
  check_numel("B", B, mix.b_numel);
  check_numel("alpha", alpha, (int64_t)mix.components.size());
  check_device("A", A, like_name, like);
  check_device("B", B, like_name, like);
  check_device("alpha", alpha, like_name, like);
}

inline void check_factors(const Mixture& mix, const at::Tensor& A, const at::Tensor& B, const at::Tensor& alpha,
                          const at::Tensor& like, const char* like_name) {
  check_factors(mix, A, B, alpha, like.scalar_type(), like, like_name);
}

// A mixture's arguments, checked against the layer.
inline Mixture parse_mixture(int64_t N, int64_t K, const at::Tensor& A, const std::optional<at::Tensor>& B,
                             const std::optional<at::Tensor>& alpha, at::IntArrayRef shapes, at::ScalarType dtype,
                             const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(B && alpha, "A is given, so B and alpha are needed too");
  const Mixture mix = parse_shapes(shapes);
  check_factors(mix, A, *B, *alpha, dtype, like, like_name);
  TORCH_CHECK_VALUE(mix.N == N && mix.K == K, "shapes: expected products of the weight's ", N, " x ", K, ", got ",
                    mix.N, " x ", mix.K);
  return mix;
}

// A bias is added before the one rounding to x's dtype, so it may be fp32 beside a 16-bit x.
inline void check_bias(const at::Tensor& bias, int64_t out, const at::Tensor& x) {
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == out, "bias: expected shape [", out, "], got ", bias.sizes());
  check_dtype("bias", bias, {at::kFloat, x.scalar_type()});
  check_device("bias", bias, "x", x);
}

inline void check_path(c10::string_view path) {
  TORCH_CHECK_VALUE(path == "auto" || path == "merged" || path == "factored",
                    "path: expected 'auto', 'merged' or 'factored', got '", path, "'");
}

// Gradients of the mixture reduce over the tokens that both have.
inline void check_grad_y(const at::Tensor& grad_y, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.sizes().slice(0, x.dim() - 1).equals(grad_y.sizes().slice(0, grad_y.dim() - 1)),
                    "grad_y: expected the leading sizes of x, ", x.sizes(), ", got ", grad_y.sizes());
}

inline void check_blocksize(int64_t blocksize) {
  TORCH_CHECK_VALUE(blocksize >= 2 && blocksize % 2 == 0, "blocksize: expected a positive even number, got ",
                    blocksize);
}

// The NF4 weight's tensors, made contiguous and checked; keep it alive while `params` is used.
struct Nf4Args {
  at::Tensor packed, absmax, absmax2, code2, offset;
  Nf4Params params;

  Nf4Args(const at::Tensor& packed_, const at::Tensor& absmax_, const std::optional<at::Tensor>& absmax2_,
          const std::optional<at::Tensor>& code2_, const std::optional<at::Tensor>& offset_, int64_t blocksize,
          int64_t blocksize2, int64_t N, int64_t K) {
    const bool nested = absmax2_.has_value();
    check_blocksize(blocksize);
    TORCH_CHECK_VALUE(N >= 0 && K >= 0, "N, K: expected sizes of at least 0, got ", N, ", ", K);
    const int64_t numel = N * K, blocks = (numel + blocksize - 1) / blocksize;
    packed = packed_.contiguous();  // of any dtype: bitsandbytes may store the bytes as bf16, fp16 or fp32
    const auto bytes = static_cast<int64_t>(packed.nbytes());
    TORCH_CHECK_VALUE(bytes >= (numel + 1) / 2, "packed: expected at least ", (numel + 1) / 2, " bytes for ", N, " x ",
                      K, ", got ", bytes);
    check_device("absmax", absmax_, "packed", packed);
    absmax = absmax_.contiguous();
    TORCH_CHECK_VALUE(absmax.numel() >= blocks, "absmax: expected ", blocks, " values (", N, " x ", K, " in blocks of ",
                      blocksize, "), got ", absmax.numel());
    if (nested) {
      TORCH_CHECK_VALUE(code2_.has_value() && offset_.has_value(),
                        "absmax2 is given, so code2 and offset are needed too (double quantization)");
      TORCH_CHECK_VALUE(blocksize2 > 0, "blocksize2: expected a positive number, got ", blocksize2);
      check_dtype("absmax", absmax, {at::kByte});
      check_dtype("absmax2", *absmax2_, {at::kFloat});
      check_dtype("code2", *code2_, {at::kFloat});
      check_dtype("offset", *offset_, {at::kFloat});
      check_numel("code2", *code2_, 256);
      check_numel("offset", *offset_, 1);
      for (const auto& [name, t] : {std::pair{"absmax2", *absmax2_}, {"code2", *code2_}, {"offset", *offset_}})
        check_device(name, t, "packed", packed);
      absmax2 = absmax2_->contiguous();
      code2 = code2_->contiguous();
      offset = offset_->contiguous();
      const int64_t blocks2 = (blocks + blocksize2 - 1) / blocksize2;
      TORCH_CHECK_VALUE(absmax2.numel() >= blocks2, "absmax2: expected ", blocks2, " values, got ", absmax2.numel());
    } else {
      check_dtype("absmax", absmax, {at::kFloat});
    }
    params = {static_cast<const uint8_t*>(packed.const_data_ptr()),
              nested ? nullptr : absmax.const_data_ptr<float>(),
              nested ? absmax.const_data_ptr<uint8_t>() : nullptr,
              nested ? absmax2.const_data_ptr<float>() : nullptr,
              nested ? code2.const_data_ptr<float>() : nullptr,
              nested ? offset.const_data_ptr<float>() : nullptr,
              blocksize,
              blocksize2,
              N,
              K};
  }
};

}  // namespace moka
