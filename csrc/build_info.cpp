#include "build_info.h"

#include <pybind11/stl.h>
#include <torch/version.h>

#ifndef MOKA_CUDA_ARCHS
#define MOKA_CUDA_ARCHS ""
#endif

namespace moka {

std::map<std::string, std::string> build_info() {
  return {{"torch", TORCH_VERSION}, {"cuda_archs", MOKA_CUDA_ARCHS}, {"compiler", __VERSION__}};
}

}  // namespace moka
