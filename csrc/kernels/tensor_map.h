// Tensor maps for the bulk tensor copies of sm90.cuh: two-dimensional, rows contiguous, boxes 128 bytes wide.
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

// [rows, columns] in boxes of box_rows x box_bytes: 128 or 64 in the swizzle of that width, or 16; rows beyond the end
// read as zeros.
inline bool encode_rows(CUtensorMap* map, const void* base, CUtensorMapDataType type, int size, int64_t rows,
                        int64_t columns, int box_rows, int box_bytes = 128) {
  const cuuint64_t shape[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * size};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes / size), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const auto swizzle = box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  return encode_tiled() &&
         encode_tiled()(map, type, 2, const_cast<void*>(base), shape, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace moka::cuda
