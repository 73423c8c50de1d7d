// class_mean_ema on the CPU: batch means of the classes, moved into their running means. allnc/ops/class_mean.py has
// the formulas. N rows, C classes, F columns.
//
// Rows are grouped by class with a counting sort of the labels; each class's rows are then summed in segments of
// bounded length, so that one heavy class (the head of a long tail) is shared by all threads. Which thread takes a
// segment never changes what is added in which order: results are bit-equal on every run and thread count.

#include <atomic>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../class_mean.h"
#include "multiversion.h"

namespace allnc {
namespace cpu {

constexpr int64_t kSegmentRows = 256;

// out [F] = sum of the listed rows of x [N, F].
template <class T, class A>
ALLNC_MULTIVERSION void sum_rows(
    const T* __restrict x, int64_t stride, const int64_t* __restrict rows, int64_t num_rows, int64_t columns,
    A* __restrict out) {
  for (int64_t f = 0; f < columns; ++f) out[f] = 0;
  int64_t r = 0;
  // Four rows at a time: fewer passes over `out`, more loads in flight.
  for (; r + 4 <= num_rows; r += 4) {
    const T* __restrict p0 = x + rows[r] * stride;
    const T* __restrict p1 = x + rows[r + 1] * stride;
    const T* __restrict p2 = x + rows[r + 2] * stride;
    const T* __restrict p3 = x + rows[r + 3] * stride;
    for (int64_t f = 0; f < columns; ++f) {
      out[f] += (static_cast<A>(p0[f]) + static_cast<A>(p1[f])) + (static_cast<A>(p2[f]) + static_cast<A>(p3[f]));
    }
  }
  for (; r < num_rows; ++r) {
    const T* __restrict p = x + rows[r] * stride;
    for (int64_t f = 0; f < columns; ++f) out[f] += static_cast<A>(p[f]);
  }
}

// mean and value [F] = the running mean after a batch whose `count` rows of the class sum to value [F].
template <class A>
ALLNC_MULTIVERSION void update_mean(
    A* __restrict value, A* __restrict mean, int64_t columns, A count, bool seen, A momentum, A rest) {
  if (seen) {
    for (int64_t f = 0; f < columns; ++f) mean[f] = value[f] = momentum * mean[f] + rest * (value[f] / count);
  } else {
    for (int64_t f = 0; f < columns; ++f) mean[f] = value[f] = value[f] / count;
  }
}

template <class A>
ALLNC_MULTIVERSION void add_to(A* __restrict out, const A* __restrict x, int64_t columns) {
  for (int64_t f = 0; f < columns; ++f) out[f] += x[f];
}

template <class T, class A>
ALLNC_MULTIVERSION void scale_row(T* __restrict out, const A* __restrict x, int64_t columns, A scale) {
  for (int64_t f = 0; f < columns; ++f) out[f] = static_cast<T>(scale * x[f]);
}

// Rows of one class, `first` to `last` of Groups::order.
struct Segment {
  int64_t class_index, first, last;
  int64_t partial;  // row of the buffer of partial sums, or -1 for the only segment of a class
};

struct Groups {
  std::vector<int64_t> order;  // [N] row numbers by class, in ascending order within a class
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // [C + 1]
  int64_t num_partials = 0;
};

Groups group_rows(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* counts) {
  std::fill_n(counts, classes, int64_t{0});
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] == ignore_index) continue;
    STD_TORCH_CHECK(
        labels[i] >= 0 && labels[i] < classes, "labels must be in [0, ", classes, ") or ignore_index (", ignore_index,
        "); got ", labels[i], " in row ", i);
    ++counts[labels[i]];
  }
  Groups groups;
  groups.first_segment.reserve(classes + 1);
  std::vector<int64_t> next(classes);
  int64_t offset = 0;
  for (int64_t c = 0; c < classes; ++c) {
    groups.first_segment.push_back(static_cast<int64_t>(groups.segments.size()));
    next[c] = offset;
    const int64_t end = offset + counts[c];
    const bool several = counts[c] > kSegmentRows;
    for (; offset < end; offset += kSegmentRows) {
      groups.segments.push_back(
          {c, offset, std::min(offset + kSegmentRows, end), several ? groups.num_partials++ : -1});
    }
    offset = end;
  }
  groups.first_segment.push_back(static_cast<int64_t>(groups.segments.size()));
  groups.order.resize(offset);
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] != ignore_index) groups.order[next[labels[i]]++] = i;
  }
  return groups;
}

// Tasks of unequal size, taken by whichever thread is free.
template <class F>
void parallel_tasks(int64_t num_tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), num_tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < num_tasks; task = next++) f(task);
  });
}

template <class T>
void forward(
    const Tensor& features, const bool* seen, const int64_t* counts, const Groups& groups, double momentum,
    Tensor& means, Tensor& value) {
  using A = typename Accumulation<T>::type;
  const int64_t classes = means.size(0), columns = means.size(1), stride = features.stride(0);
  const T* x = static_cast<const T*>(features.const_data_ptr());
  A* mean = static_cast<A*>(means.mutable_data_ptr());
  A* out = static_cast<A*>(value.mutable_data_ptr());
  const A keep = static_cast<A>(momentum), rest = static_cast<A>(1 - momentum);
  const std::unique_ptr<A[]> partials(new A[groups.num_partials * columns]);  // [partials, F]

  const auto update = [&](int64_t c) {
    update_mean<A>(out + c * columns, mean + c * columns, columns, static_cast<A>(counts[c]), seen[c], keep, rest);
  };
  parallel_tasks(static_cast<int64_t>(groups.segments.size()), [&](int64_t task) {
    const Segment& s = groups.segments[task];
    A* sum = s.partial < 0 ? out + s.class_index * columns : partials.get() + s.partial * columns;
    sum_rows<T, A>(x, stride, groups.order.data() + s.first, s.last - s.first, columns, sum);
    if (s.partial < 0) update(s.class_index);
  });
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      A* row = out + c * columns;
      if (counts[c] == 0) {
        std::copy_n(mean + c * columns, columns, row);
        continue;
      }
      const Segment* s = groups.segments.data() + groups.first_segment[c];
      const Segment* last = groups.segments.data() + groups.first_segment[c + 1];
      if (s->partial < 0) continue;  // done with its sum
      std::copy_n(partials.get() + s->partial * columns, columns, row);
      while (++s < last) add_to<A>(row, partials.get() + s->partial * columns, columns);
      update(c);
    }
  });
}

// Sums are always taken in one fixed order here, so `deterministic` has nothing to choose.
std::tuple<Tensor, Tensor, Tensor> class_mean_ema_forward(
    Tensor features, Tensor labels, Tensor means, Tensor seen, double momentum, int64_t ignore_index,
    bool /*deterministic*/) {
  const auto [rows, classes, columns] = check_class_mean_forward(features, labels, means, seen, momentum);
  features = with_dense_rows(features);
  labels = torch::stable::contiguous(labels);
  Tensor value = empty_like_on(means, {classes, columns}, means.scalar_type());
  Tensor seen_before = empty_like_on(means, {classes}, ScalarType::Bool);
  Tensor counts = empty_like_on(means, {classes}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  const Groups groups =
      group_rows(static_cast<const int64_t*>(labels.const_data_ptr()), rows, classes, ignore_index, count);

  DenseState means_state(means), seen_state(seen);
  bool* const is_seen = static_cast<bool*>(seen_state.dense().mutable_data_ptr());
  bool* const was_seen = static_cast<bool*>(seen_before.mutable_data_ptr());
  std::copy_n(is_seen, classes, was_seen);
  for (int64_t c = 0; c < classes; ++c) is_seen[c] = was_seen[c] || count[c] > 0;
  dispatch_floating(features.scalar_type(), "features", [&](auto type) {
    forward<decltype(type)>(features, was_seen, count, groups, momentum, means_state.dense(), value);
  });
  means_state.write_back();
  seen_state.write_back();
  return {value, seen_before, counts};
}

// Asks for huge pages behind a large buffer that was just allocated: writing it for the first time otherwise costs a
// page fault per 4 KiB, several times what the writing costs.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

template <class T>
void backward(
    const Tensor& grad_value, const int64_t* labels, int64_t rows, const int64_t* counts, const bool* seen_before,
    double momentum, bool straight_through, int64_t ignore_index, Tensor& grad_features) {
  using A = typename Accumulation<T>::type;
  const int64_t classes = grad_value.size(0), columns = grad_value.size(1);
  const A* grad = static_cast<const A*>(grad_value.const_data_ptr());
  T* out = static_cast<T*>(grad_features.mutable_data_ptr());
  prefer_huge_pages(out, rows * columns * sizeof(T));
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
  // All rows of a class share one gradient: scale and round it once per class, then copy.
  const std::unique_ptr<char[]> buffer(new char[classes * columns * sizeof(T)]);  // [C, F]
  T* share = reinterpret_cast<T*>(buffer.get());
  torch::stable::parallel_for(0, classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (counts[c] == 0) continue;
      const double factor = seen_before[c] && !straight_through ? 1 - momentum : 1.0;
      const A scale = static_cast<A>(factor / static_cast<double>(counts[c]));
      scale_row<T, A>(share + c * columns, grad + c * columns, columns, scale);
    }
  });
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = labels[i];
      if (c == ignore_index || c < 0 || c >= classes) {
        std::fill_n(out + i * columns, columns, T(0));
      } else {
        std::copy_n(share + c * columns, columns, out + i * columns);
      }
    }
  });
}

Tensor class_mean_ema_backward(
    Tensor grad_value, Tensor labels, Tensor counts, Tensor seen_before, double momentum, bool straight_through,
    int64_t ignore_index, ScalarType features_dtype) {
  const auto [rows, classes, columns] =
      check_class_mean_backward(grad_value, labels, counts, seen_before, features_dtype);
  grad_value = torch::stable::contiguous(grad_value);
  labels = torch::stable::contiguous(labels);
  counts = torch::stable::contiguous(counts);
  seen_before = torch::stable::contiguous(seen_before);
  Tensor grad_features = empty_like_on(grad_value, {rows, columns}, features_dtype);
  dispatch_floating(features_dtype, "features_dtype", [&, rows = rows](auto type) {
    backward<decltype(type)>(
        grad_value, static_cast<const int64_t*>(labels.const_data_ptr()), rows,
        static_cast<const int64_t*>(counts.const_data_ptr()), static_cast<const bool*>(seen_before.const_data_ptr()),
        momentum, straight_through, ignore_index, grad_features);
  });
  return grad_features;
}

}  // namespace cpu
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CPU, m) {
  m.impl("class_mean_ema_forward", TORCH_BOX(&allnc::cpu::class_mean_ema_forward));
  m.impl("class_mean_ema_backward", TORCH_BOX(&allnc::cpu::class_mean_ema_backward));
}
