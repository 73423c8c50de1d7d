// The ops hycon_lse_forward and hycon_lse_backward: HyCon's work on pairs of rows alone (hycon_problem.h), with
// weights and gradients of the rows given by the caller.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "hycon_problem.h"

namespace allnc {
namespace cpu {
namespace {

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " must be float32, or float64 if a is (z also bfloat16, if a is float32); got ",
      "ScalarType ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(
      t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions; got ", t.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, "; got ", t.size(dim));
    ++dim;
  }
}

double value_of(const Tensor& temperature, ScalarType type) {
  STD_TORCH_CHECK(
      temperature.numel() == 1 && temperature.scalar_type() == type && type == accumulation_type(type),
      "temperature must be one element of the type of a, float32 or float64");
  const void* const data = temperature.const_data_ptr();
  return type == ScalarType::Double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}

template <class Z, class T>
Arguments<Z, T> check_arguments(
    const Tensor& z, const std::optional<Tensor>& mu, const Tensor& a, const std::optional<Tensor>& b,
    double temperature, int64_t own) {
  STD_TORCH_CHECK(z.dim() == 2, "z must have 2 dimensions; got ", z.dim());
  STD_TORCH_CHECK(mu.has_value() == b.has_value(), "mu and b must be given together");
  STD_TORCH_CHECK(!mu || mu->dim() == 2, "mu must have 2 dimensions");
  const int64_t anchors = z.size(0);
  STD_TORCH_CHECK(
      own == -1 || (own >= 1 && own <= anchors), "own must be in [1, ", anchors, "], or -1 for all; got ", own);
  if (own == -1) own = anchors;
  const Sizes sizes(own, anchors - own, mu ? mu->size(0) : 0, z.size(1));
  const ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  check(z, "z", std::is_same_v<Z, BFloat16> ? ScalarType::BFloat16 : type, {anchors, sizes.dim});
  check(a, "a", type, {anchors});
  if (mu) {
    check(*mu, "mu", type, {sizes.means, sizes.dim});
    check(*b, "b", type, {sizes.means});
  }
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const Z* const rows = static_cast<const Z*>(z.const_data_ptr());
  return {sizes, rows, mu ? data(*mu) : nullptr, data(a), b ? data(*b) : nullptr, temperature, false};
}

// out [count, D] = grad / temperature without the padding.
template <class E, class G>
void write_gradient(const Problem<E>& p, int64_t offset, int64_t count, double temperature, G* out) {
  const Sum<E> factor = static_cast<Sum<E>>(1 / temperature);
  torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Sum<E>* grad = p.grad + (offset + row) * p.stride;
      for (int64_t k = 0; k < p.dim; ++k) out[row * p.dim + k] = static_cast<G>(grad[k] * factor);
    }
  });
}

template <class E, class Z, class T>
void lse_backward(
    const Arguments<Z, T>& in, const T* grad_lse, const T* lse, bool shifted, const Tensor& like, Z* dz, T* dmu) {
  Workspace<T> workspace(like);
  const Sizes& sizes = in.sizes;
  const auto [p, finite] = lse_gradient<E>(in, grad_lse, lse, shifted, workspace);
  if (!finite) {
    std::fill_n(dz, sizes.own * sizes.dim, static_cast<Z>(std::numeric_limits<T>::quiet_NaN()));
    std::fill_n(dmu, sizes.means * sizes.dim, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  write_gradient(p, 0, sizes.own, in.temperature, dz);
  write_gradient(p, sizes.mean_offset, sizes.means, in.temperature, dmu);
}

Tensor hycon_lse_forward(
    Tensor z, std::optional<Tensor> mu, Tensor a, std::optional<Tensor> b, Tensor temperature, bool shifted,
    int64_t part, int64_t parts) {
  STD_TORCH_CHECK(part >= 0 && part < parts, "part must be in [0, parts); got ", part, " of ", parts);
  z = torch::stable::contiguous(z);
  mu = contiguous(mu);
  a = torch::stable::contiguous(a);
  b = contiguous(b);
  const double t = value_of(temperature, a.scalar_type());
  return dispatch(z.scalar_type(), a.scalar_type(), t, [&](auto of_z, auto of_sums, auto of_products) {
    using T = decltype(of_sums);
    const auto in = check_arguments<decltype(of_z), T>(z, mu, a, b, t, -1);
    Tensor lse = torch::stable::new_empty(a, {in.sizes.own});
    lse_forward<decltype(of_products)>(in, shifted, part, parts, a, static_cast<T*>(lse.mutable_data_ptr()));
    return lse;
  });
}

std::tuple<Tensor, Tensor> hycon_lse_backward(
    Tensor grad_lse, Tensor lse, Tensor z, std::optional<Tensor> mu, Tensor a, std::optional<Tensor> b,
    Tensor temperature, bool shifted, int64_t own) {
  grad_lse = torch::stable::contiguous(grad_lse);
  lse = torch::stable::contiguous(lse);
  z = torch::stable::contiguous(z);
  mu = contiguous(mu);
  a = torch::stable::contiguous(a);
  b = contiguous(b);
  const double t = value_of(temperature, a.scalar_type());
  return dispatch(z.scalar_type(), a.scalar_type(), t, [&](auto of_z, auto of_sums, auto of_products) {
    using Z = decltype(of_z);
    using T = decltype(of_sums);
    const auto in = check_arguments<Z, T>(z, mu, a, b, t, own);
    check(grad_lse, "grad_lse", a.scalar_type(), {in.sizes.anchors()});
    check(lse, "lse", a.scalar_type(), {in.sizes.anchors()});
    Tensor dz = torch::stable::new_empty(z, {in.sizes.own, in.sizes.dim});
    Tensor dmu = torch::stable::new_empty(a, {in.sizes.means, in.sizes.dim});
    lse_backward<decltype(of_products)>(
        in, static_cast<const T*>(grad_lse.const_data_ptr()), static_cast<const T*>(lse.const_data_ptr()), shifted, a,
        static_cast<Z*>(dz.mutable_data_ptr()), static_cast<T*>(dmu.mutable_data_ptr()));
    return std::make_tuple(dz, dmu);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) {
  m.impl("hycon_lse_forward", TORCH_BOX(&allnc::cpu::hycon_lse_forward));
  m.impl("hycon_lse_backward", TORCH_BOX(&allnc::cpu::hycon_lse_backward));
}
