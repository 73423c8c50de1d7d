// The N² part of HyCon on the CPU, never holding more of the N x N matrix than one block of it per thread.
//
//     lse_i = log( sum_{j != i} a_j exp(z_i.z_j / t) + sum_c b_c exp(z_i.mu_c / t) )
//
// N rows of z, C rows of mu, D columns, t temperature; R: rows of all sections, each padded to whole panels of 48.
//
// z and mu are handled as one sequence of rows with column weights w, in three sections:
//     own      anchors: rows of z that get a sum (forward: all N) or a gradient (backward: the first `own` of them)
//     means    mu
//     others   backward only: rows of z whose gradient another process computes; here they are columns alone
// It is cut into blocks; each pair of blocks {I, J} with an own row is visited once, S_IJ = z_I z_J^T / t serving both
// sides because S is symmetric:
//     forward    sum_i += e_ij w_j and sum_j += e_ij w_i, e = exp(S - s)                        N² D multiply-adds / 2
//     backward   K_ij = e_ij (u_i w_j + u_j w_i), u_i = g_i exp(s - lse_i), u = 0 for means; then
//                t dz_I += K z_J and, unless J is of the others, t dz_J += K^T z_I          3 N² D multiply-adds / 2
//                                                                              (2 own N D where others are many)
// Where one call does both, the e of as many pairs as fit into kKeptBytes are kept for the backward.
// The constant shift s, 1/t up to a whole power of two, needs |z_i.z_j| <= 1 and 2/t within the range of the type.
// Otherwise (`shifted` false, rows longer than 1, weights so small that sums would underflow) a running maximum takes
// its place.
//
// Sums, weights and exponentials are of type T, float or double. z is of type Z, which is T or bfloat16; products are
// made of elements E (hycon_tiles.h), which are T or, if z is bfloat16, the processor has instructions for it and t is
// not too small, pairs of bfloat16; mu and K are then rounded to it too.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../tensors.h"
#include "hycon_schedule.h"

namespace allnc {
namespace cpu {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// Memory for the exponentials that a call keeps: all of those of a small batch.
constexpr int64_t kKeptBytes = int64_t{4} << 20;

// Memory for one call, from torch's allocator.
template <class T>
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  T* take(int64_t count) {
    constexpr int64_t kPadding = kAlignment / static_cast<int64_t>(sizeof(T));
    tensors_.push_back(torch::stable::new_empty(like_, {count + kPadding}));
    const auto address = reinterpret_cast<uintptr_t>(tensors_.back().mutable_data_ptr());
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  Tensor like_;
  std::vector<Tensor> tensors_;
};

// The tensors of a call, checked.
template <class Z, class T>
struct Arguments {
  Sizes sizes;
  const Z* z;
  const T* mu;  // null without means
  const T* a;
  const T* b;
  double temperature;
  bool weightless_are_absent;  // rows of z with a_j = 0 are not read: they are no anchors either
};

// z and mu brought into the layout of the tiles.
template <class E>
struct Packed {
  Problem<E> problem;
  bool finite;  // no NaN or infinity in any input
};

// One value of an E.
template <class E>
using Value = std::conditional_t<std::is_same_v<E, BFloat16Pair>, BFloat16, E>;

// |x|², in partial sums that do not wait for each other; NaN or infinite if any element is.
template <class T, class X>
T squared_norm(const X* x, int64_t dim) {
  constexpr int64_t kSums = 16;
  T sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= dim; k += kSums) {
    for (int64_t lane = 0; lane < kSums; ++lane)
      sums[lane] += static_cast<T>(x[k + lane]) * static_cast<T>(x[k + lane]);
  }
  T total = 0;
  for (; k < dim; ++k) total += static_cast<T>(x[k]) * static_cast<T>(x[k]);
  for (int64_t lane = 0; lane < kSums; ++lane) total += sums[lane];
  return total;
}

// Whether row r is to be packed as zeros: rows that cannot reach the result may hold anything, and NaN times 0 is NaN.
template <class T>
bool is_absent(const T* weights, int64_t r) {
  return weights != nullptr && weights[r] == 0;
}

// out [D / kPack, 48] = x [rows, D] transposed, zero beyond and for rows of weight 0 (weights null: none); returns the
// largest squared norm (NaN if there is any).
template <class E, class X>
Sum<E> pack_panel(const X* x, const Sum<E>* weights, int64_t rows, int64_t dim, E* out) {
  constexpr int64_t kValues = kPack<E>;
  using T = Sum<E>;
  auto* const values = reinterpret_cast<Value<E>*>(out);
  if (rows < kPanel || dim % kValues != 0) std::fill_n(out, (dim + kValues - 1) / kValues * kPanel, E(0));
  T largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const bool absent = is_absent(weights, r);
    const T norm = absent ? T(0) : squared_norm<T>(x + r * dim, dim);
    if (norm != norm) return norm;
    largest = norm <= largest ? largest : norm;
    for (int64_t k = 0; k < dim; ++k) {
      values[(k / kValues * kPanel + r) * kValues + k % kValues] =
          static_cast<Value<E>>(absent ? T(0) : static_cast<T>(x[r * dim + k]));
    }
  }
  return largest;
}

// out [48 / kPack, stride] = x [rows, D], zero beyond and for rows of weight 0.
template <class E, class X>
void pack_rows(const X* x, const Sum<E>* weights, int64_t rows, int64_t dim, int64_t stride, E* out) {
  constexpr int64_t kValues = kPack<E>;
  auto* const values = reinterpret_cast<Value<E>*>(out);
  if (kValues > 1 || rows < kPanel) std::fill_n(out, kPanel / kValues * stride, E(0));
  for (int64_t r = 0; r < rows; ++r) {
    Value<E>* const row = values + r / kValues * stride * kValues + r % kValues;
    if (is_absent(weights, r)) {
      if (kValues == 1) std::fill(row, row + stride, Value<E>(0));
      continue;
    }
    for (int64_t k = 0; k < dim; ++k) row[k * kValues] = static_cast<Value<E>>(static_cast<Sum<E>>(x[r * dim + k]));
    if (kValues == 1) std::fill(row + dim, row + stride, Value<E>(0));
  }
}

// Calls f(panel, x, weights, rows): `rows` rows from x on, of z or of mu, make panel number `panel`; weights as
// `pack_panel` takes them.
template <class Z, class T, class F>
void for_each_panel(const Arguments<Z, T>& in, const F& f) {
  const Sizes& sizes = in.sizes;
  torch::stable::parallel_for(0, sizes.rows / kPanel, 8, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto visit = [&](const auto* x, const T* weights, int64_t row, int64_t count) {
        f(panel, x + row * sizes.dim, weights ? weights + row : nullptr, std::min(kPanel, count - row));
      };
      const T* const of_own = in.weightless_are_absent ? in.a : nullptr;
      const int64_t row = panel * kPanel;
      if (row < sizes.mean_offset) {
        visit(in.z, of_own, row, sizes.own);
      } else if (row < sizes.other_offset) {
        visit(in.mu, in.b, row - sizes.mean_offset, sizes.means);
      } else {
        visit(
            in.z + sizes.own * sizes.dim, of_own ? of_own + sizes.own : nullptr, row - sizes.other_offset,
            sizes.others);
      }
    }
  });
}

// Sums of e_ij w_j and factors exp(1/t - lse_i) must stay far from the ends of T's range; S within the shift.
template <class Z, class T>
bool shift_is_safe(const Arguments<Z, T>& in, T largest_norm) {
  T smallest = 1;
  const auto visit = [&](const T* w, int64_t count) {
    for (int64_t k = 0; k < count; ++k) smallest = w[k] > 0 && w[k] < smallest ? w[k] : smallest;
  };
  visit(in.a, in.sizes.anchors());
  visit(in.b, in.sizes.means);
  const double room = -0.9 * std::log(static_cast<double>(std::numeric_limits<T>::min()));
  return largest_norm <= T(1.01) && 2.02 / in.temperature - std::log(static_cast<double>(smallest)) < room;
}

// Elements of the gradient of all rows that get one.
inline int64_t gradient_size(const Sizes& sizes, int64_t element_size) {
  return sizes.other_offset * sizes.stride(element_size);
}

// `grad` [gradient_size] is where the backward will add up; null for a forward alone.
template <class E, class Z, class T>
Packed<E> pack(const Arguments<Z, T>& in, bool shifted, T* grad, Workspace<T>& workspace) {
  static_assert(sizeof(E) == sizeof(T), "one workspace serves both");
  const Sizes& sizes = in.sizes;
  Problem<E> p{};
  p.dim = sizes.dim;
  p.depth = (sizes.dim + kPack<E> - 1) / kPack<E>;
  p.stride = sizes.stride(sizeof(T));

  const auto take = [&](int64_t count) { return reinterpret_cast<E*>(workspace.take(count)); };
  E* const panels = take(sizes.rows * p.depth);
  E* const rows = grad ? take(sizes.rows / kPack<E> * p.stride) : nullptr;
  p.grad_rows = grad ? sizes.other_offset : 0;
  p.grad = grad;
  std::vector<T> norms(sizes.rows / kPanel);
  for_each_panel(in, [&](int64_t panel, const auto* x, const T* weights, int64_t count) {
    norms[panel] = pack_panel(x, weights, count, sizes.dim, panels + panel * kPanel * p.depth);
    if (!grad) return;
    pack_rows(x, weights, count, sizes.dim, p.stride, rows + panel * kPanel / kPack<E> * p.stride);
    if (panel * kPanel < p.grad_rows) std::fill_n(p.grad + panel * kPanel * p.stride, kPanel * p.stride, T(0));
  });
  p.panels = panels;
  p.rows = rows;

  T largest = 0, total = static_cast<T>(1 / in.temperature);
  for (const T norm : norms) {
    largest = norm > largest ? norm : largest;
    total += norm;
  }
  for (int64_t k = 0; k < sizes.anchors(); ++k) total += in.a[k];
  for (int64_t k = 0; k < sizes.means; ++k) total += in.b[k];
  p.shifted = shifted && shift_is_safe(in, largest);
  p.scale = static_cast<T>((p.shifted ? kLog2E : 1) / in.temperature);
  p.shift = std::nearbyint(p.scale);

  T* const weight = workspace.take(sizes.rows);
  std::fill_n(weight, sizes.rows, T(0));
  std::copy_n(in.a, sizes.own, weight);
  std::copy_n(in.b, sizes.means, weight + sizes.mean_offset);
  std::copy_n(in.a + sizes.own, sizes.others, weight + sizes.other_offset);
  if (!p.shifted) std::transform(weight, weight + sizes.rows, weight, [](T w) { return std::log(w); });
  p.weight = weight;
  return {p, std::isfinite(total)};
}

// Visits this part's pairs of blocks with forward or backward tile code. `kept` is kKeptBytes large, or null.
template <class E, class F>
void run(
    const Problem<E>& p, const Sizes& sizes, int64_t part, int64_t parts, F tile_code, Workspace<Sum<E>>& workspace,
    Sum<E>* kept = nullptr) {
  const Schedule schedule(sizes);
  // A thread for each 2 million multiply-adds, some 20 us: with less to do it costs more than it helps.
  const int64_t useful = sizes.own * (sizes.rows - sizes.own / 2) / parts * sizes.dim / (1 << 21) + 1;
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), useful, schedule.count()});
  Sum<E>* const scratch = workspace.take(workers * kScratch<E>);
  constexpr int64_t kKept = kKeptBytes / static_cast<int64_t>(sizeof(Sum<E>));
  schedule.for_each_pair(workers, part, parts, [&](Block i, Block j, int64_t worker, int64_t place) {
    const bool fits = kept && place + i.rows * j.rows <= kKept;
    tile_code(p, i, j, scratch + worker * kScratch<E>, fits ? kept + place : nullptr);
  });
}

// lse of the own rows from this part's pairs.
template <class E, class Z, class T>
void form_lse(
    Problem<E>& p, const Arguments<Z, T>& in, int64_t part, int64_t parts, Workspace<T>& workspace, T* kept, T* lse) {
  const Sizes& sizes = in.sizes;
  p.sum = workspace.take(sizes.rows);
  p.max = workspace.take(sizes.rows);
  std::fill_n(p.sum, sizes.rows, T(0));
  std::fill_n(p.max, sizes.rows, -std::numeric_limits<T>::infinity());
  run(p, sizes, part, parts, tiles<E>()->forward, workspace, kept);
  for (int64_t i = 0; i < sizes.own; ++i) {
    const double sum = std::log(static_cast<double>(p.sum[i]));  // -inf where nothing was met
    lse[i] = static_cast<T>(sum + (p.shifted ? p.shift * kLn2 : p.max[i]));
  }
}

// Adds to p.grad temperature times the gradient of sum_i grad_lse_i lse_i.
template <class E, class Z, class T>
void add_gradient(
    Problem<E>& p, const Arguments<Z, T>& in, const T* grad_lse, const T* lse, Workspace<T>& workspace, T* kept) {
  const Sizes& sizes = in.sizes;
  T* const u = workspace.take(sizes.rows);
  T* const level = workspace.take(sizes.rows);
  std::fill_n(u, sizes.rows, T(0));
  std::fill_n(level, sizes.rows, std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < sizes.anchors(); ++i) {
    // An anchor without gradient or without contrast set (lse = -inf) takes no part.
    if (grad_lse[i] == 0 || lse[i] == -std::numeric_limits<T>::infinity()) continue;
    const double value = lse[i];
    const int64_t row = sizes.anchor_row(i);
    u[row] = static_cast<T>(p.shifted ? grad_lse[i] * std::exp(p.shift * kLn2 - value) : grad_lse[i] + 0 * value);
    level[row] = lse[i];
  }
  p.u = u;
  p.level = level;
  run(p, sizes, 0, 1, tiles<E>()->backward, workspace, kept);
}

// NaN if any input is not finite.
template <class E, class Z, class T>
void lse_forward(const Arguments<Z, T>& in, bool shifted, int64_t part, int64_t parts, const Tensor& like, T* lse) {
  Workspace<T> workspace(like);
  auto [p, finite] = pack<E>(in, shifted, static_cast<T*>(nullptr), workspace);
  if (!finite) {
    std::fill_n(lse, in.sizes.own, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  form_lse(p, in, part, parts, workspace, static_cast<T*>(nullptr), lse);
}

// The gradient of sum_i grad_i lse_i, times temperature, in `grad` of the result; without it if not finite.
template <class E, class Z, class T>
Packed<E> lse_gradient(
    const Arguments<Z, T>& in, const T* grad_lse, const T* lse, bool shifted, Workspace<T>& workspace) {
  T* const grad = workspace.take(gradient_size(in.sizes, sizeof(T)));
  Packed<E> packed = pack<E>(in, shifted, grad, workspace);
  if (packed.finite) add_gradient(packed.problem, in, grad_lse, lse, workspace, static_cast<T*>(nullptr));
  return packed;
}

// lse of all rows, and `grad` [gradient_size]: temperature times the gradient of sum_i grad_lse_i lse_i. Rows are
// packed once for both. NaN if any input is not finite.
template <class E, class Z, class T>
void lse_with_gradient(
    const Arguments<Z, T>& in, const T* grad_lse, bool shifted, const Tensor& like, T* lse, T* grad) {
  Workspace<T> workspace(like);
  auto [p, finite] = pack<E>(in, shifted, grad, workspace);
  if (!finite) {
    std::fill_n(lse, in.sizes.own, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(grad, gradient_size(in.sizes, sizeof(T)), std::numeric_limits<T>::quiet_NaN());
    return;
  }
  constexpr int64_t kKept = kKeptBytes / static_cast<int64_t>(sizeof(T));
  T* const kept = workspace.take(std::min(kKept, in.sizes.mean_offset * in.sizes.rows));
  form_lse(p, in, 0, 1, workspace, kept, lse);
  add_gradient(p, in, grad_lse, lse, workspace, kept);
}

// Pairs of bfloat16 round mu, whose logits may then be off by 2^-9 / t: 0.06 at this temperature. Below it products are
// made of float32, so that a cold contrast is no less exact than one of float32 z.
constexpr double kColdestOfPairs = 1.0 / 32;

// Calls f(Z, T, E) with a value of each type that a call with these types of z and of sums takes.
template <class F>
auto dispatch(ScalarType z, ScalarType sums, double temperature, const F& f) {
  if (sums == ScalarType::Double) return f(double{}, double{}, double{});
  if (z != ScalarType::BFloat16) return f(float{}, float{}, float{});
  const bool pairs = tiles<BFloat16Pair>() && temperature >= kColdestOfPairs;
  return pairs ? f(BFloat16{}, float{}, BFloat16Pair{}) : f(BFloat16{}, float{}, float{});
}

}  // namespace cpu
}  // namespace allnc
