#include "kron_grad_sm90.cuh"

namespace moka::cuda {

cudaError_t launch_grad_mlp43(const GradLaunch& p, int sms, float* partial, cudaStream_t stream) {
  return launch_grad_family(GradMlp43{}, p, sms, partial, stream);
}

}  // namespace moka::cuda
