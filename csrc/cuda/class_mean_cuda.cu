// class_mean_ema on CUDA: batch means of the classes, moved into their running means. allnc/ops/class_mean.py has the
// formulas. N rows, C classes, F columns.
//
// Rows are grouped by class (their numbers, not the rows themselves) and each class's rows summed in segments of
// bounded length. Most classes have one segment, whose block also updates the mean; an absent class has one without
// rows. Only heavier classes go through a buffer of partial sums, added up in order. The launches are
//     count_kernel        rows of each class; the last block to finish plans: where classes and segments begin
//     group_kernel        row numbers by class, at the ranks that the counting atomics gave;
//                         deterministic: a stable radix sort of the labels instead, then split_kernel
//     segment_kernel      segment sums; finishes light and absent classes
//     heavy_kernel        finishes the others
// Features are read once, 16 bytes a thread, whatever the class sizes; nothing of size N x C exists and the host never
// waits. Everything after the order of rows within a class has one fixed order.

#include <cuda_runtime.h>

#include <algorithm>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <vector>

#include "../class_mean.h"
#include "current_stream.h"

namespace allnc {
namespace cuda {

constexpr int kSegmentRows = 128;  // partial sums are then at most 1/32 of the bytes of 16-bit features
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 0x7fffffff;

void check_launch(const char* kernel, cudaError_t error = cudaGetLastError()) {
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

// Rows order[first] to order[last - 1], all of one class; none for an absent class.
struct Segment {
  int64_t class_index, first, last;
  int64_t partial;  // row of the buffer of partial sums, or -1 for the only segment of its class
};

// A class of several segments.
struct Heavy {
  int64_t class_index, first_partial, num_partials;
};

// What precedes a class, and at the end the totals.
struct Before {
  int64_t rows, segments, partials, heavy;
  __host__ __device__ Before operator+(const Before& other) const {
    return {rows + other.rows, segments + other.segments, partials + other.partials, heavy + other.heavy};
  }
};

__device__ __forceinline__ Before takes(int64_t count) {
  const int64_t segments = count <= kSegmentRows ? 1 : (count + kSegmentRows - 1) / kSegmentRows;
  return {count, segments, segments > 1 ? segments : 0, segments > 1};
}

struct Plan {
  int64_t classes;
  int64_t* counts;    // [C]
  Before* before;     // [C + 1]
  Segment* segments;  // [max_segments]
  Heavy* heavy;       // [max_heavy]
};

// Segment `number` of a class of `count` rows.
__device__ __forceinline__ void write_segment(
    const Plan& plan, int64_t c, int64_t count, Before before, int64_t number) {
  const int64_t first = before.rows + number * kSegmentRows, class_end = before.rows + count;
  const int64_t last = first + kSegmentRows < class_end ? first + kSegmentRows : class_end;
  plan.segments[before.segments + number] = {c, first, last, count > kSegmentRows ? before.partials + number : -1};
}

// Exclusive sums over the classes, by one block; writes the plan but for later segments of heavy classes, and moves the
// classes that have rows among the seen ones.
__device__ void make_plan(const unsigned long long* counter, const Plan& plan, bool* seen, bool* seen_before) {
  constexpr int kItems = 4;                                                   // classes of a thread
  using Scan = cub::BlockScan<Before, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;  // raking spills registers
  __shared__ typename Scan::TempStorage storage;
  Before total{0, 0, 0, 0};
  for (int64_t base = 0; base < plan.classes; base += kThreads * kItems) {
    const int64_t own = base + threadIdx.x * kItems;
    int64_t count[kItems];
    Before taken{0, 0, 0, 0}, before{0, 0, 0, 0}, chunk{0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (own + k >= plan.classes) break;
      count[k] = static_cast<int64_t>(__ldcg(counter + own + k));  // other blocks' atomics are in the L2 cache
      taken = taken + takes(count[k]);
    }
    Scan(storage).ExclusiveScan(
        taken, before, Before{0, 0, 0, 0}, [](const Before& x, const Before& y) { return x + y; }, chunk);
    before = total + before;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t c = own + k;
      if (c >= plan.classes) break;
      const Before needs = takes(count[k]);
      plan.counts[c] = count[k];
      plan.before[c] = before;
      write_segment(plan, c, count[k], before, 0);
      if (needs.heavy) plan.heavy[before.heavy] = {c, before.partials, needs.partials};
      const bool was_seen = seen[c];
      seen_before[c] = was_seen;
      seen[c] = was_seen || count[k] > 0;
      before = before + needs;
    }
    total = total + chunk;
    __syncthreads();  // `storage` is used again
  }
  if (threadIdx.x == 0) plan.before[plan.classes] = total;
}

// counter [C + 1], zero before: rows of each class, then the number of blocks that have finished. Writes ranks [N],
// each row's place among those of its class in whatever order the atomics give; or, for a sort (ranks is null), keys
// [N] = class, C for rows that take no part so that they come last, and row_numbers [N].
__global__ void __launch_bounds__(kThreads) count_kernel(
    const int64_t* labels, int64_t rows, int64_t ignore_index, unsigned long long* counter, int64_t* ranks,
    uint32_t* keys, int64_t* row_numbers, Plan plan, bool* seen, bool* seen_before) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) {
    const int64_t c = labels[i];
    const bool used = takes_part(c, plan.classes, ignore_index);
    const int64_t rank = used ? count_up(counter, c) : 0;
    if (ranks != nullptr) {
      ranks[i] = rank;
    } else {
      keys[i] = static_cast<uint32_t>(used ? c : plan.classes);
      row_numbers[i] = i;
    }
  }
  __threadfence();  // this block's counts before its ticket
  __syncthreads();
  __shared__ bool is_last;
  if (threadIdx.x == 0) is_last = atomicAdd(counter + plan.classes, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  make_plan(counter, plan, seen, seen_before);
}

// order [N]: row numbers by class.
__global__ void __launch_bounds__(kThreads) group_kernel(
    const int64_t* labels, const int64_t* ranks, int64_t rows, int64_t ignore_index, Plan plan, int64_t* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows || !takes_part(labels[i], plan.classes, ignore_index)) return;
  const int64_t c = labels[i], rank = ranks[i];
  const Before before = plan.before[c];
  order[before.rows + rank] = i;
  if (rank > 0 && rank % kSegmentRows == 0) write_segment(plan, c, plan.counts[c], before, rank / kSegmentRows);
}

// The later segments of heavy classes, from the sorted keys.
__global__ void __launch_bounds__(kThreads) split_kernel(const uint32_t* sorted_keys, int64_t rows, Plan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows || sorted_keys[i] >= plan.classes) return;
  const int64_t c = sorted_keys[i];
  const Before before = plan.before[c];
  const int64_t rank = i - before.rows;
  if (rank > 0 && rank % kSegmentRows == 0) write_segment(plan, c, plan.counts[c], before, rank / kSegmentRows);
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

// The running means and what a batch does to them.
template <class A>
struct Update {
  const bool* seen_before;  // [C]
  A* means;                 // [C, F]: in place
  A* value;                 // [C, F]: the new means once more
  A momentum, rest;         // m, 1 - m
};

// Moves V columns of class c, whose `count` rows sum to `sum`, into the mean.
template <class A, int V>
__device__ __forceinline__ void finish(
    const Update<A>& update, int64_t c, int64_t count, const A (&sum)[V], int64_t columns, int64_t column) {
  constexpr int kPart = widest_part<A, V>();
  const bool seen = update.seen_before[c];
  const A n = static_cast<A>(count);
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    const int64_t at = c * columns + column + part;
    Pack<A, kPart> mean;
    if (count == 0) {
      mean = load<A, kPart>(update.means + at);
    } else {
      Pack<A, kPart> old;
      if (seen) old = load<A, kPart>(update.means + at);
#pragma unroll
      for (int v = 0; v < kPart; ++v) {
        const A batch = sum[part + v] / n;
        mean.data[v] = seen ? update.momentum * old.data[v] + update.rest * batch : batch;
      }
      store<A, kPart>(update.means + at, mean);
    }
    store<A, kPart>(update.value + at, mean);
  }
}

// Sums of segments: light and absent classes are finished, the rest goes to partial [partials, F].
// Block (segment, column tile); threads (columns, rows).
template <class T, class A, int V>
__global__ void __launch_bounds__(kThreads, 4) segment_kernel(
    const T* __restrict__ x, int64_t stride, int64_t columns, const int64_t* __restrict__ order, Plan plan,
    A* __restrict__ partial, Update<A> update) {
  if (blockIdx.x >= plan.before[plan.classes].segments) return;  // the grid is sized for the worst case
  const Segment segment = plan.segments[blockIdx.x];
  const int num_rows = static_cast<int>(segment.last - segment.first);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  __shared__ int64_t row_start[kSegmentRows];
  if (thread < num_rows) row_start[thread] = order[segment.first + thread] * stride;
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool inside = column < columns;

  A sum[V] = {};
  if (inside) {
    constexpr int kUnroll = 4;  // loads in flight
    const int step = blockDim.y;
    int r = threadIdx.y;
    for (; r + (kUnroll - 1) * step < num_rows; r += kUnroll * step) {
      Pack<T, V> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pack[u] = load<T, V>(x + row_start[r + u * step] + column);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += static_cast<A>(pack[u].data[v]);
      }
    }
    for (; r < num_rows; r += step) {
      const Pack<T, V> pack = load<T, V>(x + row_start[r] + column);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += static_cast<A>(pack.data[v]);
    }
  }
  reduce_rows<A, V>(sum);
  if (!inside || threadIdx.y != 0) return;
  if (segment.partial < 0) {
    finish<A, V>(update, segment.class_index, num_rows, sum, columns, column);
    return;
  }
  constexpr int kPart = widest_part<A, V>();
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    Pack<A, kPart> pack;
#pragma unroll
    for (int v = 0; v < kPart; ++v) pack.data[v] = sum[part + v];
    store<A, kPart>(partial + segment.partial * columns + column + part, pack);
  }
}

// Heavy classes, from their partial sums. Block (share of the classes, column tile); threads (columns, partial sums).
template <class A, int V>
__global__ void __launch_bounds__(kThreads, 4)
    heavy_kernel(const A* __restrict__ partial, int64_t columns, Plan plan, Update<A> update) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool inside = column < columns;
  const int64_t num_heavy = plan.before[plan.classes].heavy;
  for (int64_t h = blockIdx.x; h < num_heavy; h += gridDim.x) {
    const Heavy heavy = plan.heavy[h];
    A sum[V] = {};
    if (inside) {
#pragma unroll 4
      for (int64_t s = threadIdx.y; s < heavy.num_partials; s += blockDim.y) {
        const Pack<A, V> pack = load<A, V>(partial + (heavy.first_partial + s) * columns + column);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += pack.data[v];
      }
    }
    reduce_rows<A, V>(sum);
    if (inside && threadIdx.y == 0) {
      finish<A, V>(update, heavy.class_index, plan.counts[heavy.class_index], sum, columns, column);
    }
    __syncthreads();  // shared memory is used again
  }
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

unsigned num_column_tiles(int64_t columns, int64_t per_tile) {
  const int64_t tiles = (columns + per_tile - 1) / per_tile;
  STD_TORCH_CHECK(tiles <= 0xffff, "too many columns for one launch: ", columns);
  return static_cast<unsigned>(tiles);
}

template <class T>
bool is_aligned(const T* p, int64_t stride, int64_t columns) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPack == 0 && columns % kPack == 0;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// `count` elements of a plain type, uninitialised.
template <class T>
T* take(std::vector<Tensor>& memory, const Tensor& like, int64_t count) {
  memory.push_back(empty_like_on(like, {count * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte));
  return static_cast<T*>(memory.back().mutable_data_ptr());
}

// order [N] = row_numbers [N] by their keys, which are at most `largest_key`; rows of equal keys keep their order.
void stable_sort(
    const uint32_t* keys, const int64_t* row_numbers, int64_t rows, int64_t largest_key, uint32_t* sorted_keys,
    int64_t* order, std::vector<Tensor>& memory, const Tensor& like, cudaStream_t stream) {
  int bits = 1;
  while ((largest_key >> bits) != 0) ++bits;
  size_t bytes = 0;
  const auto sort = [&](void* temporary) {
    check_launch(
        "the radix sort", cub::DeviceRadixSort::SortPairs(
                              temporary, bytes, keys, sorted_keys, row_numbers, order, rows, 0, bits, stream));
  };
  sort(nullptr);  // asks for the size
  sort(take<char>(memory, like, static_cast<int64_t>(bytes)));
}

template <class T, int V>
void launch_segments(
    const Tensor& features, int64_t max_segments, int64_t max_heavy, const int64_t* order, const Plan& plan,
    typename Accumulation<T>::type* partial, const Update<typename Accumulation<T>::type>& update,
    cudaStream_t stream) {
  using A = typename Accumulation<T>::type;
  const int64_t columns = features.size(1);
  const dim3 block = block_shape((columns + V - 1) / V);
  const dim3 grid(num_blocks(max_segments, 1), num_column_tiles(columns, block.x * V));
  segment_kernel<T, A, V>
      <<<grid, block, 0, stream>>>(data<T>(features), features.stride(0), columns, order, plan, partial, update);
  check_launch("segment_kernel");
  if (max_heavy == 0) return;
  constexpr int kPack = V > 1 ? 16 / sizeof(A) : 1;
  const dim3 heavy_block(8, kThreads / 8);  // 128 bytes of a row
  const dim3 heavy_grid(
      static_cast<unsigned>(std::min<int64_t>(max_heavy, 32)), num_column_tiles(columns, heavy_block.x * kPack));
  heavy_kernel<A, kPack><<<heavy_grid, heavy_block, 0, stream>>>(partial, columns, plan, update);
  check_launch("heavy_kernel");
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
  Tensor value = empty_like_on(means, {classes, columns}, means.scalar_type());
  Tensor seen_before = empty_like_on(seen, {classes}, ScalarType::Bool);
  Tensor counts = empty_like_on(labels, {classes}, ScalarType::Long);
  if (classes == 0) return {value, seen_before, counts};

  // A class has at most one segment that is not full; a heavy one has more rows than a segment.
  const int64_t max_heavy = std::min(classes, rows / (kSegmentRows + 1));
  const int64_t max_segments = rows / kSegmentRows + classes;
  const int64_t max_partials = max_heavy > 0 ? rows / kSegmentRows + max_heavy : 0;
  DenseState means_state(means), seen_state(seen);
  std::vector<Tensor> memory;
  const Plan plan{
      classes, mutable_data<int64_t>(counts), take<Before>(memory, labels, classes + 1),
      take<Segment>(memory, labels, max_segments), take<Heavy>(memory, labels, max_heavy)};
  Tensor counter = torch::stable::new_zeros(labels, {classes + 1});
  int64_t* const order = take<int64_t>(memory, labels, rows);
  int64_t* const ranks = deterministic ? nullptr : take<int64_t>(memory, labels, rows);
  uint32_t* const keys = deterministic ? take<uint32_t>(memory, labels, 2 * rows) : nullptr;
  int64_t* const row_numbers = deterministic ? take<int64_t>(memory, labels, rows) : nullptr;
  const int64_t* const label = data<int64_t>(labels);
  const unsigned row_blocks = std::max(num_blocks(rows, kThreads), 1u);

  count_kernel<<<row_blocks, kThreads, 0, stream>>>(
      label, rows, ignore_index, mutable_data<unsigned long long>(counter), ranks, keys, row_numbers, plan,
      mutable_data<bool>(seen_state.dense()), mutable_data<bool>(seen_before));
  check_launch("count_kernel");
  seen_state.write_back();
  if (rows > 0 && deterministic) {
    stable_sort(keys, row_numbers, rows, classes, keys + rows, order, memory, labels, stream);
    if (max_heavy > 0) {
      split_kernel<<<row_blocks, kThreads, 0, stream>>>(keys + rows, rows, plan);
      check_launch("split_kernel");
    }
  } else if (rows > 0) {
    group_kernel<<<row_blocks, kThreads, 0, stream>>>(label, ranks, rows, ignore_index, plan, order);
    check_launch("group_kernel");
  }
  if (columns == 0) return {value, seen_before, counts};

  dispatch_floating(features.scalar_type(), "features", [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulation<T>::type;
    Tensor& running = means_state.dense();
    const Update<A> update{
        data<bool>(seen_before), mutable_data<A>(running), mutable_data<A>(value), static_cast<A>(momentum),
        static_cast<A>(1 - momentum)};
    A* const partial = take<A>(memory, labels, max_partials * columns);
    const bool aligned =
        is_aligned(data<T>(features), features.stride(0), columns) && is_aligned(data<A>(running), columns, columns);
    const auto launch = aligned ? launch_segments<T, 16 / sizeof(T)> : launch_segments<T, 1>;
    launch(features, max_segments, max_heavy, order, plan, partial, update, stream);
  });
  means_state.write_back();
  return {value, seen_before, counts};
}

template <class T, int V>
void launch_gradient(
    const Tensor& grad_value, const Tensor& labels, const Tensor& counts, const Tensor& seen_before, double seen_factor,
    int64_t ignore_index, Tensor& grad_features, cudaStream_t stream) {
  using A = typename Accumulation<T>::type;
  const int64_t rows = labels.size(0), classes = grad_value.size(0), columns = grad_value.size(1);
  const dim3 block = block_shape((columns + V - 1) / V);
  const dim3 grid(num_blocks(rows, block.y), num_column_tiles(columns, block.x * V));
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
