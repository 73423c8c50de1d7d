// class_mean_ema on CUDA: batch means of the classes, moved into their running means. allnc/ops/class_mean.py has the
// formulas. N rows, C classes, F columns.
//
// Rows are grouped by class (their numbers, not the rows themselves), each class's rows are summed in segments of
// bounded length, and the partial sums of a class are added up in order. Features are read once, 16 bytes a thread,
// whatever the class sizes; nothing of size N x C exists and the host never waits. The order of rows within a class
// comes from atomics, or from a stable sort in deterministic mode; everything after it has one fixed order.

#include <cuda_runtime.h>

#include <array>
#include <cub/block/block_scan.cuh>

#include "../class_mean.h"
#include "current_stream.h"

namespace allnc {
namespace cuda {

constexpr int kSegmentRows = 64;
constexpr int kThreads = 256;
constexpr int kScanThreads = 512;
constexpr int64_t kMaxBlocks = 0x7fffffff;

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " could not be launched: ", cudaGetErrorString(error));
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T data[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// How many of V values a thread can load or store at once: 16 bytes.
template <class A, int V>
constexpr int widest_part() {
  return V * sizeof(A) > 16 ? 16 / sizeof(A) : V;
}

// Adds 1 to counter[key] for every calling lane and returns the value before; lanes of a warp with one key share one
// atomic, because in a long tail most rows have the same few labels.
__device__ __forceinline__ int64_t count_up(unsigned long long* counter, int64_t key) {
  const unsigned active = __activemask();
  const unsigned peers = __match_any_sync(active, static_cast<unsigned long long>(key));
  const int lane = threadIdx.x % 32;
  const int leader = __ffs(peers) - 1;
  unsigned long long before = 0;
  if (lane == leader) before = atomicAdd(counter + key, static_cast<unsigned long long>(__popc(peers)));
  before = __shfl_sync(peers, before, leader);
  return static_cast<int64_t>(before) + __popc(peers & ((1u << lane) - 1));
}

// The host-side op has checked the labels, asynchronously; one that is out of range must still not be written by.
__device__ __forceinline__ bool takes_part(int64_t label, int64_t classes, int64_t ignore_index) {
  return label != ignore_index && label >= 0 && label < classes;
}

__global__ void count_kernel(
    const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, unsigned long long* counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows && takes_part(labels[i], classes, ignore_index)) count_up(counts, labels[i]);
}

// What precedes a class: rows and segments.
struct Before {
  int64_t rows, segments;
  __host__ __device__ Before operator+(const Before& other) const {
    return {rows + other.rows, segments + other.segments};
  }
};

// One block: exclusive sums of the counts -> first_row [C + 1], first_segment [C + 1].
__global__ void __launch_bounds__(kScanThreads) scan_kernel(
    const int64_t* counts, const bool* seen, int64_t classes, int64_t* first_row, int64_t* first_segment,
    bool* seen_after) {
  using Scan = cub::BlockScan<Before, kScanThreads, cub::BLOCK_SCAN_WARP_SCANS>;  // raking spills registers
  __shared__ typename Scan::TempStorage storage;
  Before total{0, 0};
  for (int64_t base = 0; base < classes; base += kScanThreads) {
    const int64_t c = base + threadIdx.x;
    const int64_t count = c < classes ? counts[c] : 0;
    Before before{0, 0}, chunk{0, 0};
    Scan(storage).ExclusiveScan(
        Before{count, (count + kSegmentRows - 1) / kSegmentRows}, before, Before{0, 0},
        [](const Before& x, const Before& y) { return x + y; }, chunk);
    if (c < classes) {
      first_row[c] = total.rows + before.rows;
      first_segment[c] = total.segments + before.segments;
      seen_after[c] = seen[c] || count > 0;
    }
    total = total + chunk;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    first_row[classes] = total.rows;
    first_segment[classes] = total.segments;
  }
}

// order [N]: row numbers by class, in whatever order the atomics give within a class; segment_class [segments].
__global__ void group_kernel(
    const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, const int64_t* first_row,
    const int64_t* first_segment, unsigned long long* next, int64_t* order, int64_t* segment_class) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows || !takes_part(labels[i], classes, ignore_index)) return;
  const int64_t c = labels[i];
  const int64_t rank = count_up(next, c);
  order[first_row[c] + rank] = i;
  if (rank % kSegmentRows == 0) segment_class[first_segment[c] + rank / kSegmentRows] = c;
}

// keys [N] = class, or C for rows that take no part, so that a sort puts them last.
__global__ void key_kernel(
    const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows) keys[i] = takes_part(labels[i], classes, ignore_index) ? labels[i] : classes;
}

__global__ void segment_kernel(
    const int64_t* sorted_keys, int64_t rows, int64_t classes, const int64_t* first_row,
    const int64_t* first_segment, int64_t* segment_class) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows || sorted_keys[i] >= classes) return;
  const int64_t c = sorted_keys[i];
  const int64_t rank = i - first_row[c];
  if (rank % kSegmentRows == 0) segment_class[first_segment[c] + rank / kSegmentRows] = c;
}

// Adds up the `sum` of the threads of a block that share a column; valid in threads with threadIdx.y == 0.
template <class A, int V>
__device__ __forceinline__ void reduce_rows(A (&sum)[V]) {
  __shared__ A shared[kThreads * V];
  A* own = shared + (threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
  for (int v = 0; v < V; ++v) own[v] = sum[v];
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += own[y * blockDim.x * V + v];
  }
}

// partial [segments, F]: block (segment, column tile); threads (columns, rows).
template <class T, class A, int V>
__global__ void __launch_bounds__(kThreads, 4) segment_sum_kernel(
    const T* __restrict__ x, int64_t stride, int64_t columns, int64_t classes, const int64_t* __restrict__ order,
    const int64_t* __restrict__ first_row, const int64_t* __restrict__ first_segment,
    const int64_t* __restrict__ segment_class, A* __restrict__ partial) {
  const int64_t segment = blockIdx.x;
  if (segment >= first_segment[classes]) return;  // the grid is sized for the worst case
  const int64_t c = segment_class[segment];
  const int64_t begin = first_row[c] + (segment - first_segment[c]) * kSegmentRows;
  const int64_t class_end = first_row[c + 1];
  const int64_t end = begin + kSegmentRows < class_end ? begin + kSegmentRows : class_end;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool inside = column < columns;

  A sum[V] = {};
  if (inside) {
    constexpr int kUnroll = 4;  // loads in flight
    int64_t r = begin + threadIdx.y;
    for (; r + (kUnroll - 1) * blockDim.y < end; r += kUnroll * blockDim.y) {
      Pack<T, V> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pack[u] = load<T, V>(x + order[r + u * blockDim.y] * stride + column);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += static_cast<A>(pack[u].data[v]);
      }
    }
    for (; r < end; r += blockDim.y) {
      const Pack<T, V> pack = load<T, V>(x + order[r] * stride + column);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += static_cast<A>(pack.data[v]);
    }
  }
  reduce_rows<A, V>(sum);
  if (!inside || threadIdx.y != 0) return;
  constexpr int kPart = widest_part<A, V>();
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    Pack<A, kPart> pack;
#pragma unroll
    for (int v = 0; v < kPart; ++v) pack.data[v] = sum[part + v];
    store<A, kPart>(partial + segment * columns + column + part, pack);
  }
}

// value [C, F]: block (class, column tile); threads (columns, segments).
template <class A>
__global__ void __launch_bounds__(kThreads) update_kernel(
    const A* __restrict__ partial, const A* __restrict__ means, const bool* __restrict__ seen,
    const int64_t* __restrict__ counts, const int64_t* __restrict__ first_segment, int64_t columns, A momentum, A rest,
    A* __restrict__ value) {
  const int64_t c = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const bool inside = column < columns;
  const int64_t end = first_segment[c + 1];
  A sum[1] = {};
  if (inside) {
#pragma unroll 4
    for (int64_t s = first_segment[c] + threadIdx.y; s < end; s += blockDim.y) sum[0] += partial[s * columns + column];
  }
  reduce_rows<A, 1>(sum);
  if (!inside || threadIdx.y != 0) return;
  const int64_t at = c * columns + column;
  if (counts[c] == 0) {
    value[at] = means[at];
    return;
  }
  const A mean = sum[0] / static_cast<A>(counts[c]);
  value[at] = seen[c] ? momentum * means[at] + rest * mean : mean;
}

// grad_features [N, F]: threads (columns, rows).
template <class T, class A, int V>
__global__ void __launch_bounds__(kThreads) gradient_kernel(
    const A* __restrict__ grad_value, const int64_t* __restrict__ labels, const int64_t* __restrict__ counts,
    const bool* __restrict__ seen_before, int64_t rows, int64_t classes, int64_t columns, A seen_factor,
    int64_t ignore_index, T* __restrict__ grad_features) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (i >= rows || column >= columns) return;
  const int64_t c = labels[i];
  Pack<T, V> result;
  if (takes_part(c, classes, ignore_index)) {
    const A scale = (seen_before[c] ? seen_factor : A{1}) / static_cast<A>(counts[c]);
    constexpr int kPart = widest_part<A, V>();
#pragma unroll
    for (int part = 0; part < V; part += kPart) {
      const Pack<A, kPart> grad = load<A, kPart>(grad_value + c * columns + column + part);
#pragma unroll
      for (int v = 0; v < kPart; ++v) result.data[part + v] = static_cast<T>(scale * grad.data[v]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) result.data[v] = static_cast<T>(0.0f);
  }
  store<T, V>(grad_features + i * columns + column, result);
}

// Threads (columns, rows) of a block: as many along the columns as a row needs, in whole warps.
dim3 block_shape(int64_t packs_in_row) {
  unsigned across = 32;
  while (across < kThreads / 2 && across < packs_in_row) across *= 2;
  return dim3(across, kThreads / across);
}

unsigned num_blocks(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "too many rows or columns for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

template <class T>
bool is_aligned(const T* p, int64_t stride, int64_t columns) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPack == 0 && columns % kPack == 0;
}

// A stable sort of keys [N]: the sorted keys and where they came from.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T, int V>
void launch_segment_sums(
    const Tensor& features, int64_t num_segments, int64_t classes, const Tensor& order, const Tensor& first_row,
    const Tensor& first_segment, const Tensor& segment_class, Tensor& partial, cudaStream_t stream) {
  using A = typename Accumulation<T>::type;
  const int64_t columns = features.size(1);
  const dim3 block = block_shape((columns + V - 1) / V);
  const dim3 grid(num_blocks(num_segments, 1), num_blocks(columns, block.x * V));
  segment_sum_kernel<T, A, V><<<grid, block, 0, stream>>>(
      data<T>(features), features.stride(0), columns, classes, data<int64_t>(order), data<int64_t>(first_row),
      data<int64_t>(first_segment), data<int64_t>(segment_class), mutable_data<A>(partial));
  check_launch("segment_sum_kernel");
}

std::tuple<Tensor, Tensor, Tensor> class_mean_ema_forward(
    Tensor features, Tensor labels, Tensor means, Tensor seen, double momentum, int64_t ignore_index,
    bool deterministic) {
  const ClassMeanSizes sizes = check_class_mean_forward(features, labels, means, seen, momentum);
  const int64_t rows = sizes.rows, classes = sizes.classes, columns = sizes.columns;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_stream(features.get_device_index()));
  features = with_dense_rows(features);
  labels = torch::stable::contiguous(labels);
  means = torch::stable::contiguous(means);
  seen = torch::stable::contiguous(seen);
  Tensor value = empty_like_on(means, {classes, columns}, means.scalar_type());
  Tensor seen_after = empty_like_on(seen, {classes}, ScalarType::Bool);
  Tensor counts = torch::stable::new_zeros(labels, {classes});
  if (classes == 0) return {value, seen_after, counts};

  const int64_t* label = data<int64_t>(labels);
  Tensor first_row = empty_like_on(labels, {classes + 1}, ScalarType::Long);
  Tensor first_segment = empty_like_on(labels, {classes + 1}, ScalarType::Long);
  const unsigned row_blocks = num_blocks(rows, kThreads);
  if (rows > 0) {
    count_kernel<<<row_blocks, kThreads, 0, stream>>>(
        label, rows, classes, ignore_index, mutable_data<unsigned long long>(counts));
    check_launch("count_kernel");
  }
  scan_kernel<<<1, kScanThreads, 0, stream>>>(
      data<int64_t>(counts), data<bool>(seen), classes, mutable_data<int64_t>(first_row),
      mutable_data<int64_t>(first_segment), mutable_data<bool>(seen_after));
  check_launch("scan_kernel");
  if (columns == 0) return {value, seen_after, counts};

  // A class has at most one segment that is not full.
  const int64_t max_segments = rows / kSegmentRows + std::min(rows, classes);
  Tensor partial = empty_like_on(means, {max_segments, columns}, means.scalar_type());
  if (rows > 0) {
    Tensor segment_class = empty_like_on(labels, {max_segments}, ScalarType::Long);
    Tensor order;
    if (deterministic) {
      Tensor keys = empty_like_on(labels, {rows}, ScalarType::Long);
      key_kernel<<<row_blocks, kThreads, 0, stream>>>(
          label, rows, classes, ignore_index, mutable_data<int64_t>(keys));
      check_launch("key_kernel");
      std::tie(keys, order) = stable_sort(keys);
      segment_kernel<<<row_blocks, kThreads, 0, stream>>>(
          data<int64_t>(keys), rows, classes, data<int64_t>(first_row), data<int64_t>(first_segment),
          mutable_data<int64_t>(segment_class));
      check_launch("segment_kernel");
    } else {
      order = empty_like_on(labels, {rows}, ScalarType::Long);
      Tensor next = torch::stable::new_zeros(labels, {classes});
      group_kernel<<<row_blocks, kThreads, 0, stream>>>(
          label, rows, classes, ignore_index, data<int64_t>(first_row), data<int64_t>(first_segment),
          mutable_data<unsigned long long>(next), mutable_data<int64_t>(order), mutable_data<int64_t>(segment_class));
      check_launch("group_kernel");
    }
    dispatch_floating(features.scalar_type(), "features", [&](auto type) {
      using T = decltype(type);
      const bool aligned = is_aligned(data<T>(features), features.stride(0), columns);
      const auto launch = aligned ? launch_segment_sums<T, 16 / sizeof(T)> : launch_segment_sums<T, 1>;
      launch(features, max_segments, classes, order, first_row, first_segment, segment_class, partial, stream);
    });
  }
  const auto update = [&](auto type) {
    using A = decltype(type);
    const dim3 block = block_shape(columns);
    const dim3 grid(num_blocks(classes, 1), num_blocks(columns, block.x));
    update_kernel<A><<<grid, block, 0, stream>>>(
        data<A>(partial), data<A>(means), data<bool>(seen), data<int64_t>(counts), data<int64_t>(first_segment),
        columns, static_cast<A>(momentum), static_cast<A>(1 - momentum), mutable_data<A>(value));
    check_launch("update_kernel");
  };
  if (means.scalar_type() == ScalarType::Double) {
    update(double{});
  } else {
    update(float{});
  }
  return {value, seen_after, counts};
}

template <class T, int V>
void launch_gradient(
    const Tensor& grad_value, const Tensor& labels, const Tensor& counts, const Tensor& seen_before,
    double seen_factor, int64_t ignore_index, Tensor& grad_features, cudaStream_t stream) {
  using A = typename Accumulation<T>::type;
  const int64_t rows = labels.size(0), classes = grad_value.size(0), columns = grad_value.size(1);
  const dim3 block = block_shape((columns + V - 1) / V);
  const dim3 grid(num_blocks(rows, block.y), num_blocks(columns, block.x * V));
  gradient_kernel<T, A, V><<<grid, block, 0, stream>>>(
      data<A>(grad_value), data<int64_t>(labels), data<int64_t>(counts), data<bool>(seen_before), rows, classes,
      columns, static_cast<A>(seen_factor), ignore_index, mutable_data<T>(grad_features));
  check_launch("gradient_kernel");
}

Tensor class_mean_ema_backward(
    Tensor grad_value, Tensor labels, Tensor counts, Tensor seen_before, double momentum, bool straight_through,
    int64_t ignore_index, ScalarType features_dtype) {
  const ClassMeanSizes sizes = check_class_mean_backward(grad_value, labels, counts, seen_before, features_dtype);
  const torch::stable::accelerator::DeviceGuard guard(grad_value.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_stream(grad_value.get_device_index()));
  grad_value = torch::stable::contiguous(grad_value);
  labels = torch::stable::contiguous(labels);
  counts = torch::stable::contiguous(counts);
  seen_before = torch::stable::contiguous(seen_before);
  Tensor grad_features = empty_like_on(grad_value, {sizes.rows, sizes.columns}, features_dtype);
  if (sizes.rows == 0 || sizes.columns == 0) return grad_features;
  dispatch_floating(features_dtype, "features_dtype", [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulation<T>::type;
    const bool aligned = is_aligned(data<A>(grad_value), sizes.columns, sizes.columns) &&
                         is_aligned(data<T>(grad_features), sizes.columns, sizes.columns);
    const auto launch = aligned ? launch_gradient<T, 16 / sizeof(T)> : launch_gradient<T, 1>;
    launch(
        grad_value, labels, counts, seen_before, straight_through ? 1.0 : 1 - momentum, ignore_index, grad_features,
        stream);
  });
  return grad_features;
}

}  // namespace cuda
}  // namespace allnc

STABLE_TORCH_LIBRARY_IMPL(allnc_C, CUDA, m) {
  m.impl("class_mean_ema_forward", TORCH_BOX(&allnc::cuda::class_mean_ema_forward));
  m.impl("class_mean_ema_backward", TORCH_BOX(&allnc::cuda::class_mean_ema_backward));
}
