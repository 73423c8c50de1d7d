// The ops centred_unit_forward and centred_unit_backward: rows minus the mean of the rows seen, at unit length.
// allnc/ops/p2p/centred_unit.py has the formulas. C rows (classes), F columns.
//
//     m = (1/K) sum_c x_c,  u_c = r_c (x_c - m),  r_c = 1 / |x_c - m|, or 0 where |x_c - m| <= noise
//     dc_c = r_c (du_c - u_c u_c.du_c),  dx_c = dc_c - (1/K) sum_c' dc_c'
//
// with sums over the K rows seen; the others are never read, and their results are 0. A row as near to the centre as
// rounding puts it, noise = 8 eps max_c |x_c|, has no direction and no gradient. Nor has any row where all entries are
// below kLeastEntry. A side that is not centred has m = 0, noise = kShortest max_c |x_c|, and dx_c = dc_c.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "multiversion.h"

namespace allnc {
namespace cpu {

constexpr double kLeastEntry = 0x1p-100;  // as in allnc/ops/_common.py
constexpr double kShortest = 0x1p-30;     // as in allnc/ops/p2p/centred_unit.py

// Sums over a row are kept in this many partial sums, which vector units add at once.
constexpr int64_t kLanes = 16;

// x.y, rows of `columns` elements.
template <class T, class X, class Y>
ALLNC_MULTIVERSION T dot_rows(const X* __restrict x, const Y* __restrict y, int64_t columns) {
  T sums[kLanes] = {}, total = 0;
  int64_t f = 0;
  for (; f + kLanes <= columns; f += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += static_cast<T>(x[f + k]) * static_cast<T>(y[f + k]);
  }
  for (int64_t k = 0; f < columns; ++f, ++k) sums[k] += static_cast<T>(x[f]) * static_cast<T>(y[f]);
  for (int64_t k = 0; k < kLanes; ++k) total += sums[k];
  return total;
}

template <class X>
ALLNC_MULTIVERSION void add_to_sum(double* __restrict sum, const X* __restrict x, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) sum[f] += static_cast<double>(x[f]);
}

// out = x - y
template <class Z, class X, class T>
ALLNC_MULTIVERSION void subtract_row(Z* __restrict out, const X* x, const T* __restrict y, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) out[f] = static_cast<Z>(static_cast<T>(x[f]) - y[f]);
}

// out = x factor
template <class X, class T>
ALLNC_MULTIVERSION void scale_to(T* __restrict out, const X* __restrict x, T factor, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) out[f] = static_cast<T>(x[f]) * factor;
}

// The largest |x|. NaN may be passed over.
template <class T, class X>
T largest_entry(const X* x, int64_t columns) {
  T largest = 0;
  for (int64_t f = 0; f < columns; ++f) largest = std::max(largest, std::abs(static_cast<T>(x[f])));
  return largest;
}

template <class T>
ALLNC_MULTIVERSION void multiply_row(T* x, T factor, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) x[f] *= factor;
}

// out = (x - y along) factor
template <class T>
ALLNC_MULTIVERSION void project(
    T* __restrict out, const T* __restrict x, const T* __restrict y, T along, T factor, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) out[f] = (x[f] - y[f] * along) * factor;
}

namespace {

struct Seen {
  const bool* mask;  // [C]
  int64_t rows;      // C
  int64_t count;     // K, at least 1

  Seen(const Tensor& seen) : mask(static_cast<const bool*>(seen.const_data_ptr())), rows(seen.size(0)) {
    count = std::max<int64_t>(1, std::count(mask, mask + rows, true));
  }
};

// Calls f(c) for every row, rows of some 32,768 elements or more to a thread.
template <class F>
void for_each_row(const Seen& seen, int64_t columns, const F& f) {
  torch::stable::parallel_for(0, seen.rows, std::max<int64_t>(1, (1 << 15) / columns), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

// mean [F] of the rows seen of x [C, F]. Every thread adds up columns of its own, in one order for any number of them.
template <class X, class T>
void mean_of_seen(const X* x, const Seen& seen, int64_t columns, T* mean) {
  const int64_t share = std::max<int64_t>(64, (1 << 15) / seen.rows);
  torch::stable::parallel_for(0, columns, share, [&](int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 512;
    double sum[kColumns];
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t count = std::min(kColumns, end - first);
      std::fill_n(sum, count, 0.0);
      for (int64_t c = 0; c < seen.rows; ++c) {
        if (seen.mask[c]) add_to_sum(sum, x + c * columns + first, count);
      }
      for (int64_t f = 0; f < count; ++f) mean[first + f] = static_cast<T>(sum[f] / static_cast<double>(seen.count));
    }
  });
}

// Memory of `count` elements, nothing of which is written yet.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count) : memory(new T[count]) {}
  T* data() { return memory.get(); }
  std::unique_ptr<T[]> memory;
};

// u [C, F] and scale [C] (r of the head) of x [C, F].
template <class X, class T>
void unit_rows(const X* x, const Seen& seen, int64_t columns, bool centred, T* u, T* scale) {
  Scratch<T> centre(columns);
  if (centred) {
    mean_of_seen(x, seen, columns, centre.data());
  } else {
    std::fill_n(centre.data(), columns, T(0));
  }
  std::vector<double> squares(seen.rows, 0);
  for_each_row(seen, columns, [&](int64_t c) {
    const X* const row = x + c * columns;
    if (seen.mask[c]) squares[c] = dot_rows<T>(row, row, columns);
  });
  double largest = 0;
  for (const double square : squares) {
    if (!(square <= largest) && !std::isnan(largest)) largest = square;  // NaN stays
  }
  if (largest < 0x1p-60 || largest > 0x1p100) {  // squares near the ends of float's range, or beyond
    T top = 0;
    for (int64_t c = 0; c < seen.rows; ++c) {
      if (seen.mask[c]) top = std::max(top, largest_entry<T>(x + c * columns, columns));
    }
    if (top < T(kLeastEntry)) {
      std::fill_n(u, seen.rows * columns, T(0));
      std::fill_n(scale, seen.rows, T(0));
      return;
    }
    // Times a power of two, which rounds nothing. One for all rows, because they are centred together.
    const int exponent = std::isfinite(top) ? std::min(std::ilogb(top), std::numeric_limits<T>::max_exponent - 2) : 0;
    if (exponent != 0) {
      const T factor = std::ldexp(T(1), -exponent);
      Scratch<T> scaled(seen.rows * columns);
      for_each_row(seen, columns, [&](int64_t c) {
        if (seen.mask[c]) scale_to(scaled.data() + c * columns, x + c * columns, factor, columns);
      });
      unit_rows(scaled.data(), seen, columns, centred, u, scale);
      multiply_row(scale, factor, seen.rows);
      return;
    }
  }
  const double noise = (centred ? 8.0 * std::numeric_limits<T>::epsilon() : kShortest) * std::sqrt(largest);
  for_each_row(seen, columns, [&](int64_t c) {
    T* const row = u + c * columns;
    scale[c] = 0;
    if (!seen.mask[c]) {
      std::fill_n(row, columns, T(0));
      return;
    }
    subtract_row(row, x + c * columns, centre.data(), columns);
    const double square = dot_rows<T>(row, row, columns);
    if (square > noise * noise) {
      scale[c] = static_cast<T>(1 / std::sqrt(square));
      multiply_row(row, scale[c], columns);
    } else {
      std::fill_n(row, columns, static_cast<T>(0 * (square + noise)));  // NaN if there is any
    }
  });
}

// dx [C, F] from du [C, F].
template <class X, class T>
void unit_rows_backward(
    const T* du, const T* u, const T* scale, const Seen& seen, int64_t columns, bool centred, X* dx) {
  Scratch<T> own(std::is_same_v<X, T> ? 0 : seen.rows * columns), mean(columns);
  T* const of_units = std::is_same_v<X, T> ? reinterpret_cast<T*>(dx) : own.data();  // dc [C, F]
  for_each_row(seen, columns, [&](int64_t c) {
    const T *const of_u = du + c * columns, *const unit = u + c * columns;
    if (scale[c] != 0) {
      project(of_units + c * columns, of_u, unit, dot_rows<T>(unit, of_u, columns), scale[c], columns);
    } else {
      std::fill_n(of_units + c * columns, columns, T(0));
    }
  });
  if (centred) {
    mean_of_seen(of_units, seen, columns, mean.data());
  } else {
    std::fill_n(mean.data(), columns, T(0));
  }
  for_each_row(seen, columns, [&](int64_t c) {
    X* const row = dx + c * columns;
    if (seen.mask[c]) {
      subtract_row(row, of_units + c * columns, mean.data(), columns);
    } else {
      std::fill_n(row, columns, X(0));
    }
  });
}

template <class F>
void dispatch_sums(ScalarType type, const F& f) {
  if (type == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> centred_unit_forward(
    Tensor x, std::optional<Tensor> y, Tensor seen, bool centre_x, bool centre_y, ScalarType dtype) {
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0), columns = x.size(1);
  if (y) check_shape(*y, "y", {rows, columns});
  check_tensor(seen, "seen", ScalarType::Bool, {rows});
  STD_TORCH_CHECK(rows > 0 && columns > 0, "x must have at least one row and one column");
  seen = torch::stable::contiguous(seen);
  const Seen mask(seen);
  Tensor u = empty_like_on(x, {rows, columns}, dtype);
  Tensor v = y ? empty_like_on(x, {rows, columns}, dtype) : empty_like_on(x, {0}, dtype);
  Tensor scale = empty_like_on(x, {y ? 2 : 1, rows}, dtype);
  dispatch_sums(dtype, [&](auto of_sums) {
    using T = decltype(of_sums);
    T* const scales = static_cast<T*>(scale.mutable_data_ptr());
    const auto side = [&](const Tensor& side, const char* name, bool centred, Tensor& out, T* scales) {
      const Tensor dense = torch::stable::contiguous(side);
      dispatch_floating(dense.scalar_type(), name, [&](auto of_side) {
        T* const to = static_cast<T*>(out.mutable_data_ptr());
        unit_rows(data<decltype(of_side)>(dense), mask, columns, centred, to, scales);
      });
    };
    side(x, "x", centre_x, u, scales);
    if (y) side(*y, "y", centre_y, v, scales + rows);
  });
  return {u, v, scale};
}

std::tuple<Tensor, Tensor> centred_unit_backward(
    Tensor du, std::optional<Tensor> dv, Tensor u, std::optional<Tensor> v, Tensor scale, Tensor seen, bool centre_x,
    bool centre_y, ScalarType x_dtype, ScalarType y_dtype) {
  check_dim(u, "u", 2);
  const int64_t rows = u.size(0), columns = u.size(1);
  const ScalarType type = u.scalar_type();
  check_tensor(du, "du", type, {rows, columns});
  check_tensor(scale, "scale", type, {v ? 2 : 1, rows});
  check_tensor(seen, "seen", ScalarType::Bool, {rows});
  STD_TORCH_CHECK(dv.has_value() == v.has_value(), "dv and v must be given together");
  if (v) {
    check_tensor(*v, "v", type, {rows, columns});
    check_tensor(*dv, "dv", type, {rows, columns});
  }
  seen = torch::stable::contiguous(seen);
  scale = torch::stable::contiguous(scale);
  const Seen mask(seen);
  Tensor dx = empty_like_on(u, {rows, columns}, x_dtype);
  Tensor dy = v ? empty_like_on(u, {rows, columns}, y_dtype) : empty_like_on(u, {0}, y_dtype);
  dispatch_sums(type, [&](auto of_sums) {
    using T = decltype(of_sums);
    const T* const scales = data<T>(scale);
    const auto side = [&](const Tensor& grad, const Tensor& unit, const T* scales, const char* name, bool centred,
                          Tensor& out) {
      const Tensor dense_grad = torch::stable::contiguous(grad), dense_unit = torch::stable::contiguous(unit);
      dispatch_floating(out.scalar_type(), name, [&](auto of_side) {
        using X = decltype(of_side);
        X* const to = static_cast<X*>(out.mutable_data_ptr());
        unit_rows_backward(data<T>(dense_grad), data<T>(dense_unit), scales, mask, columns, centred, to);
      });
    };
    side(du, u, scales, "x_dtype", centre_x, dx);
    if (v) side(*dv, *v, scales + rows, "y_dtype", centre_y, dy);
  });
  return {dx, dy};
}

}  // namespace
}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) {
  m.impl("centred_unit_forward", TORCH_BOX(&allnc::cpu::centred_unit_forward));
  m.impl("centred_unit_backward", TORCH_BOX(&allnc::cpu::centred_unit_backward));
}
