// The Python module allnc._C: loading it registers the ops (schema.cpp and the kernels); the module itself only
// tells how it was built.

#include <pybind11/pybind11.h>

#include "allnc_build_info.h"  // written by setup.py
#include "cuda/current_stream.h"

namespace py = pybind11;

// Equal to INTERFACE in allnc/_extension.py; raise both when the schema of an op changes.
constexpr int kInterface = 4;

namespace {

py::dict build_info() {
  py::dict info;
  info["interface"] = kInterface;
  info["torch"] = ALLNC_BUILD_TORCH;
  info["torch_target"] = ALLNC_BUILD_TORCH_TARGET;
  info["compiler"] = ALLNC_BUILD_COMPILER;
  info["flags"] = ALLNC_BUILD_FLAGS;
#ifdef ALLNC_WITH_CUDA
  info["cuda"] = ALLNC_BUILD_CUDA;
  info["cuda_arch_list"] = ALLNC_BUILD_CUDA_ARCH_LIST;
  info["torch_has_cuda"] = allnc::cuda::torch_has_cuda();
#else
  info["cuda"] = py::none();
  info["cuda_arch_list"] = py::none();
  info["torch_has_cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ and CUDA kernels of allnc, registered as torch.ops.allnc_C.*";
  m.def("build_info", &build_info, "How this extension was built, as a dict.");
}
