// The ops hycon_loss_forward and hycon_loss_backward: HyCon from labels to loss and gradients in one call each, for
// batches so small that the O(N D) part would cost more as torch operations than the pairs do (hycon_problem.h). Where
// a gradient will be asked for, the forward goes on to that of the sum of lse, `pull`, while rows are packed and
// exponentials are at hand; the loss is one number, so that the backward only multiplies by the gradient of it.
//
// For a class c with rows j: n_c, s_c = sum_j z_j, k_c = mean_weight (0 where c has no mean), P_c = n_c - 1 + k_c and
//     mu_c = M_c / |M_c|, 0 without a mean and where M_c is too short to have a direction
//     a_j = 1 / (n_c + [c has a mean]),  b_c = 1 / (n_c + 1);  unbalanced: 1;  b_c = 0 without a mean
//     pos_j = z_j.((s_c - z_j) / P_c + k_c / P_c mu_c) / t
//     L = sum_j (lse_j - pos_j) / W  over the W rows whose class has P_c > 0
// and, on top of the gradient of lse,
//     t W dz_j -= 2 (s_c - z_j) / P_c + k_c / P_c mu_c,  t W dmu_c -= k_c / P_c s_c
//     dM_c = (dmu_c - mu_c mu_c.dmu_c) / |M_c|
// A class without a mean cannot reach the result, whatever its row of M holds. Rows that are ignored have a = 0.
//
// N rows of z, C rows of M, D columns, t temperature, G classes: C, or N without means.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "hycon_problem.h"
#include "multiversion.h"

namespace allnc {
namespace cpu {

constexpr double kLeastEntry = 0x1p-100;  // the largest entry of a row that has a direction, as in allnc/ops/_common.py

// Sums over a row are kept in this many partial sums, which vector units add at once.
constexpr int64_t kPartialSums = 16;

template <class T>
ALLNC_INLINE T add_up(const T (&sums)[kPartialSums]) {
  T total = 0;
  for (int64_t k = 0; k < kPartialSums; ++k) total += sums[k];
  return total;
}

// x.y, rows of `dim` elements.
template <class T>
ALLNC_MULTIVERSION T dot(const T* __restrict x, const T* __restrict y, int64_t dim) {
  T sums[kPartialSums] = {};
  int64_t k = 0;
  for (; k + kPartialSums <= dim; k += kPartialSums) {
    for (int64_t lane = 0; lane < kPartialSums; ++lane) sums[lane] += x[k + lane] * y[k + lane];
  }
  for (int64_t lane = 0; k < dim; ++k, ++lane) sums[lane] += x[k] * y[k];
  return add_up(sums);
}

// z.((sum - z) per_positive + mean_share mu)
template <class Z, class T>
ALLNC_MULTIVERSION T positive_logit(
    const Z* __restrict z, const T* __restrict sum, const T* __restrict mu, T per_positive, T mean_share, int64_t dim) {
  T sums[kPartialSums] = {};
  const auto term = [=](int64_t k) ALLNC_INLINED {
    const T value = static_cast<T>(z[k]);
    return value * ((sum[k] - value) * per_positive + mean_share * mu[k]);
  };
  int64_t k = 0;
  for (; k + kPartialSums <= dim; k += kPartialSums) {
    for (int64_t lane = 0; lane < kPartialSums; ++lane) sums[lane] += term(k + lane);
  }
  for (int64_t lane = 0; k < dim; ++k, ++lane) sums[lane] += term(k);
  return add_up(sums);
}

template <class Z, class T>
ALLNC_MULTIVERSION void add_row(T* __restrict sum, const Z* __restrict z, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) sum[k] += static_cast<T>(z[k]);
}

// out = x factor / divisor
template <class T>
ALLNC_MULTIVERSION void rescale_row(T* __restrict out, const T* __restrict x, T factor, T divisor, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) out[k] = x[k] * factor / divisor;
}

// dz = of_lse factor - (sum - z) of_sum - of_mean mu
template <class Z, class T>
ALLNC_MULTIVERSION void write_anchor_gradient(
    Z* __restrict dz, const T* __restrict of_lse, T factor, const Z* __restrict z, const T* __restrict sum, T of_sum,
    const T* __restrict mu, T of_mean, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) {
    dz[k] = static_cast<Z>(of_lse[k] * factor - (sum[k] - static_cast<T>(z[k])) * of_sum - of_mean * mu[k]);
  }
}

// out = x factor - y share
template <class T>
ALLNC_MULTIVERSION void combine_rows(
    T* __restrict out, const T* __restrict x, T factor, const T* __restrict y, T share, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) out[k] = x[k] * factor - y[k] * share;
}

// x = (x - mu along) / divisor
template <class T>
ALLNC_MULTIVERSION void project_row(T* __restrict x, const T* __restrict mu, T along, T divisor, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) x[k] = (x[k] - mu[k] * along) / divisor;
}

namespace {

// mu = x at unit length; returns the length. Where x has no direction mu is 0 and the length infinite, so that what is
// divided by it, the gradient, is 0 too.
template <class T>
T unit_row(const T* x, T* mu, int64_t dim) {
  T square = dot(x, x, dim), factor = 1;
  // Squares near the ends of T's range are taken of x times a power of two, which rounds nothing.
  if (square < T(0x1p-80) || square > T(0x1p100)) {
    T largest = 0;
    for (int64_t k = 0; k < dim; ++k) largest = std::max(largest, std::abs(x[k]));
    if (largest < T(kLeastEntry)) {
      std::fill_n(mu, dim, T(0));
      return std::numeric_limits<T>::infinity();
    }
    if (std::isfinite(largest)) {
      factor = std::ldexp(T(1), -std::min(std::ilogb(largest), std::numeric_limits<T>::max_exponent - 2));
      rescale_row(mu, x, factor, T(1), dim);
      square = dot(mu, mu, dim);
    }
  }
  const T norm = std::sqrt(square);
  rescale_row(mu, x, factor, norm, dim);
  return norm / factor;
}

// The rows of the saved tensor `state` [3, N + C]: activations first, then means.
template <class T>
struct State {
  static constexpr int64_t kRows = 3;
  T* weight;        // a_i | b_c
  T* level;         // lse_i | |M_c|, infinite without a direction
  T* per_positive;  // 1 / P_i, 0 for rows that are left out of the loss | k_c / P_c

  State(T* data, int64_t width) : weight(data), level(data + width), per_positive(data + 2 * width) {}
};

// Calls f(begin, end) for shares of `rows` rows of `dim` elements, several threads at once where it pays.
template <class F>
void parallel_rows(int64_t rows, int64_t dim, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / dim), f);
}

// index [N] = the class of each row, -1 for none. Without means classes are numbered as their labels first occur.
void find_classes(
    const int64_t* labels, int64_t rows, std::optional<int64_t> num_means, int64_t ignore_index, int64_t* index) {
  if (num_means) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool ignored = labels[i] == ignore_index;
      STD_TORCH_CHECK(
          ignored || (labels[i] >= 0 && labels[i] < *num_means), "labels must be in [0, ", *num_means,
          ") or ignore_index (", ignore_index, "); got ", labels[i], " in row ", i);
      index[i] = ignored ? -1 : labels[i];
    }
    return;
  }
  std::unordered_map<int64_t, int64_t> numbers;
  numbers.reserve(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t next = static_cast<int64_t>(numbers.size());
    index[i] = labels[i] == ignore_index ? -1 : numbers.try_emplace(labels[i], next).first->second;
  }
}

// The tensors of a call.
template <class Z, class T>
struct Loss {
  int64_t rows, classes, means, dim;  // N, G, C, D
  const Z* z;
  const int64_t* index;  // [N]
  T* sums;               // [G, D]
  T* mu;                 // [C, D]
  State<T> state;
  double temperature;

  Arguments<Z, T> pairs() const {
    const Sizes sizes(rows, 0, means, dim);
    return {sizes, z, means ? mu : nullptr, state.weight, state.weight + rows, temperature, true};
  }
  // A row of mu that may be read where there are no means, to be multiplied by 0.
  const T* mean_of(int64_t c) const { return means ? mu + c * dim : sums + c * dim; }
  T mean_share(int64_t c) const { return means ? state.per_positive[rows + c] : T(0); }
};

// Class sums, unit means, and what every row and class weighs.
template <class Z, class T>
void prepare(const Loss<Z, T>& loss, const T* means, const bool* seen, double mean_weight, bool balanced) {
  const auto& [rows, classes, num_means, dim, z, index, sums, mu, state, temperature] = loss;
  std::vector<int64_t> counts(classes, 0);  // [G], n_c
  for (int64_t i = 0; i < rows; ++i) {
    if (index[i] >= 0) ++counts[index[i]];
  }
  std::fill_n(sums, classes * dim, T(0));
  // Every thread adds up columns of its own: one order for any number of threads.
  const int64_t columns = std::max<int64_t>(64, (1 << 15) / rows);
  torch::stable::parallel_for(0, dim, columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < rows; ++i) {
      if (index[i] >= 0) add_row(sums + index[i] * dim + begin, z + i * dim + begin, end - begin);
    }
  });

  const auto has_mean = [&](int64_t c) { return num_means > 0 && (!seen || seen[c]); };
  const auto per_positive = [&](int64_t c) {
    const double positives = static_cast<double>(counts[c] - 1) + (has_mean(c) ? mean_weight : 0);
    const double least = std::numeric_limits<T>::min();
    return positives > 0 ? 1 / std::max(positives, least) : 0;
  };
  parallel_rows(num_means, dim, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T norm = std::numeric_limits<T>::infinity();
      if (has_mean(c)) {
        norm = unit_row(means + c * dim, mu + c * dim, dim);
      } else {
        std::fill_n(mu + c * dim, dim, T(0));
      }
      const double weight = balanced ? 1 / static_cast<double>(counts[c] + 1) : 1;
      state.weight[rows + c] = static_cast<T>(has_mean(c) ? weight : 0);
      state.level[rows + c] = norm;
      state.per_positive[rows + c] = static_cast<T>(has_mean(c) ? mean_weight * per_positive(c) : 0);
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t c = index[i];
    const double weight = c >= 0 && balanced ? 1 / static_cast<double>(counts[c] + has_mean(c)) : 1;
    state.weight[i] = static_cast<T>(c >= 0 ? weight : 0);
    state.per_positive[i] = static_cast<T>(c >= 0 ? per_positive(c) : 0);
  }
}

template <class T>
int64_t count_valid(const T* per_positive, int64_t rows) {
  return std::count_if(per_positive, per_positive + rows, [](T x) { return x != 0; });
}

// The gradient of the sum of lse over the rows that take part, by lse.
template <class Z, class T>
std::vector<T> anchor_gradient(const Loss<Z, T>& loss) {
  std::vector<T> grad(loss.rows);
  for (int64_t i = 0; i < loss.rows; ++i) grad[i] = loss.state.per_positive[i] != 0 ? 1 : 0;
  return grad;
}

// The mean over the rows that take part, whose lse it writes to `state`. `pull` [gradient_size], if not null:
// temperature times the gradient of the sum of their lse.
template <class E, class Z, class T>
T mean_loss(const Loss<Z, T>& loss, const Tensor& like, T* pull) {
  const State<T>& state = loss.state;
  const int64_t dim = loss.dim;
  const Arguments<Z, T> pairs = loss.pairs();
  const int64_t valid = count_valid(state.per_positive, loss.rows);
  if (valid == 0) {
    std::fill_n(state.level, loss.rows, T(0));
    if (pull) std::fill_n(pull, gradient_size(pairs.sizes, sizeof(T)), T(0));
    return 0;
  }
  if (pull) {
    lse_with_gradient<E>(pairs, anchor_gradient(loss).data(), true, like, state.level, pull);
  } else {
    lse_forward<E>(pairs, true, 0, 1, like, state.level);
  }
  std::vector<T> pos(loss.rows, 0);
  parallel_rows(loss.rows, dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (state.per_positive[i] == 0) continue;
      const int64_t c = loss.index[i];
      pos[i] = positive_logit(
          loss.z + i * dim, loss.sums + c * dim, loss.mean_of(c), state.per_positive[i], loss.mean_share(c), dim);
    }
  });
  double total = 0;
  for (int64_t i = 0; i < loss.rows; ++i) {
    if (state.per_positive[i] != 0) total += state.level[i] - pos[i] / loss.temperature;
  }
  return static_cast<T>(total / static_cast<double>(valid));
}

// `pull` as of mean_loss; null if it has to be formed now.
template <class E, class Z, class T>
void gradients(const Loss<Z, T>& loss, T grad, const T* pull, const Tensor& like, Z* dz, T* dmeans) {
  const auto& [rows, classes, num_means, dim, z, index, sums, mu, state, temperature] = loss;
  const auto fill = [&, rows = rows, num_means = num_means, dim = dim](T value) {
    std::fill_n(dz, rows * dim, static_cast<Z>(value));
    std::fill_n(dmeans, num_means * dim, value);
  };
  const int64_t valid = count_valid(state.per_positive, rows);
  if (valid == 0) return fill(0);
  Workspace<T> workspace(like);
  if (!pull) {
    const Packed<E> packed = lse_gradient<E>(loss.pairs(), anchor_gradient(loss).data(), state.level, true, workspace);
    if (!packed.finite) return fill(std::numeric_limits<T>::quiet_NaN());
    pull = packed.problem.grad;
  }

  const T of_pos = static_cast<T>(grad / static_cast<double>(valid) / temperature);
  const Sizes sizes = loss.pairs().sizes;
  const int64_t stride = sizes.stride(sizeof(T));
  parallel_rows(rows, dim, [&, dim = dim](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = loss.index[i];
      if (c < 0) {  // whatever z_i holds
        std::fill_n(dz + i * dim, dim, Z(0));
        continue;
      }
      write_anchor_gradient(
          dz + i * dim, pull + i * stride, of_pos, loss.z + i * dim, loss.sums + c * dim,
          2 * of_pos * loss.state.per_positive[i], loss.mean_of(c), of_pos * loss.mean_share(c), dim);
    }
  });
  parallel_rows(num_means, dim, [&, dim = dim](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T* const out = dmeans + c * dim;
      const T* const of_lse = pull + (sizes.mean_offset + c) * stride;
      combine_rows(out, of_lse, of_pos, loss.sums + c * dim, of_pos * loss.mean_share(c), dim);
      project_row(out, loss.mu + c * dim, dot(loss.mu + c * dim, out, dim), loss.state.level[loss.rows + c], dim);
    }
  });
}

ScalarType sums_type(const Tensor& z) {
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      "z must be float32, float64 or bfloat16; got ScalarType ", static_cast<int>(type));
  STD_TORCH_CHECK(z.dim() == 2, "z must have 2 dimensions; got ", z.dim());
  return accumulation_type(type);
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class Z, class T>
Loss<Z, T> loss_of(
    const Tensor& z, const Tensor& index, const Tensor& sums, const Tensor& mu, const Tensor& state,
    double temperature) {
  const int64_t rows = z.size(0), classes = sums.size(0), means = mu.size(0), dim = z.size(1);
  const Z* const data = static_cast<const Z*>(z.const_data_ptr());
  const State<T> of_rows(data_of<T>(state), rows + means);
  const int64_t* const of_index = static_cast<const int64_t*>(index.const_data_ptr());
  return {rows, classes, means, dim, data, of_index, data_of<T>(sums), data_of<T>(mu), of_rows, temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hycon_loss_forward(
    Tensor z, Tensor labels, std::optional<Tensor> means, std::optional<Tensor> seen, double temperature,
    double mean_weight, bool balanced, int64_t ignore_index, bool with_gradient) {
  const ScalarType type = sums_type(z);
  const int64_t rows = z.size(0), dim = z.size(1), num_means = means ? means->size(0) : 0;
  const int64_t classes = means ? num_means : rows;
  check_tensor(labels, "labels", ScalarType::Long, {rows});
  if (means) check_tensor(*means, "means", type, {num_means, dim});
  if (seen) check_tensor(*seen, "seen", ScalarType::Bool, {num_means});
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0; got ", temperature);
  STD_TORCH_CHECK(mean_weight >= 0, "mean_weight must be >= 0; got ", mean_weight);
  z = torch::stable::contiguous(z);
  labels = torch::stable::contiguous(labels);
  means = contiguous(means);
  seen = contiguous(seen);
  Tensor index = torch::stable::new_empty(labels, {rows});
  find_classes(
      static_cast<const int64_t*>(labels.const_data_ptr()), rows, means ? std::make_optional(num_means) : std::nullopt,
      ignore_index, data_of<int64_t>(index));
  Tensor value = torch::stable::new_empty(z, {}, type);
  Tensor state = torch::stable::new_empty(z, {State<float>::kRows, rows + num_means}, type);
  Tensor sums = torch::stable::new_empty(z, {classes, dim}, type);
  Tensor mu = torch::stable::new_empty(z, {num_means, dim}, type);
  const Sizes sizes(rows, 0, num_means, dim);
  const int64_t stride = sizes.stride(type == ScalarType::Double ? sizeof(double) : sizeof(float));
  Tensor pull = torch::stable::new_empty(z, {with_gradient ? sizes.other_offset : 0, stride}, type);
  dispatch(z.scalar_type(), type, temperature, [&](auto of_z, auto of_sums, auto of_products) {
    using Z = decltype(of_z);
    using T = decltype(of_sums);
    const auto loss = loss_of<Z, T>(z, index, sums, mu, state, temperature);
    prepare(
        loss, means ? static_cast<const T*>(means->const_data_ptr()) : nullptr,
        seen ? static_cast<const bool*>(seen->const_data_ptr()) : nullptr, mean_weight, balanced);
    *data_of<T>(value) = mean_loss<decltype(of_products)>(loss, state, with_gradient ? data_of<T>(pull) : nullptr);
  });
  return {value, state, index, sums, mu, pull};
}

std::tuple<Tensor, Tensor> hycon_loss_backward(
    Tensor grad, Tensor z, std::optional<Tensor> means, Tensor state, Tensor index, Tensor sums, Tensor mu, Tensor pull,
    double temperature) {
  const ScalarType type = sums_type(z);
  const int64_t rows = z.size(0), dim = z.size(1), num_means = mu.size(0);
  STD_TORCH_CHECK(means || num_means == 0, "mu must have no rows without means; got ", num_means);
  check_tensor(grad, "grad", type, {});
  check_tensor(state, "state", type, {State<float>::kRows, rows + num_means});
  check_tensor(index, "index", ScalarType::Long, {rows});
  check_tensor(sums, "sums", type, {means ? num_means : rows, dim});
  check_tensor(mu, "mu", type, {num_means, dim});
  const Sizes sizes(rows, 0, num_means, dim);
  const bool formed = pull.size(0) > 0;
  if (formed) {
    const int64_t stride = sizes.stride(type == ScalarType::Double ? sizeof(double) : sizeof(float));
    check_tensor(pull, "pull", type, {sizes.other_offset, stride});
  }
  z = torch::stable::contiguous(z);
  Tensor dz = torch::stable::new_empty(z, {rows, dim});
  Tensor dmeans = torch::stable::new_empty(mu, {num_means, dim});
  dispatch(z.scalar_type(), type, temperature, [&](auto of_z, auto of_sums, auto of_products) {
    using Z = decltype(of_z);
    using T = decltype(of_sums);
    const auto loss = loss_of<Z, T>(z, index, sums, mu, state, temperature);
    const T upstream = *static_cast<const T*>(grad.const_data_ptr());
    const T* const of_lse = formed ? static_cast<const T*>(pull.const_data_ptr()) : nullptr;
    gradients<decltype(of_products)>(loss, upstream, of_lse, state, data_of<Z>(dz), data_of<T>(dmeans));
  });
  return {dz, dmeans};
}

}  // namespace
}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) {
  m.impl("hycon_loss_forward", TORCH_BOX(&allnc::cpu::hycon_loss_forward));
  m.impl("hycon_loss_backward", TORCH_BOX(&allnc::cpu::hycon_loss_backward));
}
