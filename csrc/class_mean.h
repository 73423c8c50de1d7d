// What the CPU and the CUDA code of class_mean_ema share: argument checks and allocation.
// N rows (activations), C classes, F columns (features).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <tuple>

namespace allnc {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums of float64 are kept in float64, of everything else in float32.
inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

// Calls f with a value of the C++ type that `type` stands for.
template <class F>
void dispatch_floating(ScalarType type, const char* name, const F& f) {
  switch (type) {
    case ScalarType::Half: f(Half{}); return;
    case ScalarType::BFloat16: f(BFloat16{}); return;
    case ScalarType::Float: f(float{}); return;
    case ScalarType::Double: f(double{}); return;
    default:
      STD_TORCH_CHECK(
          false, name, " must be float16, bfloat16, float32 or float64; got ScalarType ", static_cast<int>(type));
  }
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions; got ", t.dim());
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(
      t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, "; got ", t.size(dim));
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " must have ScalarType ", static_cast<int>(type), "; got ",
      static_cast<int>(t.scalar_type()));
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(
      t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
      " must be on the device of the first argument; got device index ", t.get_device_index(), ", expected ",
      like.get_device_index());
}

struct ClassMeanSizes {
  int64_t rows, classes, columns;
};

inline ClassMeanSizes check_class_mean_forward(
    const Tensor& features, const Tensor& labels, const Tensor& means, const Tensor& seen, double momentum) {
  check_dim(features, "features", 2);
  check_dim(means, "means", 2);
  check_dim(labels, "labels", 1);
  check_dim(seen, "seen", 1);
  const ClassMeanSizes sizes{features.size(0), means.size(0), features.size(1)};
  check_size(labels, "labels", 0, sizes.rows);
  check_size(means, "means", 1, sizes.columns);
  check_size(seen, "seen", 0, sizes.classes);
  check_type(labels, "labels", ScalarType::Long);
  check_type(seen, "seen", ScalarType::Bool);
  check_type(means, "means", accumulation_type(features.scalar_type()));
  check_device(labels, "labels", features);
  check_device(means, "means", features);
  check_device(seen, "seen", features);
  STD_TORCH_CHECK(momentum >= 0 && momentum < 1, "momentum must be in [0, 1); got ", momentum);
  return sizes;
}

inline ClassMeanSizes check_class_mean_backward(
    const Tensor& grad_value, const Tensor& labels, const Tensor& counts, const Tensor& seen_before,
    ScalarType features_type) {
  check_dim(grad_value, "grad_value", 2);
  check_dim(labels, "labels", 1);
  const ClassMeanSizes sizes{labels.size(0), grad_value.size(0), grad_value.size(1)};
  check_dim(counts, "counts", 1);
  check_dim(seen_before, "seen_before", 1);
  check_size(counts, "counts", 0, sizes.classes);
  check_size(seen_before, "seen_before", 0, sizes.classes);
  check_type(labels, "labels", ScalarType::Long);
  check_type(counts, "counts", ScalarType::Long);
  check_type(seen_before, "seen_before", ScalarType::Bool);
  check_type(grad_value, "grad_value", accumulation_type(features_type));
  check_device(labels, "labels", grad_value);
  check_device(counts, "counts", grad_value);
  check_device(seen_before, "seen_before", grad_value);
  return sizes;
}

// Rows of contiguous columns; the rows themselves may lie apart.
inline Tensor with_dense_rows(const Tensor& t) {
  const bool dense = t.size(1) <= 1 || t.stride(1) == 1;
  return dense ? t : torch::stable::contiguous(t);
}

// A dense tensor to update in place of one that may not be; `write_back` then brings the result there.
class DenseState {
 public:
  explicit DenseState(const Tensor& t) : original_(t), dense_(torch::stable::contiguous(t)) {}
  Tensor& dense() { return dense_; }
  void write_back() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_, dense_;
};

inline Tensor empty_like_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace allnc
