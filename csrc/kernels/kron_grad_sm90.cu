// The host's part of the Hopper gradient kernel: which shapes, which thread blocks, the tensor maps.
#include "kron_grad_sm90.cuh"
#include "kron_grad_sm90.h"
#include "tensor_map.h"

namespace moka::cuda {
namespace {

struct ShapeRow {
  int s1, l1, l2, s2, padded, tokens, pair;
  bool exact, maps2;  // for no smaller A; T2 by a tensor map
  double cost;        // of one token, relative
};

template <class... Shapes>
const ShapeRow* table(GradFamily<Shapes...>, int* count) {
  static constexpr ShapeRow rows[] = {{Shapes::kS1, Shapes::kL1, Shapes::kL2, Shapes::kS2, Shapes::kP1, Shapes::kTokens,
                                       Shapes::kPair, Shapes::kExact, Shapes::kMaps2, Shapes::cost()}...};
  *count = sizeof...(Shapes);
  return rows;
}

constexpr int kFamilies = 5;

const ShapeRow* family_table(int family, int* count) {
  switch (family) {
    case 0:
      return table(GradSquare{}, count);
    case 1:
      return table(GradMlp{}, count);
    case 2:
      return table(GradKv{}, count);
    case 3:
      return table(GradMedium{}, count);
    default:
      return table(GradMlp43{}, count);
  }
}

// What a group of components of this shape costs per token, with the L2 that it has: measured, half of it is the same
// for all.
double cost(const ShapeRow& s, int l2) { return s.cost * (0.5 + 0.5 * ceil_div(l2, 64) / ceil_div(s.l2, 64)); }

// The family's cheapest shape for this component, in a group of its own; shape -1 when there is none.
GradGroup find_shape(int family, const KronComponent& c, int index) {
  int count;
  const ShapeRow* rows = family_table(family, &count);
  GradGroup best = {-1, 0, 0, 0, index, -1, 0, 0};
  // whole rows of four sums
  if (c.identity != Identity::kNone || c.ma * c.na % 4 != 0) return best;
  for (int mirrored = 0; mirrored < 2; ++mirrored) {
    const int64_t s1 = mirrored ? c.na : c.ma, l1 = mirrored ? c.nb : c.mb;
    const int64_t l2 = mirrored ? c.ma : c.na, s2 = mirrored ? c.mb : c.nb;
    for (int i = 0; i < count; ++i) {
      const ShapeRow& s = rows[i];
      const bool fits = s.exact ? s1 == s.s1 && l2 == s.l2 : s1 <= s.s1 && l2 <= s.l2;
      if (!fits || l1 != s.l1 || s2 != s.s2) continue;
      const GradGroup group = {i, mirrored, static_cast<int>(s1), static_cast<int>(l2), index, -1, 0, 0};
      if (best.shape < 0 || cost(s, group.l2) < cost(rows[best.shape], best.l2)) best = group;
    }
  }
  return best;
}

bool plan_family(const KronParams& mixture, int family, GradPlan* plan) {
  plan->family = family;
  plan->count = 0;
  plan->slab = 0;
  int count;
  const ShapeRow* rows = family_table(family, &count);
  for (int i = 0; i < mixture.r; ++i) {
    const KronComponent& c = mixture.components[i];
    const GradGroup own = find_shape(family, c, i);
    if (own.shape < 0) return false;
    const auto takes = [&](const GradGroup& g) {
      if (rows[g.shape].pair == 1) return false;
      return g.shape == own.shape && g.mirrored == own.mirrored && g.s1 == own.s1 && g.l2 == own.l2 && g.second < 0;
    };
    GradGroup *group = plan->group, *end = group + plan->count;
    while (group < end && !takes(*group)) ++group;
    if (group < end) {
      group->second = i;
    } else {
      if (plan->count == kMaxGradGroups) return false;
      plan->group[plan->count++] = own;
    }
    const int64_t floats = 2 * (c.ma * c.na + c.mb * c.nb);
    plan->slab = floats > plan->slab ? floats : plan->slab;
  }
  return plan->count > 0;
}

// [M, rows, columns] in boxes of tokens x box_rows x 64; what lies outside reads as zeros.
bool encode(CUtensorMap* map, const void* base, int64_t M, int rows, int columns, int tokens, int box_rows) {
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(M)};
  const cuuint64_t stride[2] = {size[0] * 2, size[0] * size[1] * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(tokens)};
  return encode_map<3>(map, base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, size, stride, box);
}

}  // namespace

bool plan_grad(const KronParams& mixture, int sms, GradPlan* plan) {
  int family = 0;
  while (family < kFamilies && !plan_family(mixture, family, plan)) ++family;
  if (family == kFamilies || plan->count > sms) return false;
  int rows;
  const ShapeRow* shapes = family_table(family, &rows);
  // one thread block each, then always another for the group whose blocks have most to do
  GradGroup* group = plan->group;
  for (int g = 0; g < plan->count; ++g) group[g].cta_count = 1;
  const auto work = [&](int g) { return cost(shapes[group[g].shape], group[g].l2) / group[g].cta_count; };
  for (int spare = sms - plan->count; spare > 0; --spare) {
    int most = 0;
    for (int g = 1; g < plan->count; ++g)
      if (work(g) > work(most)) most = g;
    ++group[most].cta_count;
  }
  for (int g = 1; g < plan->count; ++g) group[g].cta_begin = group[g - 1].cta_begin + group[g - 1].cta_count;
  return true;
}

cudaError_t launch_kron_grad_sm90(const void* x, const void* dy, int64_t M, const MixtureArgs& mix,
                                  const GradPlan& plan, int sms, float* partial, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  GradLaunch p;
  p.plan = plan;
  p.x = x, p.dy = dy;
  p.M = M;
  p.factor_fp32 = mix.factor_dtype == Dtype::kF32;
  const int size = p.factor_fp32 ? 4 : 2;
  int rows;
  const ShapeRow* shapes = family_table(plan.family, &rows);
  for (int g = 0; g < plan.count; ++g) {
    const GradGroup& group = plan.group[g];
    const ShapeRow& s = shapes[group.shape];
    const bool ok = encode(&p.t1[g], group.mirrored ? x : dy, M, group.s1, s.l1, s.tokens, s.padded) &&
                    (!s.maps2 || encode(&p.t2[g], group.mirrored ? dy : x, M, group.l2 * s.s2 / 64, 64, s.tokens, 64));
    if (!ok) return cudaErrorInvalidValue;
    const int pair[2] = {group.first, group.second};
    for (int i = 0; i < 2; ++i) {
      const KronComponent* c = pair[i] < 0 ? nullptr : mix.shapes.components + pair[i];
      const void* a = c ? static_cast<const char*>(mix.A) + c->a_offset * size : nullptr;
      const void* b = c ? static_cast<const char*>(mix.B) + c->b_offset * size : nullptr;
      p.f1[g][i] = b;
      p.f2[g][i] = a;
    }
  }
  switch (plan.family) {
    case 0:
      return launch_grad_square(p, sms, partial, stream);
    case 1:
      return launch_grad_mlp(p, sms, partial, stream);
    case 2:
      return launch_grad_kv(p, sms, partial, stream);
    case 3:
      return launch_grad_medium(p, sms, partial, stream);
    default:
      return launch_grad_mlp43(p, sms, partial, stream);
  }
}

}  // namespace moka::cuda
