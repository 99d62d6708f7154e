// NF4 operators on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "kron_dense.h"

namespace moka {
namespace {

constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

at::Tensor dequant(const Nf4Args& w) {
  const auto& p = w.params;
  const int64_t n = p.N * p.K;
  at::Tensor out = at::empty({p.N, p.K}, at::kFloat);
  float* o = out.data_ptr<float>();
  for (int64_t e = 0; e < n; ++e) {
    const uint8_t b = p.packed[e / 2];
    const int64_t blk = e / p.blocksize;
    float s;
    if (p.absmax) s = p.absmax[blk];
    else { volatile float t = p.code2[p.absmax_q[blk]] * p.absmax2[blk / p.blocksize2]; s = t + *p.offset; }
    o[e] = kNf4[e % 2 ? b & 15 : b >> 4] * s;
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> nf4_quantize(const at::Tensor& w, int64_t blocksize) {
  at::Tensor f = w.contiguous().view(-1).to(at::kFloat);
  const int64_t n = f.numel(), blocks = (n + blocksize - 1) / blocksize;
  at::Tensor packed = at::zeros({(n + 1) / 2}, at::kByte), absmax = at::zeros({blocks}, at::kFloat);
  const float* s = f.const_data_ptr<float>();
  for (int64_t b = 0; b < blocks; ++b) {
    float m = 0;
    for (int64_t e = b * blocksize; e < std::min(n, (b + 1) * blocksize); ++e) m = std::max(m, std::abs(s[e]));
    absmax.data_ptr<float>()[b] = m;
    for (int64_t e = b * blocksize; e < std::min(n, (b + 1) * blocksize); ++e) {
      const float v = m > 0 ? s[e] / m : 0;
      int best = 0;
      for (int c = 1; c < 16; ++c) if (std::abs(v - kNf4[c]) < std::abs(v - kNf4[best])) best = c;
      packed.data_ptr<uint8_t>()[e / 2] |= e % 2 ? best : best << 4;
    }
  }
  return {packed, absmax};
}

at::Tensor nf4_dequantize(const at::Tensor& packed, const at::Tensor& absmax, const std::optional<at::Tensor>& absmax2,
                          const std::optional<at::Tensor>& code2, const std::optional<at::Tensor>& offset,
                          int64_t blocksize, int64_t blocksize2, int64_t N, int64_t K, at::ScalarType dtype,
                          const std::optional<at::Tensor>& A, const std::optional<at::Tensor>& B,
                          const std::optional<at::Tensor>& alpha, at::IntArrayRef shapes) {
  at::Tensor w = dequant(Nf4Args(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K));
  if (A) w = w.to(A->scalar_type() == at::kDouble ? at::kDouble : at::kFloat) + dense_mixture(*A, *B, *alpha, parse_shapes(shapes));
  return w.to(dtype);
}

at::Tensor nf4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                      const std::optional<at::Tensor>& absmax2, const std::optional<at::Tensor>& code2,
                      const std::optional<at::Tensor>& offset, int64_t blocksize, int64_t blocksize2, int64_t N,
                      int64_t K, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& A,
                      const std::optional<at::Tensor>& B, const std::optional<at::Tensor>& alpha,
                      at::IntArrayRef shapes, bool transpose, c10::string_view path) {
  check_last_dim("x", x, transpose ? N : K);
  at::Tensor w = nf4_dequantize(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K,
                                x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat, A, B, alpha, shapes);
  at::Tensor y = at::matmul(x.to(w.scalar_type()), transpose ? w : w.t());
  if (bias) y = y + bias->to(y.scalar_type());
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(moka, CPU, m) {
  m.impl("nf4_quantize", &nf4_quantize);
  m.impl("nf4_dequantize", &nf4_dequantize);
  m.impl("nf4_linear", &nf4_linear);
}

}  // namespace moka
