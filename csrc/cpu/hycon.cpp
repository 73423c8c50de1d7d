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
//     forward    sum_i += e_ij w_j and sum_j += e_ij w_i, e = exp(S - 1/t)                      N² D multiply-adds / 2
//     backward   K_ij = e_ij (u_i w_j + u_j w_i), u_i = g_i exp(1/t - lse_i), u = 0 for means; then
//                t dz_I += K z_J and, unless J is of the others, t dz_J += K^T z_I          3 N² D multiply-adds / 2
//                                                                              (2 own N D where others are many)
// The constant shift 1/t needs |z_i.z_j| <= 1 and 2/t within the range of the type. Otherwise (`shifted` false, rows
// longer than 1, weights so small that sums would underflow) a running maximum takes its place.
//
// Pairs are visited in the order of a round-robin tournament: in each round every block meets one other, so that the
// pairs of a round share no rows and run in parallel, without a lock on rows and without accumulators per thread. Rows
// see their partners in the same order whatever the number of threads: results are bit-equal on every run and thread
// count. Processes that share a forward pass take a part each, a stretch of that order: whole rounds stay together.
//
// Sums, weights and exponentials are of type T, float or double. z is of type Z, which is T or bfloat16; products are
// made of elements E (hycon_tiles.h), which are T or, if z is bfloat16 and the processor has instructions for it, pairs
// of bfloat16; mu and K are then rounded to it too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "hycon_tiles.h"

namespace allnc {
namespace cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLog2E = 1.44269504088896340736;

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

struct Sizes {
  int64_t own, others, means, dim;          // rows of each section; D
  int64_t mean_offset, other_offset, rows;  // first padded row of a section; R

  Sizes(int64_t num_own, int64_t num_others, int64_t num_means, int64_t num_columns)
      : own(num_own),
        others(num_others),
        means(num_means),
        dim(num_columns),
        mean_offset(padded(own)),
        other_offset(mean_offset + padded(means)),
        rows(other_offset + padded(others)) {}

  static int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
  int64_t anchors() const { return own + others; }  // N
  int64_t anchor_row(int64_t i) const { return i < own ? i : other_offset + i - own; }  // padded row of z_i
  // Elements from row to row: an odd number of cache lines, as rows a power of two apart share too few cache sets.
  int64_t stride(int64_t element_size) const {
    const int64_t lines = (dim * element_size + kAlignment - 1) / kAlignment;
    return (lines | 1) * kAlignment / element_size;
  }
};

// The blocks of all sections, and the order in which pairs of them are visited.
class Schedule {
 public:
  explicit Schedule(const Sizes& sizes) {
    // Small problems get small blocks, for enough pairs to share out. Must not depend on the number of threads.
    const int64_t block = std::clamp<int64_t>(sizes.other_offset / kPanel / 16, 1, kMaxBlock / kPanel) * kPanel;
    add_blocks(0, sizes.mean_offset, block);
    num_own_ = count();
    add_blocks(sizes.mean_offset, sizes.other_offset, block);
    num_written_ = count();
    add_blocks(sizes.other_offset, sizes.rows, kMaxBlock);
  }

  // Calls run(i, j, worker) for this part's pairs of blocks that have an own row, i before j or equal to it.
  template <class F>
  void for_each_pair(int64_t workers, int64_t part, int64_t parts, const F& run) const {
    std::vector<std::atomic<int64_t>> done(count());  // pairs that have been added to a block's rows
    for (auto& pairs : done) pairs.store(0, std::memory_order_relaxed);
    Queue queue(*this, part, parts);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      while (const std::optional<Pair> pair = queue.next()) {
        // A pair waits only for earlier ones, which other workers have already drawn: no deadlock.
        wait_for(done[pair->i], pair->turn_i);
        if (pair->writes_j) wait_for(done[pair->j], pair->turn_j);
        run(blocks_[pair->i], blocks_[pair->j], worker);
        done[pair->i].store(pair->turn_i + 1, std::memory_order_release);
        if (pair->writes_j) done[pair->j].store(pair->turn_j + 1, std::memory_order_release);
      }
    });
  }

  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

 private:
  struct Pair {
    int64_t i, j;
    int64_t turn_i, turn_j;  // how many pairs of this part come before it for the rows of i and of j
    bool writes_j;           // not if j is i or one of the others
  };

  // Hands out this part's pairs in order; the rest costs a glance each.
  class Queue {
   public:
    Queue(const Schedule& schedule, int64_t part, int64_t parts) : schedule_(schedule), turns_(schedule.count(), 0) {
      const int64_t own = schedule.num_own_;
      const int64_t pairs = own * (own + 1) / 2 + own * (schedule.count() - own);
      skip_ = pairs * part / parts;
      left_ = pairs * (part + 1) / parts - skip_;
    }

    std::optional<Pair> next() {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (left_ == 0) return std::nullopt;
      --left_;
      for (;;) {
        const auto [i, j] = schedule_.draw(ticket_++);
        if (i >= schedule_.num_own_ || j >= schedule_.count()) continue;
        if (skip_ > 0) {
          --skip_;
          continue;
        }
        const bool writes_j = j != i && j < schedule_.num_written_;
        const int64_t turn_i = turns_[i]++;
        return Pair{i, j, turn_i, writes_j ? turns_[j]++ : 0, writes_j};
      }
    }

   private:
    const Schedule& schedule_;
    std::mutex mutex_;
    std::vector<int64_t> turns_;  // by block
    int64_t ticket_ = 0, skip_, left_;
  };

  void add_blocks(int64_t first, int64_t end, int64_t block) {
    for (; first < end; first += block) blocks_.push_back({first, std::min(block, end - first)});
  }

  // First every block with itself. Then the circle method: the last player stays, the others turn; of an odd number of
  // blocks, the one that meets `count()` rests.
  std::pair<int64_t, int64_t> draw(int64_t ticket) const {
    const int64_t players = count() + count() % 2;
    if (ticket < players) return {ticket, ticket};
    const int64_t turning = players - 1;
    const int64_t round = (ticket - players) / (players / 2);
    const int64_t k = (ticket - players) % (players / 2);
    const int64_t i = (round + k) % turning;
    const int64_t j = k == 0 ? turning : (round - k + turning) % turning;
    return {std::min(i, j), std::max(i, j)};
  }

  static void wait_for(const std::atomic<int64_t>& done, int64_t turn) {
    while (done.load(std::memory_order_acquire) < turn) std::this_thread::yield();
  }

  std::vector<Block> blocks_;
  int64_t num_own_ = 0;
  int64_t num_written_ = 0;  // own and means: blocks that get sums or gradients
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
};

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " must be float32, or float64 if a is (z also bfloat16, if a is float32); got ",
      "ScalarType ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(
      t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions; got ", t.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(
        t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, "; got ", t.size(dim));
    ++dim;
  }
}

template <class Z, class T>
Arguments<Z, T> check_arguments(
    const Tensor& z, const std::optional<Tensor>& mu, const Tensor& a, const std::optional<Tensor>& b,
    const Tensor& temperature, int64_t own) {
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
  STD_TORCH_CHECK(
      temperature.numel() == 1 && temperature.scalar_type() == type,
      "temperature must be one element of the type of a");
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const Z* const rows = static_cast<const Z*>(z.const_data_ptr());
  return {sizes, rows, mu ? data(*mu) : nullptr, data(a), b ? data(*b) : nullptr, *data(temperature)};
}

// z and mu brought into the layout of the tiles.
template <class E>
struct Packed {
  Problem<E> problem;
  bool finite;  // no NaN or infinity in any input
};

// One value of an E.
template <class E>
using Value = std::conditional_t<std::is_same_v<E, BFloat16Pair>, BFloat16, E>;

// out [D / kPack, 48] = x [rows, D] transposed, zero beyond; returns the largest squared norm (NaN if there is any).
template <class E, class X>
Sum<E> pack_panel(const X* x, int64_t rows, int64_t dim, E* out) {
  constexpr int64_t kValues = kPack<E>;
  using T = Sum<E>;
  auto* const values = reinterpret_cast<Value<E>*>(out);
  if (rows < kPanel || dim % kValues != 0) std::fill_n(out, (dim + kValues - 1) / kValues * kPanel, E(0));
  T largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    T norm = 0;
    for (int64_t k = 0; k < dim; ++k) {
      const T value = static_cast<T>(x[r * dim + k]);
      values[(k / kValues * kPanel + r) * kValues + k % kValues] = static_cast<Value<E>>(value);
      norm += value * value;
    }
    largest = norm <= largest ? largest : norm;
    if (norm != norm) return norm;
  }
  return largest;
}

// out [48 / kPack, stride] = x [rows, D], zero beyond.
template <class E, class X>
void pack_rows(const X* x, int64_t rows, int64_t dim, int64_t stride, E* out) {
  constexpr int64_t kValues = kPack<E>;
  auto* const values = reinterpret_cast<Value<E>*>(out);
  std::fill_n(out, kPanel / kValues * stride, E(0));
  for (int64_t r = 0; r < rows; ++r) {
    Value<E>* const row = values + r / kValues * stride * kValues + r % kValues;
    for (int64_t k = 0; k < dim; ++k) row[k * kValues] = static_cast<Value<E>>(static_cast<Sum<E>>(x[r * dim + k]));
  }
}

// Calls f(panel, x, rows): `rows` rows from x on, of z or of mu, make panel number `panel`.
template <class Z, class T, class F>
void for_each_panel(const Arguments<Z, T>& in, const F& f) {
  const Sizes& sizes = in.sizes;
  torch::stable::parallel_for(0, sizes.rows / kPanel, 8, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto visit = [&](const auto* x, int64_t row, int64_t count) {
        f(panel, x + row * sizes.dim, std::min(kPanel, count - row));
      };
      const int64_t row = panel * kPanel;
      if (row < sizes.mean_offset) {
        visit(in.z, row, sizes.own);
      } else if (row < sizes.other_offset) {
        visit(in.mu, row - sizes.mean_offset, sizes.means);
      } else {
        visit(in.z + sizes.own * sizes.dim, row - sizes.other_offset, sizes.others);
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

template <class E, class Z, class T>
Packed<E> pack(const Arguments<Z, T>& in, bool shifted, bool with_gradient, Workspace<T>& workspace) {
  static_assert(sizeof(E) == sizeof(T), "one workspace serves both");
  const Sizes& sizes = in.sizes;
  Problem<E> p{};
  p.dim = sizes.dim;
  p.depth = (sizes.dim + kPack<E> - 1) / kPack<E>;
  p.stride = sizes.stride(sizeof(T));

  const auto take = [&](int64_t count) { return reinterpret_cast<E*>(workspace.take(count)); };
  E* const panels = take(sizes.rows * p.depth);
  E* const rows = with_gradient ? take(sizes.rows / kPack<E> * p.stride) : nullptr;
  p.grad_rows = with_gradient ? sizes.other_offset : 0;
  p.grad = with_gradient ? workspace.take(p.grad_rows * p.stride) : nullptr;
  std::vector<T> norms(sizes.rows / kPanel);
  for_each_panel(in, [&](int64_t panel, const auto* x, int64_t count) {
    norms[panel] = pack_panel(x, count, sizes.dim, panels + panel * kPanel * p.depth);
    if (!with_gradient) return;
    pack_rows(x, count, sizes.dim, p.stride, rows + panel * kPanel / kPack<E> * p.stride);
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

  T* const weight = workspace.take(sizes.rows);
  std::fill_n(weight, sizes.rows, T(0));
  std::copy_n(in.a, sizes.own, weight);
  std::copy_n(in.b, sizes.means, weight + sizes.mean_offset);
  std::copy_n(in.a + sizes.own, sizes.others, weight + sizes.other_offset);
  if (!p.shifted) std::transform(weight, weight + sizes.rows, weight, [](T w) { return std::log(w); });
  p.weight = weight;
  return {p, std::isfinite(total)};
}

// Visits this part's pairs of blocks with forward or backward tile code.
template <class E, class F>
void run(
    const Problem<E>& p, const Sizes& sizes, int64_t part, int64_t parts, F tile_code, Workspace<Sum<E>>& workspace) {
  const Schedule schedule(sizes);
  // A thread for each 2 million multiply-adds, some 20 us: with less to do it costs more than it helps.
  const int64_t useful = sizes.own * (sizes.rows - sizes.own / 2) / parts * sizes.dim / (1 << 21) + 1;
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), useful, schedule.count()});
  Sum<E>* const scratch = workspace.take(workers * kScratch<E>);
  schedule.for_each_pair(workers, part, parts, [&](Block i, Block j, int64_t worker) {
    tile_code(p, i, j, scratch + worker * kScratch<E>);
  });
}

template <class E, class Z, class T>
void lse_forward(
    const Arguments<Z, T>& in, bool shifted, int64_t part, int64_t parts, const Tensor& like, T* lse) {
  Workspace<T> workspace(like);
  const Sizes& sizes = in.sizes;
  auto [p, finite] = pack<E>(in, shifted, false, workspace);
  if (!finite) {
    std::fill_n(lse, sizes.own, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  p.sum = workspace.take(sizes.rows);
  p.max = workspace.take(sizes.rows);
  std::fill_n(p.sum, sizes.rows, T(0));
  std::fill_n(p.max, sizes.rows, -std::numeric_limits<T>::infinity());
  run(p, sizes, part, parts, tiles<E>()->forward, workspace);
  for (int64_t i = 0; i < sizes.own; ++i) {
    const double sum = std::log(static_cast<double>(p.sum[i]));  // -inf where nothing was met
    lse[i] = static_cast<T>(sum + (p.shifted ? 1 / in.temperature : p.max[i]));
  }
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
  auto [p, finite] = pack<E>(in, shifted, true, workspace);
  if (!finite) {
    std::fill_n(dz, sizes.own * sizes.dim, static_cast<Z>(std::numeric_limits<T>::quiet_NaN()));
    std::fill_n(dmu, sizes.means * sizes.dim, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  T* const u = workspace.take(sizes.rows);
  T* const level = workspace.take(sizes.rows);
  std::fill_n(u, sizes.rows, T(0));
  std::fill_n(level, sizes.rows, std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < sizes.anchors(); ++i) {
    // An anchor without gradient or without contrast set (lse = -inf) takes no part.
    if (grad_lse[i] == 0 || lse[i] == -std::numeric_limits<T>::infinity()) continue;
    const double value = lse[i];
    const int64_t row = sizes.anchor_row(i);
    u[row] = static_cast<T>(p.shifted ? grad_lse[i] * std::exp(1 / in.temperature - value) : grad_lse[i] + 0 * value);
    level[row] = lse[i];
  }
  p.u = u;
  p.level = level;
  run(p, sizes, 0, 1, tiles<E>()->backward, workspace);
  write_gradient(p, 0, sizes.own, in.temperature, dz);
  write_gradient(p, sizes.mean_offset, sizes.means, in.temperature, dmu);
}

// Calls f(Z, T, E) with a value of each type that a call with these tensors takes.
template <class F>
auto dispatch(const Tensor& z, const Tensor& a, const F& f) {
  if (a.scalar_type() == ScalarType::Double) return f(double{}, double{}, double{});
  if (z.scalar_type() != ScalarType::BFloat16) return f(float{}, float{}, float{});
  return tiles<BFloat16Pair>() ? f(BFloat16{}, float{}, BFloat16Pair{}) : f(BFloat16{}, float{}, float{});
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

Tensor hycon_lse_forward(
    Tensor z, std::optional<Tensor> mu, Tensor a, std::optional<Tensor> b, Tensor temperature, bool shifted,
    int64_t part, int64_t parts) {
  STD_TORCH_CHECK(part >= 0 && part < parts, "part must be in [0, parts); got ", part, " of ", parts);
  z = torch::stable::contiguous(z);
  mu = contiguous(mu);
  a = torch::stable::contiguous(a);
  b = contiguous(b);
  return dispatch(z, a, [&](auto of_z, auto of_sums, auto of_products) {
    using T = decltype(of_sums);
    const auto in = check_arguments<decltype(of_z), T>(z, mu, a, b, temperature, -1);
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
  return dispatch(z, a, [&](auto of_z, auto of_sums, auto of_products) {
    using Z = decltype(of_z);
    using T = decltype(of_sums);
    const auto in = check_arguments<Z, T>(z, mu, a, b, temperature, own);
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
