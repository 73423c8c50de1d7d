// What the CPU and the CUDA code of class_mean_ema share: argument checks and its state.
// N rows (activations), C classes, F columns (features).
#pragma once

#include <tuple>

#include "tensors.h"

namespace allnc {

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

}  // namespace allnc
