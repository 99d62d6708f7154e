#include "build_info.h"

#include "build_facts.h"  // written by setup.py

#ifdef __clang__
#define MOKA_COMPILER __VERSION__
#else
#define MOKA_COMPILER "GCC " __VERSION__
#endif

namespace moka {

// Found by moka/_native.py in the file's bytes: an extension that does not load can still say what it was built for.
[[gnu::used]] static const char kBuiltFor[] = "moka-built-for-torch=" MOKA_TORCH_VERSION ";";

std::map<std::string, std::string> build_info() {
  return {{"torch", MOKA_TORCH_VERSION},
          {"cuda", MOKA_CUDA_VERSION},
          {"cuda_archs", MOKA_CUDA_ARCHS},
          {"compiler", MOKA_COMPILER},
          {"git_commit", MOKA_GIT_COMMIT}};
}

}  // namespace moka
