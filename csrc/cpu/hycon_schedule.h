// How HyCon's work on pairs of rows is cut into blocks, and the order in which pairs of blocks are visited.
//
// Rows lie in one sequence of three sections (hycon_problem.h): own, means, others. Every pair of blocks that has an
// own block is visited once.
//
// Pairs are visited in the order of a round-robin tournament: in each round every block meets one other, so that the
// pairs of a round share no rows and run in parallel, without a lock on rows and without accumulators per thread.
// Groups of two blocks meet in two rounds, the second of which finds them in the cache. Rows see their partners in the
// same order whatever the number of threads: results are bit-equal on every run and thread count. Processes that share
// a forward pass take a part each, a stretch of that order: whole rounds stay together.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "hycon_tiles.h"

namespace allnc {
namespace cpu {

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
  int64_t anchors() const { return own + others; }                                      // N
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
    add_blocks(0, sizes.own, block);
    num_own_ = count();
    add_blocks(sizes.mean_offset, sizes.means, block);
    num_written_ = count();
    add_blocks(sizes.other_offset, sizes.others, kMaxBlock);
  }

  // Calls run(i, j, worker, place) for this part's pairs of blocks that have an own row, i before j or equal to it.
  // `place` is where the pair's rows x rows entries lie if those of all pairs follow each other.
  template <class F>
  void for_each_pair(int64_t workers, int64_t part, int64_t parts, const F& run) const {
    Queue queue(*this, part, parts);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      while (const std::optional<Pair> pair = queue.next()) {
        run(blocks_[pair->i], blocks_[pair->j], worker, pair->place);
        queue.finish(*pair);
      }
    });
  }

  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

 private:
  struct Pair {
    int64_t i, j;
    int64_t turn_i, turn_j;  // how many pairs of this part come before it for the rows of i and of j
    bool writes_j;           // not if j is i or one of the others
    int64_t place;           // entries of the pairs of this part before it
  };

  // Hands out this part's pairs, each once those before it have been added to the rows of both its blocks. The order of
  // the tournament is kept for every block but not between them: where a thread is held up, by another program on its
  // core, the others go on with the pairs that do not depend on its own.
  class Queue {
   public:
    Queue(const Schedule& schedule, int64_t part, int64_t parts)
        : schedule_(schedule), turns_(schedule.count(), 0), done_(schedule.count()) {
      for (auto& pairs : done_) pairs.store(0, std::memory_order_relaxed);
      const int64_t own = schedule.num_own_;
      const int64_t pairs = own * (own + 1) / 2 + own * (schedule.count() - own);
      skip_ = pairs * part / parts;
      left_ = pairs * (part + 1) / parts - skip_;
    }

    std::optional<Pair> next() {
      // The first pair that is not done waits for none, so that there is always one to run: no deadlock.
      for (;; std::this_thread::yield()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto ready = std::find_if(waiting_.begin(), waiting_.end(), [&](const Pair& p) { return is_ready(p); });
        if (ready != waiting_.end()) {
          const Pair pair = *ready;
          waiting_.erase(ready);
          return pair;
        }
        while (left_ > 0 && static_cast<int64_t>(waiting_.size()) < 4 * schedule_.count()) {
          const Pair pair = draw();
          if (is_ready(pair)) return pair;
          waiting_.push_back(pair);
        }
        if (left_ == 0 && waiting_.empty()) return std::nullopt;
      }
    }

    void finish(const Pair& pair) {
      done_[pair.i].store(pair.turn_i + 1, std::memory_order_release);
      if (pair.writes_j) done_[pair.j].store(pair.turn_j + 1, std::memory_order_release);
    }

   private:
    bool is_ready(const Pair& pair) const {
      return done_[pair.i].load(std::memory_order_acquire) == pair.turn_i &&
             (!pair.writes_j || done_[pair.j].load(std::memory_order_acquire) == pair.turn_j);
    }

    // The next pair of this part; the rest costs a glance each.
    Pair draw() {
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
        const int64_t place = place_;
        place_ += schedule_.blocks_[i].rows * schedule_.blocks_[j].rows;
        return Pair{i, j, turn_i, writes_j ? turns_[j]++ : 0, writes_j, place};
      }
    }

    const Schedule& schedule_;
    std::mutex mutex_;
    std::vector<int64_t> turns_;              // by block: pairs drawn
    std::vector<std::atomic<int64_t>> done_;  // by block: pairs that have been added to its rows
    std::vector<Pair> waiting_;               // drawn, in order
    int64_t ticket_ = 0, place_ = 0, skip_, left_;
  };

  // Of a section of `count` rows from `first` on.
  void add_blocks(int64_t first, int64_t count, int64_t block) {
    for (; count > 0; first += block, count -= block) {
      const int64_t used = (std::min(block, count) + kWholeTiles - 1) / kWholeTiles * kWholeTiles;
      blocks_.push_back({first, Sizes::padded(std::min(block, count)), used});
    }
  }

  // The players are groups of two blocks. First every group with itself. Then the circle method: the last player stays,
  // the others turn; of an odd number of groups, the one that meets `groups` rests. Where two groups meet, each block
  // of one meets both of the other, again in rounds.
  std::pair<int64_t, int64_t> draw(int64_t ticket) const {
    const int64_t groups = (count() + 1) / 2, players = groups + groups % 2;
    if (ticket < 3 * players) {
      const int64_t group = ticket / 3, step = ticket % 3;
      return {2 * group + (step == 1), 2 * group + (step > 0)};
    }
    const int64_t meeting = (ticket - 3 * players) / 4, step = (ticket - 3 * players) % 4;
    const int64_t turning = players - 1;
    const int64_t round = meeting / (players / 2), k = meeting % (players / 2);
    const int64_t i = (round + k) % turning;
    const int64_t j = k == 0 ? turning : (round - k + turning) % turning;
    const int64_t of_i = step % 2, of_j = (step + step / 2) % 2;  // 0 and 0, 1 and 1, 0 and 1, 1 and 0
    return {2 * std::min(i, j) + of_i, 2 * std::max(i, j) + of_j};
  }

  std::vector<Block> blocks_;
  int64_t num_own_ = 0;
  int64_t num_written_ = 0;  // own and means: blocks that get sums or gradients
};

}  // namespace cpu
}  // namespace allnc
