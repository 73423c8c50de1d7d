// torch's current CUDA stream through the stable C interface.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

// In libtorch_cuda, and the only thing used from it. Weak and not linked against, so that an extension with CUDA
// code also loads, with its CPU ops, in a torch built without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace allnc::cuda {

inline bool torch_has_cuda() { return aoti_torch_get_current_cuda_stream != nullptr; }

// The stream torch queues work on; to be cast to cudaStream_t.
inline void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

}  // namespace allnc::cuda
