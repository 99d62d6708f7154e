// The gate wherever a backend has no kernel of its own.
#include "gate.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(moka, CompositeExplicitAutograd, m) {
  m.impl("gate", &moka::gate);
  m.impl("gate_grad", &moka::gate_grad);
}
