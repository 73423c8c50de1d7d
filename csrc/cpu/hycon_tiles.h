// Work on one pair of row blocks of the HyCon primitive, compiled once for each vector instruction set.
// hycon_problem.h owns the memory, hycon_schedule.h the order; hycon_tiles_isa.h has the code.
//
// All rows of the problem lie in one sequence of sections (hycon_problem.h), each padded with zero rows to whole
// panels: R padded rows, D columns, panel = 48 rows, block = up to 4 panels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "exp2.h"

namespace allnc {
namespace cpu {

// 48 rows are whole register tiles in every instruction set; 4 panels of K (192 x 192 fp32) fit the L2 cache.
constexpr int64_t kPanel = 48;
constexpr int64_t kMaxBlock = 4 * kPanel;
constexpr int64_t kWholeTiles = 8;  // rows: a multiple of the rows of a register tile in every instruction set
constexpr int64_t kAlignment = 64;  // bytes, of every pointer below

// What products are made of, E: float, double, or two bfloat16 that follow each other in the contraction (the first in
// the low half), which a processor multiplies and adds at once. Sums are T = Sum<E>.
using BFloat16Pair = int32_t;

template <class E>
struct SumType {
  using type = E;
};
template <>
struct SumType<BFloat16Pair> {
  using type = float;
};
template <class E>
using Sum = typename SumType<E>::type;

// Values in one E.
template <class E>
constexpr int64_t kPack = std::is_same_v<E, BFloat16Pair> ? 2 : 1;

// With u, w and e as in hycon_problem.h. Padding rows have weight 0 and u = 0.
template <class E>
struct Problem {
  using T = Sum<E>;
  int64_t dim;     // D
  int64_t depth;   // D / kPack<E>, rounded up
  int64_t stride;  // elements from row to row of `rows` and `grad`
  T scale;         // log2(e) / temperature if shifted, else 1 / temperature
  T shift;         // if shifted, e = 2^(z_i.z_j scale - shift): a whole number, near `scale`
  bool shifted;
  const E* panels;    // [R / 48, depth, 48]: the rows, transposed panel by panel
  const E* rows;      // [R / kPack<E>, stride]: the rows; backward only
  const T* weight;    // [R]: w if shifted, else log w
  const T* u;         // [R]: g 2^shift exp(-lse) if shifted, else g; backward only
  const T* level;     // [R]: lse, +inf where the row takes no part; backward, unshifted only
  T* sum;             // [R]: sums of exponentials; forward only
  T* max;             // [R]: the largest exponent so far, -inf for none; forward, unshifted only
  int64_t grad_rows;  // rows from here on get no gradient
  T* grad;            // [grad_rows, stride]: temperature times the gradient; backward only
};

struct Block {
  int64_t first, rows;  // multiples of 48
  int64_t used;         // rows up to the last one that is not padding, rounded up to whole register tiles
};

// Elements (of type T) of the scratch memory one call needs: a block, and for pairs also the block and its transpose
// rounded to pairs, in half as many elements each.
template <class E>
constexpr int64_t kScratch = kPack<E> * kMaxBlock * kMaxBlock;

template <class E>
struct Tiles {
  // Both add what the pair (i, j) contributes to the rows of i and, unless j is i or gets no gradient, to those of j.
  // `kept` [i.rows, j.rows], if not null and shifted: forward leaves e there, and backward takes it from there instead
  // of forming it again.
  void (*forward)(const Problem<E>& problem, Block i, Block j, Sum<E>* scratch, Sum<E>* kept);
  void (*backward)(const Problem<E>& problem, Block i, Block j, Sum<E>* scratch, const Sum<E>* kept);
};

// The fastest version this processor can run; null for pairs of bfloat16 where it has no instructions for them.
template <class E>
const Tiles<E>* tiles();

}  // namespace cpu
}  // namespace allnc
