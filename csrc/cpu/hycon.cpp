// The N² part of HyCon on the CPU, never holding more of the N x N matrix than one block of it per thread.
//
//     lse_i = log( sum_{j != i} a_j exp(z_i.z_j / t) + sum_c b_c exp(z_i.mu_c / t) )
//
// N rows of z, C rows of mu, D columns, t temperature; R: rows of both, each padded to whole panels of 48.
//
// z and mu are handled as one sequence of rows with column weights w = [a; b], of which only the first N are anchors.
// It is cut into blocks; each pair of blocks {I, J} is visited once, S_IJ = z_I z_J^T / t serving both sides because S
// is symmetric:
//     forward    sum_i += e_ij w_j and sum_j += e_ij w_i, e = exp(S - 1/t)                      N² D multiply-adds / 2
//     backward   K_ij = e_ij (u_i w_j + u_j w_i), u_i = g_i exp(1/t - lse_i); then
//                t dz_I += K z_J and t dz_J += K^T z_I                                      3 N² D multiply-adds / 2
// The constant shift 1/t needs |z_i.z_j| <= 1 and 2/t within the range of the type. Otherwise (`shifted` false, rows
// longer than 1, weights so small that sums would underflow) a running maximum takes its place.
//
// Pairs are visited in the order of a round-robin tournament: in each round every block meets one other, so that the
// pairs of a round share no rows and run in parallel, without locks and without accumulators per thread. Rows see
// their partners in the same order whatever the number of threads: results are bit-equal on every run and thread count.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "hycon_tiles.h"

namespace allnc {
namespace cpu {
namespace {

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
  int64_t anchors, means, dim;  // N, C, D
  int64_t mean_offset, rows;    // first padded row of mu; R

  Sizes(int64_t n, int64_t c, int64_t d)
      : anchors(n), means(c), dim(d), mean_offset(padded(n)), rows(padded(n) + padded(c)) {}

  static int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
  // Elements from row to row: an odd number of cache lines, as rows a power of two apart share too few cache sets.
  int64_t stride(int64_t element_size) const {
    const int64_t lines = (dim * element_size + kAlignment - 1) / kAlignment;
    return (lines | 1) * kAlignment / element_size;
  }
};

// The blocks of z and of mu, and the order in which pairs of them are visited.
class Schedule {
 public:
  explicit Schedule(const Sizes& sizes) {
    // Small problems get small blocks, for enough pairs to share out. Must not depend on the number of threads.
    const int64_t block = std::clamp<int64_t>(sizes.rows / kPanel / 16, 1, kMaxBlock / kPanel) * kPanel;
    add_blocks(0, sizes.mean_offset, block);
    num_anchor_blocks_ = count();
    add_blocks(sizes.mean_offset, sizes.rows, block);
  }

  // Calls run(i, j, worker) for every pair of blocks that has an anchor, i before j or equal to it.
  template <class F>
  void for_each_pair(int64_t workers, const F& run) const {
    const int64_t players = count() + count() % 2;  // of an odd number of blocks, one rests in each round
    const int64_t tickets = players + (players - 1) * (players / 2);
    std::vector<std::atomic<int64_t>> rounds_done(players);  // by block
    for (auto& done : rounds_done) done.store(0, std::memory_order_relaxed);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      for (;;) {
        // A ticket waits only for earlier ones, which other workers have already drawn: no deadlock.
        const int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= tickets) return;
        const auto [round, i, j] = draw(ticket, players);
        wait_for(rounds_done[i], round);
        wait_for(rounds_done[j], round);
        if (i < num_anchor_blocks_ && j < count()) run(blocks_[i], blocks_[j], worker);
        rounds_done[i].store(round + 1, std::memory_order_release);
        rounds_done[j].store(round + 1, std::memory_order_release);
      }
    });
  }

  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

 private:
  struct Meeting {
    int64_t round, i, j;
  };

  void add_blocks(int64_t first, int64_t end, int64_t block) {
    for (; first < end; first += block) blocks_.push_back({first, std::min(block, end - first)});
  }

  // Round 0: every block with itself. Then the circle method: the last player stays, the others turn.
  Meeting draw(int64_t ticket, int64_t players) const {
    if (ticket < players) return {0, ticket, ticket};
    const int64_t turning = players - 1;
    const int64_t round = (ticket - players) / (players / 2);
    const int64_t k = (ticket - players) % (players / 2);
    const int64_t i = (round + k) % turning;
    const int64_t j = k == 0 ? turning : (round - k + turning) % turning;
    return {round + 1, std::min(i, j), std::max(i, j)};
  }

  static void wait_for(const std::atomic<int64_t>& done, int64_t round) {
    while (done.load(std::memory_order_acquire) < round) std::this_thread::yield();
  }

  std::vector<Block> blocks_;
  int64_t num_anchor_blocks_ = 0;
};

// The tensors of a call, checked.
template <class T>
struct Arguments {
  Sizes sizes;
  const T* z;
  const T* mu;  // null without means
  const T* a;
  const T* b;
  double temperature;
};

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " must be float32, or float64 if a is; got ScalarType ",
      static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(
      t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions; got ", t.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(
        t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, "; got ", t.size(dim));
    ++dim;
  }
}

template <class T>
Arguments<T> check_arguments(
    const Tensor& z, const std::optional<Tensor>& mu, const Tensor& a, const std::optional<Tensor>& b,
    const Tensor& temperature) {
  STD_TORCH_CHECK(z.dim() == 2, "z must have 2 dimensions; got ", z.dim());
  STD_TORCH_CHECK(mu.has_value() == b.has_value(), "mu and b must be given together");
  STD_TORCH_CHECK(!mu || mu->dim() == 2, "mu must have 2 dimensions");
  const Sizes sizes(z.size(0), mu ? mu->size(0) : 0, z.size(1));
  const ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  check(z, "z", type, {sizes.anchors, sizes.dim});
  check(a, "a", type, {sizes.anchors});
  if (mu) {
    check(*mu, "mu", type, {sizes.means, sizes.dim});
    check(*b, "b", type, {sizes.means});
  }
  STD_TORCH_CHECK(
      temperature.numel() == 1 && temperature.scalar_type() == type,
      "temperature must be one element of the type of a");
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  return {sizes, data(z), mu ? data(*mu) : nullptr, data(a), b ? data(*b) : nullptr, *data(temperature)};
}

// z and mu brought into the layout of the tiles.
template <class T>
struct Packed {
  Problem<T> problem;
  bool finite;  // no NaN or infinity in any input
};

// out [D, 48] = x [rows, D] transposed, zero beyond; returns the largest squared norm (NaN if there is any).
template <class T>
T pack_panel(const T* x, int64_t rows, int64_t dim, T* out) {
  T largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    T norm = 0;
    for (int64_t k = 0; k < dim; ++k) {
      const T value = x[r * dim + k];
      out[k * kPanel + r] = value;
      norm += value * value;
    }
    largest = norm <= largest ? largest : norm;
    if (norm != norm) return norm;
  }
  for (int64_t k = 0; k < dim && rows < kPanel; ++k) {
    std::fill(out + k * kPanel + rows, out + (k + 1) * kPanel, T(0));
  }
  return largest;
}

// out [48, stride] = x [rows, D], zero beyond.
template <class T>
void pad_rows(const T* x, int64_t rows, int64_t dim, int64_t stride, T* out) {
  for (int64_t r = 0; r < kPanel; ++r) {
    const int64_t copied = r < rows ? dim : 0;
    std::copy_n(x + r * dim, copied, out + r * stride);
    std::fill(out + r * stride + copied, out + (r + 1) * stride, T(0));
  }
}

// Calls f(panel, x, rows): `rows` rows from x on make panel number `panel`.
template <class T, class F>
void for_each_panel(const Arguments<T>& in, const F& f) {
  const Sizes& sizes = in.sizes;
  torch::stable::parallel_for(0, sizes.rows / kPanel, 8, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * kPanel;
      if (row < sizes.mean_offset) {
        f(panel, in.z + row * sizes.dim, std::min(kPanel, sizes.anchors - row));
      } else {
        const int64_t mean = row - sizes.mean_offset;
        f(panel, in.mu + mean * sizes.dim, std::min(kPanel, sizes.means - mean));
      }
    }
  });
}

// Sums of e_ij w_j and factors exp(1/t - lse_i) must stay far from the ends of T's range; S within the shift.
template <class T>
bool shift_is_safe(const Arguments<T>& in, T largest_norm) {
  T smallest = 1;
  const auto visit = [&](const T* w, int64_t count) {
    for (int64_t k = 0; k < count; ++k) smallest = w[k] > 0 && w[k] < smallest ? w[k] : smallest;
  };
  visit(in.a, in.sizes.anchors);
  visit(in.b, in.sizes.means);
  const double room = -0.9 * std::log(static_cast<double>(std::numeric_limits<T>::min()));
  return largest_norm <= T(1.01) && 2.02 / in.temperature - std::log(static_cast<double>(smallest)) < room;
}

template <class T>
Packed<T> pack(const Arguments<T>& in, bool shifted, bool with_gradient, Workspace<T>& workspace) {
  const Sizes& sizes = in.sizes;
  Problem<T> p{};
  p.dim = sizes.dim;
  p.stride = sizes.stride(sizeof(T));

  T* const panels = workspace.take(sizes.rows * sizes.dim);
  T* const rows = with_gradient ? workspace.take(sizes.rows * p.stride) : nullptr;
  p.grad = with_gradient ? workspace.take(sizes.rows * p.stride) : nullptr;
  std::vector<T> norms(sizes.rows / kPanel);
  for_each_panel(in, [&](int64_t panel, const T* x, int64_t count) {
    norms[panel] = pack_panel(x, count, sizes.dim, panels + panel * kPanel * sizes.dim);
    if (!with_gradient) return;
    pad_rows(x, count, sizes.dim, p.stride, rows + panel * kPanel * p.stride);
    std::fill_n(p.grad + panel * kPanel * p.stride, kPanel * p.stride, T(0));
  });
  p.panels = panels;
  p.rows = rows;

  T largest = 0, total = static_cast<T>(1 / in.temperature);
  for (const T norm : norms) {
    largest = norm > largest ? norm : largest;
    total += norm;
  }
  for (int64_t k = 0; k < sizes.anchors; ++k) total += in.a[k];
  for (int64_t k = 0; k < sizes.means; ++k) total += in.b[k];
  p.shifted = shifted && shift_is_safe(in, largest);
  p.scale = static_cast<T>((p.shifted ? kLog2E : 1) / in.temperature);

  T* const weight = workspace.take(sizes.rows);
  std::fill_n(weight, sizes.rows, T(0));
  std::copy_n(in.a, sizes.anchors, weight);
  std::copy_n(in.b, sizes.means, weight + sizes.mean_offset);
  if (!p.shifted) std::transform(weight, weight + sizes.rows, weight, [](T w) { return std::log(w); });
  p.weight = weight;
  return {p, std::isfinite(total)};
}

// Visits all pairs of blocks with forward or backward tile code.
template <class T, class F>
void run(const Problem<T>& p, const Sizes& sizes, F tile_code, Workspace<T>& workspace) {
  const Schedule schedule(sizes);
  // A thread for each 2 million multiply-adds, some 20 us: with less to do it costs more than it helps.
  const int64_t useful = sizes.rows * sizes.anchors / 2 * sizes.dim / (1 << 21) + 1;
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), useful, schedule.count()});
  T* const scratch = workspace.take(workers * kScratch);
  schedule.for_each_pair(workers, [&](Block i, Block j, int64_t worker) {
    tile_code(p, i, j, scratch + worker * kScratch);
  });
}

template <class T>
void lse_forward(const Arguments<T>& in, bool shifted, const Tensor& like, T* lse) {
  Workspace<T> workspace(like);
  const Sizes& sizes = in.sizes;
  auto [p, finite] = pack(in, shifted, false, workspace);
  if (!finite) {
    std::fill_n(lse, sizes.anchors, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  p.sum = workspace.take(sizes.rows);
  p.max = workspace.take(sizes.rows);
  std::fill_n(p.sum, sizes.rows, T(0));
  std::fill_n(p.max, sizes.rows, -std::numeric_limits<T>::infinity());
  run(p, sizes, tiles<T>().forward, workspace);
  for (int64_t i = 0; i < sizes.anchors; ++i) {
    const double sum = std::log(static_cast<double>(p.sum[i]));  // -inf for an empty contrast set
    lse[i] = static_cast<T>(sum + (p.shifted ? 1 / in.temperature : p.max[i]));
  }
}

// dz [N, D] = grad / temperature without the padding.
template <class T>
void write_gradient(const Problem<T>& p, int64_t offset, int64_t count, double temperature, T* out) {
  const T factor = static_cast<T>(1 / temperature);
  torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* grad = p.grad + (offset + row) * p.stride;
      for (int64_t k = 0; k < p.dim; ++k) out[row * p.dim + k] = grad[k] * factor;
    }
  });
}

template <class T>
void lse_backward(
    const Arguments<T>& in, const T* grad_lse, const T* lse, bool shifted, const Tensor& like, T* dz, T* dmu) {
  Workspace<T> workspace(like);
  const Sizes& sizes = in.sizes;
  auto [p, finite] = pack(in, shifted, true, workspace);
  if (!finite) {
    std::fill_n(dz, sizes.anchors * sizes.dim, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(dmu, sizes.means * sizes.dim, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  T* const u = workspace.take(sizes.rows);
  T* const level = workspace.take(sizes.rows);
  std::fill_n(u, sizes.rows, T(0));
  std::fill_n(level, sizes.rows, std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < sizes.anchors; ++i) {
    // An anchor without gradient or without contrast set (lse = -inf) takes no part.
    if (grad_lse[i] == 0 || lse[i] == -std::numeric_limits<T>::infinity()) continue;
    const double value = lse[i];
    u[i] = static_cast<T>(p.shifted ? grad_lse[i] * std::exp(1 / in.temperature - value) : grad_lse[i] + 0 * value);
    level[i] = lse[i];
  }
  p.u = u;
  p.level = level;
  run(p, sizes, tiles<T>().backward, workspace);
  write_gradient(p, 0, sizes.anchors, in.temperature, dz);
  write_gradient(p, sizes.mean_offset, sizes.means, in.temperature, dmu);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::make_optional(torch::stable::contiguous(*t)) : std::nullopt;
}

Tensor hycon_lse_forward(
    Tensor z, std::optional<Tensor> mu, Tensor a, std::optional<Tensor> b, Tensor temperature, bool shifted) {
  z = torch::stable::contiguous(z);
  mu = contiguous(mu);
  a = torch::stable::contiguous(a);
  b = contiguous(b);
  const auto compute = [&](auto zero) {
    using T = decltype(zero);
    const Arguments<T> in = check_arguments<T>(z, mu, a, b, temperature);
    Tensor lse = torch::stable::new_empty(a, {in.sizes.anchors});
    lse_forward(in, shifted, a, static_cast<T*>(lse.mutable_data_ptr()));
    return lse;
  };
  return a.scalar_type() == ScalarType::Double ? compute(double{}) : compute(float{});
}

std::tuple<Tensor, Tensor> hycon_lse_backward(
    Tensor grad_lse, Tensor lse, Tensor z, std::optional<Tensor> mu, Tensor a, std::optional<Tensor> b,
    Tensor temperature, bool shifted) {
  grad_lse = torch::stable::contiguous(grad_lse);
  lse = torch::stable::contiguous(lse);
  z = torch::stable::contiguous(z);
  mu = contiguous(mu);
  a = torch::stable::contiguous(a);
  b = contiguous(b);
  const auto compute = [&](auto zero) {
    using T = decltype(zero);
    const Arguments<T> in = check_arguments<T>(z, mu, a, b, temperature);
    check(grad_lse, "grad_lse", a.scalar_type(), {in.sizes.anchors});
    check(lse, "lse", a.scalar_type(), {in.sizes.anchors});
    Tensor dz = torch::stable::new_empty(z, {in.sizes.anchors, in.sizes.dim});
    Tensor dmu = torch::stable::new_empty(z, {in.sizes.means, in.sizes.dim});
    lse_backward(
        in, static_cast<const T*>(grad_lse.const_data_ptr()), static_cast<const T*>(lse.const_data_ptr()), shifted, a,
        static_cast<T*>(dz.mutable_data_ptr()), static_cast<T*>(dmu.mutable_data_ptr()));
    return std::make_tuple(dz, dmu);
  };
  return a.scalar_type() == ScalarType::Double ? compute(double{}) : compute(float{});
}

}  // namespace
}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) {
  m.impl("hycon_lse_forward", TORCH_BOX(&allnc::cpu::hycon_lse_forward));
  m.impl("hycon_lse_backward", TORCH_BOX(&allnc::cpu::hycon_lse_backward));
}
