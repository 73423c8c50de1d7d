// What the ops share: types, argument checks and allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

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
  STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, "; got ", t.size(dim));
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

// "[2, 3]"
template <class Sizes>
std::string list_of(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  std::vector<int64_t> got;
  for (int64_t dim = 0; dim < t.dim(); ++dim) got.push_back(t.size(dim));
  STD_TORCH_CHECK(
      std::equal(got.begin(), got.end(), shape.begin(), shape.end()), name, " must have shape ", list_of(shape),
      "; got ", list_of(got));
}

inline void check_tensor(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  check_type(t, name, type);
  check_shape(t, name, shape);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor empty_like_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace allnc
