// The kernels as XLA handlers, for jax.ffi (fastedit/ops/jax/native.py registers them).
#pragma once
#include "xla_abi.h"

namespace fastedit {

struct XlaHandler {
  const char* platform;  // "cpu", or "CUDA" where the build has it
  const char* op;
  xla::Handler* handler;
};

extern const XlaHandler kXlaHandlers[];
extern const int kXlaHandlerCount;

}  // namespace fastedit
