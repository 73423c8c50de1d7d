// The op p2p_blocks_forward: P2P of centred unit rows, as residuals or softmax weights of the
// C x C matrix of products, some rows at a time. allnc/ops/p2p/p2p.py has the formulas. C rows (classes), F columns, K
// classes seen.
//
// A gradient needs the residuals, or the weights, that the value is made of. The forward goes on to it while they are
// in the cache, so that they are formed once and never stored; allnc/ops multiplies by the gradient of the value.
// Residuals of a side with itself are symmetric: a triangle of them is formed,
//     value  1 C²F multiply-adds for etf with itself (and 2 for its gradient), else 2 (and 4),
// in matrix products of the library; what lies between them is one pass over rows in the cache.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../tensors.h"
#include "exp2.h"
#include "multiversion.h"

namespace allnc {
namespace cpu {

constexpr int64_t kPairLanes = 16;  // partial results of a row, which vector units form at once

// x += y; sum of squares.
template <class T>
ALLNC_MULTIVERSION T add_and_square(T* __restrict x, const T* __restrict y, int64_t count) {
  T sums[kPairLanes] = {}, total = 0;
  const auto term = [=](int64_t k) ALLNC_INLINED {
    x[k] += y[k];
    return x[k] * x[k];
  };
  int64_t k = 0;
  for (; k + kPairLanes <= count; k += kPairLanes) {
    for (int64_t lane = 0; lane < kPairLanes; ++lane) sums[lane] += term(k + lane);
  }
  for (int64_t lane = 0; k < count; ++k, ++lane) sums[lane] += term(k);
  for (int64_t lane = 0; lane < kPairLanes; ++lane) total += sums[lane];
  return total;
}

// x += y; the largest. NaN may be passed over.
template <class T>
ALLNC_MULTIVERSION T add_and_find_largest(T* __restrict x, const T* __restrict y, int64_t count) {
  T tops[kPairLanes], top = -std::numeric_limits<T>::infinity();
  for (int64_t lane = 0; lane < kPairLanes; ++lane) tops[lane] = top;
  const auto larger = [=](T top, int64_t k) ALLNC_INLINED {
    x[k] += y[k];
    return x[k] > top ? x[k] : top;
  };
  int64_t k = 0;
  for (; k + kPairLanes <= count; k += kPairLanes) {
    for (int64_t lane = 0; lane < kPairLanes; ++lane) tops[lane] = larger(tops[lane], k + lane);
  }
  for (int64_t lane = 0; k < count; ++k, ++lane) tops[lane] = larger(tops[lane], k);
  for (int64_t lane = 0; lane < kPairLanes; ++lane) top = tops[lane] > top ? tops[lane] : top;
  return top;
}

// 2^x for x <= 0 or NaN, 0 below 2^-126 (2^-1022) and for -inf.
template <class T>
ALLNC_INLINE T exp2_of_negative(T x) {
  using S = Exp2<T>;
  using Bits = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  const T rounded = x + S::kRound;
  const T f = x - (rounded - S::kRound);
  T q = S::kExp2[S::kDegree - 1];
  for (int k = S::kDegree - 2; k >= 0; --k) q = q * f + S::kExp2[k];
  q = q * f + T(1);
  Bits bits, shift;
  std::memcpy(&bits, &q, sizeof(T));
  std::memcpy(&shift, &rounded, sizeof(T));
  bits += static_cast<Bits>(static_cast<std::make_unsigned_t<Bits>>(shift) << S::kMantissa);
  T scaled;
  std::memcpy(&scaled, &bits, sizeof(T));
  scaled = x < S::kLowest ? T(0) : scaled;
  return x == x ? scaled : x;
}

// x = 2^((x - top) scale); sum.
template <class T>
ALLNC_MULTIVERSION T exponentials(T* x, T top, T scale, int64_t count) {
  T sums[kPairLanes] = {}, total = 0;
  const auto term = [=](int64_t k) ALLNC_INLINED { return x[k] = exp2_of_negative<T>((x[k] - top) * scale); };
  int64_t k = 0;
  for (; k + kPairLanes <= count; k += kPairLanes) {
    for (int64_t lane = 0; lane < kPairLanes; ++lane) sums[lane] += term(k + lane);
  }
  for (int64_t lane = 0; k < count; ++k, ++lane) sums[lane] += term(k);
  for (int64_t lane = 0; lane < kPairLanes; ++lane) total += sums[lane];
  return total;
}

template <class T>
ALLNC_MULTIVERSION void scale_pairs(T* x, T factor, int64_t count) {
  for (int64_t k = 0; k < count; ++k) x[k] *= factor;
}

namespace {

// Calls f(row), of `rows` rows of `columns` elements, and adds up its results in order.
template <class F>
double sum_over_rows(int64_t rows, int64_t columns, const F& f) {
  std::vector<double> results(rows);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) results[row] = f(row);
  });
  double total = 0;
  for (const double result : results) total += result;
  return total;
}

struct Options {
  const bool* seen;  // [C]
  int64_t num_seen;  // K, at least 2
  bool softmax;
  double temperature;
};

// Rows of products that a pass takes: of the classes from first_row on with those from first_column on.
template <class T>
struct Rows {
  T* data;  // [rows, columns]
  int64_t rows, columns, first_row, first_column;
};

// Subtracts rho where both classes are seen (elsewhere products are 0); the sum of squares. `mirrored`: columns behind
// the rows count twice.
template <class T>
double form_residuals(const Rows<T>& products, const Options& options, bool mirrored) {
  const auto [data, rows, columns, first_row, first_column] = products;
  const T share = T(1) / static_cast<T>(options.num_seen - 1);
  std::vector<T> offset(columns);  // -rho off the diagonal, for a row that is seen
  for (int64_t k = 0; k < columns; ++k) offset[k] = options.seen[first_column + k] ? share : T(0);
  const int64_t diagonal = first_row - first_column, once = mirrored ? diagonal + rows : columns;
  return sum_over_rows(rows, columns, [&, data = data, columns = columns, first_row = first_row](int64_t r) -> double {
    T* const row = data + r * columns;
    if (!options.seen[first_row + r]) {
      std::fill_n(row, columns, T(0));
      return 0;
    }
    row[diagonal + r] -= 1 + share;
    const double behind = add_and_square(row + once, offset.data() + once, columns - once);
    return add_and_square(row, offset.data(), once) + 2 * behind;
  });
}

// Turns products into temperature times the gradient by them of the sum of lse, which it returns. with_other: rows meet
// those of another matrix, and their own product is subtracted from the exponents.
template <class T>
double form_softmax(const Rows<T>& products, const Options& options, bool with_other) {
  constexpr double kLog2E = 1.44269504088896340736;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const auto [data, rows, columns, first_row, first_column] = products;
  const T scale = static_cast<T>(kLog2E / options.temperature);
  std::vector<T> offset(columns);
  for (int64_t k = 0; k < columns; ++k) offset[k] = options.seen[k] ? T(0) : kNone;
  return sum_over_rows(rows, columns, [&, data = data, columns = columns, first_row = first_row](int64_t r) -> double {
    T* const row = data + r * columns;
    if (!options.seen[first_row + r]) {
      std::fill_n(row, columns, T(0));
      return 0;
    }
    T& own = row[first_row + r];
    const double of_own = with_other ? own : T(0);
    own = kNone;
    T top = add_and_find_largest(row, offset.data(), columns);
    top = top == kNone ? T(0) : top;  // only NaN, which stays
    const T sum = exponentials(row, top, scale, columns);
    scale_pairs(row, T(1) / sum, columns);
    if (with_other) own = -1;
    return (top - of_own) / options.temperature + std::log(static_cast<double>(sum));
  });
}

Tensor rows_of(const Tensor& x, int64_t first, int64_t count) {
  Tensor whole = x;
  return torch::stable::narrow(whole, 0, first, count);
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

// out = beta out + alpha a b. Part of the stable interface: what ahead-of-time compiled models call.
void multiply_into(Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  STD_TORCH_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha) == 0, "a matrix product failed");
}

// The value of a pair, and its gradients to dx and dy [C, F], of zeros. Without y, x meets itself and dy is not used.
template <class T>
double visit_pair(
    const Tensor& x, const Tensor* y, const Options& options, bool with_gradient, Tensor& dx, Tensor* dy) {
  // Products that stay in the second-level cache; with fewer rows, matrix products would wait for memory. The gradient
  // of the columns is read and written for every pass, and of thousands of classes it stays in no cache: more rows
  // share it then (C = 8142, F = 768, softmax: 1.4 times as fast with 512 rows as with 128).
  constexpr int64_t kElements = int64_t{1} << 18, kManyClasses = 4096;
  const int64_t classes = x.size(0), least_rows = classes < kManyClasses ? 128 : 512;
  const Tensor& other = y ? *y : x;
  Tensor& d_other = dy ? *dy : dx;
  const bool triangle = !y && !options.softmax;
  const int64_t step = std::min(classes, std::max(least_rows, kElements / classes));
  const double seen = static_cast<double>(options.num_seen);
  const double scale = options.softmax ? 1 / seen : (triangle ? 4 : 2) / (seen * seen);  // of residuals or weights
  Tensor buffer = empty_like_on(x, {step * classes}, x.scalar_type());
  double total = 0;
  for (int64_t start = 0; start < classes; start += step) {
    const int64_t rows = std::min(step, classes - start), first = triangle ? start : 0, columns = classes - first;
    Tensor matrix = torch::stable::view(torch::stable::narrow(buffer, 0, 0, rows * columns), {rows, columns});
    const Tensor own = rows_of(x, start, rows);
    multiply_into(matrix, own, transposed(rows_of(other, first, columns)), 0, 1);
    const Rows<T> products{static_cast<T*>(matrix.mutable_data_ptr()), rows, columns, start, first};
    total += options.softmax ? form_softmax(products, options, y) : form_residuals(products, options, triangle);
    if (!with_gradient) continue;
    Tensor d_own = rows_of(dx, start, rows);
    multiply_into(d_own, matrix, rows_of(other, first, columns), 1, scale);
    const int64_t after = triangle ? start + rows : 0;  // columns whose rows are not visited
    if (after == classes) continue;
    Tensor d_columns = rows_of(d_other, after, classes - after);
    const Tensor of_columns = torch::stable::narrow(matrix, 1, after - first, classes - after);
    multiply_into(d_columns, transposed(of_columns), own, 1, scale);
  }
  return options.softmax ? options.temperature * total / seen : total / (seen * seen);
}

template <class F>
void dispatch_sums(ScalarType type, const F& f) {
  if (type == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

std::tuple<Tensor, Tensor> p2p_blocks_forward(
    Tensor x, std::optional<Tensor> y, Tensor seen, bool own, bool cross, bool softmax, double temperature,
    bool with_gradient) {
  check_dim(x, "x", 2);
  const ScalarType type = x.scalar_type();
  const int64_t classes = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(classes > 0 && columns > 0, "x must have at least one row and one column");
  check_type(x, "x", accumulation_type(type));
  if (y) check_tensor(*y, "y", type, {classes, columns});
  check_tensor(seen, "seen", ScalarType::Bool, {classes});
  STD_TORCH_CHECK(own || cross, "own or cross must be true");
  STD_TORCH_CHECK(y || !cross, "cross needs y");
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0; got ", temperature);
  x = torch::stable::contiguous(x);
  y = contiguous(y);
  seen = torch::stable::contiguous(seen);
  const bool* const mask = static_cast<const bool*>(seen.const_data_ptr());
  const Options options{mask, std::count(mask, mask + classes, true), softmax, temperature};
  const int64_t num_own = !own ? 0 : y ? 2 : 1;
  Tensor values = torch::stable::new_zeros(x, {num_own + cross}, type);
  Tensor gradients = torch::stable::new_zeros(x, {num_own + 2 * cross, with_gradient ? classes : 0, columns}, type);
  if (options.num_seen < 2) return {values, gradients};
  dispatch_sums(type, [&](auto of_sums) {
    using T = decltype(of_sums);
    T* value = static_cast<T*>(values.mutable_data_ptr());
    const auto visit = [&](const Tensor& side, const Tensor* other, int64_t gradient) {
      Tensor dx = torch::stable::select(gradients, 0, gradient);
      Tensor dy = other ? torch::stable::select(gradients, 0, gradient + 1) : dx;
      *value++ = static_cast<T>(visit_pair<T>(side, other, options, with_gradient, dx, other ? &dy : nullptr));
    };
    if (own) visit(x, nullptr, 0);
    if (own && y) visit(*y, nullptr, 1);
    if (cross) visit(x, &*y, num_own);
  });
  return {values, gradients};
}

}  // namespace
}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) { m.impl("p2p_blocks_forward", TORCH_BOX(&allnc::cpu::p2p_blocks_forward)); }
