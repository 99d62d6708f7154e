// The host's part of the Hopper gradient kernel: which shapes, which thread blocks, the tensor maps.
#include "kron_grad_sm90.cuh"
#include "kron_grad_sm90.h"
#include "tensor_map.h"

namespace moka::cuda {
namespace {

struct ShapeRow {
  int s1, l1, l2, s2, padded, tokens, map_rows2;
  double cost;  // of one token, relative
};

template <class... Shapes>
const ShapeRow* table(GradFamily<Shapes...>, int* count) {
  static constexpr ShapeRow rows[] = {{Shapes::kS1, Shapes::kL1, Shapes::kL2, Shapes::kS2, Shapes::kP1, Shapes::kTokens,
                                       Shapes::kMapRows2, Shapes::cost()}...};
  *count = sizeof...(Shapes);
  return rows;
}

constexpr int kFamilies = 3;

const ShapeRow* family_table(int family, int* count) {
  switch (family) {
    case 0:
      return table(GradSquare{}, count);
    case 1:
      return table(GradMlp{}, count);
    default:
      return table(GradKv{}, count);
  }
}

// The family's shape of this component, -1 when it has none.
int find_shape(int family, const KronComponent& c, int* mirrored) {
  int count;
  const ShapeRow* rows = family_table(family, &count);
  for (*mirrored = 0; *mirrored < 2; ++*mirrored)
    for (int i = 0; i < count; ++i) {
      const ShapeRow& s = rows[i];
      const bool same = *mirrored ? c.na == s.s1 && c.nb == s.l1 && c.ma == s.l2 && c.mb == s.s2
                                  : c.ma == s.s1 && c.mb == s.l1 && c.na == s.l2 && c.nb == s.s2;
      if (same && c.identity == Identity::kNone) return i;
    }
  return -1;
}

bool plan_family(const KronParams& mixture, int family, GradPlan* plan) {
  plan->family = family;
  plan->count = 0;
  plan->slab = 0;
  for (int i = 0; i < mixture.r; ++i) {
    const KronComponent& c = mixture.components[i];
    int mirrored, g = 0;
    const int shape = find_shape(family, c, &mirrored);
    if (shape < 0) return false;
    GradGroup* group = plan->group;
    while (g < plan->count && (group[g].shape != shape || group[g].mirrored != mirrored || group[g].second >= 0)) ++g;
    if (g < plan->count) {
      group[g].second = i;
    } else {
      if (plan->count == kMaxGradGroups) return false;
      group[plan->count++] = {shape, mirrored, i, -1, 0, 0};
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
  for (int spare = sms - plan->count; spare > 0; --spare) {
    int most = 0;
    for (int g = 1; g < plan->count; ++g)
      if (shapes[group[g].shape].cost * group[most].cta_count > shapes[group[most].shape].cost * group[g].cta_count)
        most = g;
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
    const bool ok = encode(&p.t1[g], group.mirrored ? x : dy, M, s.s1, s.l1, s.tokens, s.padded) &&
                    (!s.map_rows2 || encode(&p.t2[g], group.mirrored ? dy : x, M, s.map_rows2, 64, s.tokens, 64));
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
    default:
      return launch_grad_kv(p, sms, partial, stream);
  }
}

}  // namespace moka::cuda
