// Tensor maps for bulk tensor copies.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moka::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, null where it has none.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled fn = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(p) : nullptr;
  }();
  return fn;
}

// `size`, innermost first, and `box` in elements, `stride` in bytes, of all dimensions but the innermost. A box's rows
// are 128 bytes, of which units of 16 are swizzled; what lies outside reads as zeros.
template <int kDims>
bool encode_map(CUtensorMap* map, const void* base, CUtensorMapDataType type, const cuuint64_t (&size)[kDims],
                const cuuint64_t (&stride)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  cuuint32_t step[kDims];
  for (cuuint32_t& s : step) s = 1;
  int device = 0;  // the driver needs a context, which a thread that has launched nothing, as one of autograd's, lacks
  return encode_tiled() && cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess &&
         encode_tiled()(map, type, kDims, const_cast<void*>(base), size, stride, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// [rows, columns] in boxes of box_rows x 128 bytes.
inline bool encode_rows(CUtensorMap* map, const void* base, CUtensorMapDataType type, int size, int64_t rows,
                        int64_t columns, int box_rows) {
  const auto width = static_cast<cuuint64_t>(columns);
  return encode_map<2>(map, base, type, {width, static_cast<cuuint64_t>(rows)}, {width * size},
                       {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(box_rows)});
}

}  // namespace moka::cuda
