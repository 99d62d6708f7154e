// Every operator schema, once. Each backend registers its kernels in csrc/ops/<op>_<backend>, gradients are in
// csrc/autograd.cpp and csrc/lora.cpp.
//
// Argument groups used below:
//   NF4 weight  packed, absmax [, absmax2, code2, offset], blocksize, blocksize2, N, K   (kernels/params.h)
//   mixture     A, B (flat factors), alpha [r] (scale times gate), shapes (5 integers per component:
//               ma, na, mb, nb, identity; kernels/params.h)
//               nf4_linear_rows: one of several mixtures for each row of x, A [adapters, entries of all A_i], B
//               likewise, alpha [adapters, r], adapter [rows] int32 (below 0: no mixture)
//   nf4_lora, nf4_linear_lora, lora_grad
//               A [r, K], B [N, r]; dtypes of the products with W (compute) and with A and B (low)
//   path        "auto", "merged" or "factored": how the mixture is computed (ops/choose.h)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "build_info.h"
#include "kernels/simd.h"
#include "ops/choose.h"

TORCH_LIBRARY(moka, m) {
  m.def("nf4_quantize(Tensor w, int blocksize) -> (Tensor packed, Tensor absmax)");
  m.def(
      "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
      "int blocksize, int blocksize2, int N, int K, ScalarType dtype, "
      "Tensor? A, Tensor? B, Tensor? alpha, int[] shapes) -> Tensor");
  m.def(
      "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
      "int blocksize, int blocksize2, int N, int K, Tensor? bias, "
      "Tensor? A, Tensor? B, Tensor? alpha, int[] shapes, bool transpose, str path) -> Tensor");
  m.def(
      "nf4_linear_rows(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
      "int blocksize, int blocksize2, int N, int K, Tensor? bias, "
      "Tensor A, Tensor B, Tensor alpha, Tensor adapter, int[] shapes) -> Tensor");
  m.def(
      "dense_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor alpha, int[] shapes, str path) "
      "-> Tensor");
  m.def(
      "nf4_lora(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
      "int blocksize, int blocksize2, int N, int K, Tensor? bias, "
      "Tensor A, Tensor B, float scale, ScalarType compute, ScalarType low) -> Tensor");
  m.def(
      "nf4_linear_lora(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
      "int blocksize, int blocksize2, int N, int K, Tensor? bias, "
      "Tensor A, Tensor B, Tensor u, float scale, bool transpose, ScalarType dtype) -> Tensor");
  m.def(
      "lora_grad(Tensor grad_y, Tensor? x, Tensor A, Tensor B, Tensor? u, float scale, ScalarType dtype_A, "
      "ScalarType dtype_B) -> (Tensor grad_u, Tensor grad_A, Tensor grad_B)");
  m.def("kron_add(Tensor weight, Tensor A, Tensor B, Tensor alpha, int[] shapes) -> Tensor");
  m.def(
      "kron_mix(Tensor x, Tensor A, Tensor B, Tensor alpha, int[] shapes, bool transpose, Tensor? add) -> "
      "Tensor");
  m.def(
      "kron_mix_grad(Tensor x, Tensor grad_y, Tensor A, Tensor B, Tensor alpha, int[] shapes, "
      "bool need_A, bool need_B, bool need_alpha) -> (Tensor grad_A, Tensor grad_B, Tensor grad_alpha)");
  m.def("gate(Tensor logits, float scale) -> Tensor alpha");
  m.def("gate_grad(Tensor alpha, Tensor grad_alpha, float scale) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of moka; they are reached as torch.ops.moka.*";
  m.def("build_info", &moka::build_info, "What this extension was built with, as a dict of strings.");
  m.def("cpu_isa", [] { return moka::isa_name(moka::active_isa()); }, "Instruction set the CPU kernels use.");
  m.def("set_cpu_isa", &moka::set_isa, "Test hook: scalar, avx2, avx512 or auto; False when this CPU lacks it.");
  m.def("nf4_linear_choice", &moka::describe_nf4_linear,
        "How nf4_linear runs an fp32 input of `tokens` rows on the CPU, in words: (tokens, N, K, shapes, transpose, "
        "path).");
}
