// The Kronecker mixture, its parameter gradients and its dense form, compiled once per instruction set (simd.h).
//
// Per token, (A kron B) vec(X) = vec(A X B^T) in row-major order, with x as X [na, nb] and y as Y [ma, mb].
// Gradients (MoKA, arXiv 2508.03527), summed over tokens: dB = dY^T V with V = A X, dA = P X^T with P = dY B.
namespace moka {
namespace MOKA_SIMD {

template <class T>
void mix_group(const KronGroup<T>& q, const T* x, T* y, int64_t rows, int64_t in, int64_t out, T* scratch) {
  const int64_t ma = q.ma, na = q.na, mb = q.mb, nb = q.nb, g = q.count;
  SmallGemm<T> s{};
  s.a_inner = 1;
  if (q.identity == Identity::kA) {  // block diagonal: Y = X B^T
    s.m = rows * ma, s.n = mb, s.inner = nb;
    s.a = x, s.a_row = nb;
    s.b = q.b, s.b_inner = mb;
    s.c = y, s.c_row = mb, s.accumulate = true;
    return small_gemm(s);
  }
  if (q.identity == Identity::kB) {  // strided: Y = A X
    s.m = ma, s.n = nb, s.inner = na;
    s.a = q.a, s.a_row = na;
    s.b = x, s.b_inner = nb, s.b_panel = in;
    s.c = y, s.c_row = nb, s.c_panel = out, s.accumulate = true;
    s.panels = rows;
    return small_gemm(s);
  }
  if (q.a_first) {
    for (int64_t c = 0; c < g; ++c) {  // V [rows, ma, g, nb]
      s.m = ma, s.n = nb, s.inner = na;
      s.a = q.a + c * ma * na, s.a_row = na;
      s.b = x, s.b_inner = nb, s.b_panel = in;
      s.c = scratch + c * nb, s.c_row = g * nb, s.c_panel = ma * g * nb;
      s.panels = rows;
      small_gemm(s);
    }
    s.m = rows * ma, s.n = mb, s.inner = g * nb;
    s.a = scratch, s.a_row = g * nb;
    s.b = q.b, s.b_inner = mb;
    s.c = y, s.c_row = mb, s.accumulate = true;
    s.panels = 1;
    return small_gemm(s);
  }
  s.m = rows * na, s.n = g * mb, s.inner = nb;  // U [rows, na, g, mb]
  s.a = x, s.a_row = nb;
  s.b = q.b, s.b_inner = g * mb;
  s.c = scratch, s.c_row = g * mb;
  small_gemm(s);
  s.m = ma, s.n = mb, s.inner = na, s.outer = g;
  s.a = q.a, s.a_row = na, s.a_outer = ma * na;
  s.b = scratch, s.b_inner = g * mb, s.b_outer = mb, s.b_panel = na * g * mb;
  s.c = y, s.c_row = mb, s.c_panel = out, s.accumulate = true;
  s.panels = rows;
  small_gemm(s);
}

template <class T>
void mix(const KronGroups<T>& plan, const T* x, T* y, int64_t rows, int64_t in, int64_t out, T* scratch) {
  for (int64_t i = 0; i < plan.count; ++i) mix_group(plan.groups[i], x, y, rows, in, out, scratch);
}

// dst [cols, rows] = src [rows, cols]^T, both with a row stride.
template <class T>
MOKA_INLINE void transpose(const T* src, int64_t src_row, int64_t rows, int64_t cols, T* dst, int64_t dst_row) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) dst[j * dst_row + i] = src[i * src_row + j];
}

template <class T>
void grad_group(const KronGroup<T>& q, const T* x, const T* dy, int64_t rows, int64_t in, int64_t out, T* accumulator,
                T* scratch) {
  const int64_t ma = q.ma, na = q.na, mb = q.mb, nb = q.nb, g = q.count;
  SmallGemm<T> s{};
  if (q.grad_b >= 0) {
    const T* v = x;
    if (q.identity == Identity::kNone) {
      for (int64_t c = 0; c < g; ++c) {  // V [rows, ma, g, nb]
        s.m = ma, s.n = nb, s.inner = na;
        s.a = q.a + c * ma * na, s.a_row = na, s.a_inner = 1;
        s.b = x, s.b_inner = nb, s.b_panel = in;
        s.c = scratch + c * nb, s.c_row = g * nb, s.c_panel = ma * g * nb;
        s.panels = rows;
        small_gemm(s);
      }
      v = scratch;
    }
    s = SmallGemm<T>{};
    s.m = mb, s.n = g * nb, s.inner = rows * ma;  // dB [mb, g, nb] += dY^T V
    s.a = dy, s.a_row = 1, s.a_inner = mb;
    s.b = v, s.b_inner = g * nb;
    s.c = accumulator + q.grad_b, s.c_row = g * nb, s.accumulate = true;
    small_gemm(s);
  }
  if (q.grad_a >= 0) {
    T *p = scratch, *p_t = scratch + ma * g * nb;  // one token's P [ma, g, nb]; P^T [rows, nb, g, ma]
    for (int64_t t = 0; t < rows; ++t) {
      const T* token = dy + t * out;
      if (q.identity == Identity::kNone) {
        s = SmallGemm<T>{};
        s.m = ma, s.n = g * nb, s.inner = mb;
        s.a = token, s.a_row = mb, s.a_inner = 1;
        s.b = q.b, s.b_inner = g * nb;
        s.c = p, s.c_row = g * nb;
        small_gemm(s);
        token = p;
      }
      for (int64_t c = 0; c < g; ++c) transpose(token + c * nb, g * nb, ma, nb, p_t + t * nb * g * ma + c * ma, g * ma);
    }
    s = SmallGemm<T>{};
    s.m = na, s.n = g * ma, s.inner = nb, s.outer = rows;  // dA^T [na, g, ma] += X P^T
    s.a = x, s.a_row = nb, s.a_inner = 1, s.a_outer = in;
    s.b = p_t, s.b_inner = g * ma, s.b_outer = nb * g * ma;
    s.c = accumulator + q.grad_a, s.c_row = g * ma, s.accumulate = true;
    small_gemm(s);
  }
}

template <class T>
void grad(const KronGroups<T>& plan, const T* x, const T* dy, int64_t rows, T* accumulator, T* scratch) {
  for (int64_t i = 0; i < plan.count; ++i) {
    const KronGroup<T>& q = plan.groups[i];
    if (q.flipped)
      grad_group(q, dy, x, rows, plan.N, plan.K, accumulator, scratch);
    else
      grad_group(q, x, dy, rows, plan.K, plan.N, accumulator, scratch);
  }
}

// Calls f(ia, ib, count, offset) for the runs of equal ia in rows [row, row + rows), n = ia*mb + ib.
template <class F>
MOKA_INLINE void for_each_ia(int64_t row, int64_t rows, int64_t mb, F f) {
  for (int64_t n = row; n < row + rows;) {
    const int64_t ib = n % mb, rest = row + rows - n, count = mb - ib < rest ? mb - ib : rest;
    f(n / mb, ib, count, n - row);
    n += count;
  }
}

template <class T>
void contract_a(const KronGroup<T>& q, const T* G, int64_t row, int64_t rows, int64_t K, T* accumulator, T* scratch) {
  const int64_t ma = q.ma, na = q.na, nb = q.nb, g = q.count;
  for_each_ia(row, rows, q.mb, [&](int64_t ia, int64_t ib, int64_t count, int64_t offset) {
    T* out = accumulator + q.grad_a + ia;
    if (q.identity == Identity::kB) {  // dA[ia, ja] = sum_q G[(ia, q), (ja, q)]
      for (int64_t ja = 0; ja < na; ++ja)
        for (int64_t i = 0; i < count; ++i) out[ja * ma] += G[(offset + i) * K + ja * nb + ib + i];
      return;
    }
    SmallGemm<T> s{};  // dA[ia, ja, c] = sum_{ib, jb} G[(ia, ib), (ja, jb)] B[ib, jb, c]
    s.m = na, s.n = g, s.inner = nb, s.outer = count;
    s.a = G + offset * K, s.a_row = nb, s.a_inner = 1, s.a_outer = K;
    s.b = q.b + ib * nb * g, s.b_inner = g, s.b_outer = nb * g;
    s.c = scratch, s.c_row = g;
    small_gemm(s);
    for (int64_t ja = 0; ja < na; ++ja)
      for (int64_t c = 0; c < g; ++c) out[(ja * g + c) * ma] += scratch[ja * g + c];
  });
}

template <class T>
void contract_b(const KronGroup<T>& q, const T* G, int64_t row, int64_t rows, int64_t K, T* accumulator) {
  const int64_t ma = q.ma, na = q.na, nb = q.nb, g = q.count;
  for_each_ia(row, rows, q.mb, [&](int64_t ia, int64_t ib, int64_t count, int64_t offset) {
    T* out = accumulator + q.grad_b + ib * g * nb;
    if (q.identity == Identity::kA) {  // dB[ib, jb] = sum_p G[(p, ib), (p, jb)]
      for (int64_t i = 0; i < count; ++i)
        for (int64_t jb = 0; jb < nb; ++jb) out[i * nb + jb] += G[(offset + i) * K + ia * nb + jb];
      return;
    }
    SmallGemm<T> s{};  // dB[ib, c, jb] += sum_ja A[c, ia, ja] G[(ia, ib), (ja, jb)]
    s.m = g, s.n = nb, s.inner = na;
    s.a = q.a + ia * na, s.a_row = ma * na, s.a_inner = 1;
    s.b = G + offset * K, s.b_inner = nb, s.b_panel = K;
    s.c = out, s.c_row = nb, s.c_panel = g * nb, s.accumulate = true;
    s.panels = count;
    small_gemm(s);
  });
}

template <class T>
void add_dense(const KronGroups<T>& plan, T* w, int64_t row, int64_t rows) {
  for (int64_t i = 0; i < plan.count; ++i) {
    const KronGroup<T>& q = plan.groups[i];
    const int64_t ma = q.ma, na = q.na, mb = q.mb, nb = q.nb;
    for_each_ia(row, rows, mb, [&](int64_t ia, int64_t ib, int64_t count, int64_t offset) {
      T* out = w + offset * plan.K;
      if (q.identity == Identity::kA) {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t jb = 0; jb < nb; ++jb) out[n * plan.K + ia * nb + jb] += q.b[(ib + n) * nb + jb];
        return;
      }
      if (q.identity == Identity::kB) {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t ja = 0; ja < na; ++ja) out[n * plan.K + ja * nb + ib + n] += q.a[ia * na + ja];
        return;
      }
      SmallGemm<T> s{};  // W[(ia, ib), (ja, jb)] += sum_c A[c, ia, ja] B[c, ib, jb]
      s.m = na, s.n = nb, s.inner = q.count;
      s.a = q.a + ia * na, s.a_row = 1, s.a_inner = ma * na;
      s.b = q.b + ib * nb, s.b_inner = mb * nb, s.b_panel = nb;
      s.c = out, s.c_row = nb, s.c_panel = plan.K, s.accumulate = true;
      s.panels = count;
      small_gemm(s);
    });
  }
}

template <class T>
KronKernels<T> kron_table() {
  return {mix<T>, grad<T>, contract_a<T>, contract_b<T>, add_dense<T>};
}

}  // namespace MOKA_SIMD
}  // namespace moka
