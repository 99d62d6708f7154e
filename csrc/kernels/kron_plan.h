// How a mixture is computed: components of equal shape are stacked into one group, each group gets the cheaper
// contraction order, and the factors are packed as its kernel reads them. T is float or double throughout.
#pragma once

#include <vector>

#include "params.h"

namespace moka {

enum class KronUse {
  kMix,           // y = sum_i alpha_i (A_i kron B_i) x
  kMixTranspose,  // the same with A_i^T kron B_i^T
  kGrad,          // dA, dB from x and dy, token by token
  kContract,      // dA, dB from rows of G = dY^T X
  kDense,         // rows of sum_i alpha_i A_i kron B_i
};

// Sizes are those of the operator as the kernel applies it: transposed for kMixTranspose and for `flipped`.
template <class T>
struct KronGroup {
  int64_t ma, na, mb, nb;
  int64_t count;      // stacked components g; 1 where a factor is the identity
  Identity identity;  //
  bool a_first;       // kMix: V = A X before Y = V B^T; otherwise U = X B^T before Y = A U
  bool flipped;       // kGrad: x and dy, and both factors' sides, are exchanged; this turns "B first" into "A first"
  const T* a;         // [g, ma, na]
  const T*
      b;  // kMix a_first [g, nb, mb], else [nb, g, mb]; kGrad [mb, g, nb]; kContract [mb, nb, g]; kDense [g, mb, nb]
  int64_t grad_a;  // where dA^T [na, g, ma] lies in the accumulator; -1 when not wanted
  int64_t grad_b;  // where dB [mb, g, nb] lies
};

template <class T>
struct KronPlan {
  std::vector<KronGroup<T>> groups;
  std::vector<std::vector<int64_t>> members;  // the components of each group
  std::vector<T> factors;                     // what the groups' a and b point into
  int64_t scratch_per_token = 0;              // elements; the kernels need one token more than they are given
  int64_t accumulator = 0;                    // elements of all gradients
  double cost = 0;                            // multiply-adds per token, edges counted as whole vectors

  KronPlan() = default;
  KronPlan(KronPlan&&) = default;
  KronPlan& operator=(KronPlan&&) = default;
  KronPlan(const KronPlan&) = delete;
};

// A, B, alpha as in params.h; alpha is folded into the factors for kMix, kMixTranspose and kDense.
template <class T>
KronPlan<T> plan_kron(const KronParams& params, const T* A, const T* B, const T* alpha, KronUse use, bool need_a = true,
                      bool need_b = true);

// From accumulated gradients, without alpha, to those of the flat parameters; null outputs are skipped.
//   grad_A_i = alpha_i dA_i,  grad_B_i = alpha_i dB_i,  grad_alpha_i = <dA_i, A_i> (or <dB_i, B_i>)
template <class T>
void finish_gradients(const KronPlan<T>& plan, const KronParams& params, const T* accumulator, const T* A, const T* B,
                      const T* alpha, T* grad_A, T* grad_B, T* grad_alpha);

}  // namespace moka
