#include "kron_grad_sm90.cuh"

namespace moka::cuda {

cudaError_t launch_grad_medium(const GradLaunch& p, int sms, float* partial, cudaStream_t stream) {
  return launch_grad_family(GradMedium{}, p, sms, partial, stream);
}

}  // namespace moka::cuda
