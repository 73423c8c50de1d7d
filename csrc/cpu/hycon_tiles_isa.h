// The tile code of hycon_tiles.h for one instruction set. Included several times by hycon_tiles.cpp, each time with
// ALLNC_ISA (a namespace), ALLNC_VECTOR_BYTES, ALLNC_TILE_ROWS and, where there are instructions for pairs of bfloat16,
// ALLNC_BFLOAT16_PAIRS defined and, around it, the compiler's target set: no include guard, and nothing from the
// standard library, whose inlined functions would be shared between targets.
//
// All products are register tiles of ALLNC_TILE_ROWS x 3 vectors. In the forward pass a tile of dot products goes
// through the exponential while it is in the L1 cache, so S is never stored. In the backward pass the block of K is
// stored once (scratch, in the L2 cache) and multiplied with both sides' rows: dz_I += K z_J, dz_J += K^T z_I.
// Of pairs of bfloat16 the products alone are made, K being rounded for its products; the rest is float32.

#define ALLNC_INLINE_TILE inline __attribute__((always_inline))
#define ALLNC_NO_INLINE __attribute__((noinline))
#define ALLNC_UNROLL _Pragma("GCC unroll 16")

namespace allnc {
namespace cpu {
namespace ALLNC_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(ALLNC_VECTOR_BYTES), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(ALLNC_VECTOR_BYTES), may_alias));
  static constexpr int kLanes = ALLNC_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(ALLNC_VECTOR_BYTES), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(ALLNC_VECTOR_BYTES), may_alias));
  static constexpr int kLanes = ALLNC_VECTOR_BYTES / 8;
};

#if defined(ALLNC_BFLOAT16_PAIRS)
template <>
struct Simd<BFloat16Pair> {
  typedef BFloat16Pair Vector __attribute__((vector_size(ALLNC_VECTOR_BYTES), may_alias));
};
#endif

template <class T>
using Vector = typename Simd<T>::Vector;

constexpr int kTileRows = ALLNC_TILE_ROWS;
static_assert(kWholeTiles % kTileRows == 0 && kWholeTiles % 2 == 0, "blocks end with whole tiles, of whole pairs");
constexpr int kTileVectors = 3;
template <class T>
constexpr int kTileColumns = kTileVectors * Simd<T>::kLanes;

template <class T>
ALLNC_INLINE_TILE Vector<T>& at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}

template <class T>
ALLNC_INLINE_TILE const Vector<T>& at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <class T>
ALLNC_INLINE_TILE Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // minus zero: the only such operation that is the identity for every x, and so no operation
}

template <class T>
ALLNC_INLINE_TILE T horizontal_sum(Vector<T> x) {
  T sum = 0;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) sum += x[lane];
  return sum;
}

template <class E>
ALLNC_INLINE_TILE Vector<Sum<E>> multiply_add(Vector<E> a, Vector<E> b, Vector<Sum<E>> sum) {
  return a * b + sum;
}

#if defined(ALLNC_BFLOAT16_PAIRS)
template <>
ALLNC_INLINE_TILE Vector<float> multiply_add<BFloat16Pair>(
    Vector<BFloat16Pair> a, Vector<BFloat16Pair> b, Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// 2^x for x <= 127 (1023), 0 below 2^-126 (2^-1022) and for -inf; NaN gives anything. Measured error: at most 1.04
// units in the last place, 1.3 without FMA (float and double, 4e7 points in [-126, 127] and near 0).
template <class T>
ALLNC_INLINE_TILE Vector<T> exp2(Vector<T> x) {
  using S = Exp2<T>;
  const Vector<T> rounded = x + S::kRound;
  const Vector<T> f = x - (rounded - S::kRound);
  Vector<T> q = broadcast<T>(S::kExp2[S::kDegree - 1]);
  ALLNC_UNROLL for (int k = S::kDegree - 2; k >= 0; --k) q = q * f + S::kExp2[k];
  q = q * f + T(1);
  using Bits = typename Simd<T>::Bits;
  const Vector<T> scaled =
      reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(q) + (reinterpret_cast<Bits>(rounded) << S::kMantissa));
  return x < S::kLowest ? Vector<T>{} : scaled;
}

// 2^(x scale - shift) for a whole `shift`, where the exponent is known to be in [-126, 127] (-1022, 1023). With FMA
// the exponent is split before it is rounded, so that its error does not grow with it.
template <class T>
ALLNC_INLINE_TILE Vector<T> exp2_shifted(Vector<T> x, T scale, T shift) {
  using S = Exp2<T>;
#if defined(__FMA__) || defined(__aarch64__)
  const T round = S::kRound - shift;
  const Vector<T> rounded = x * scale + round;
  const Vector<T> f = x * scale - (rounded - round);
#else  // a rounded product: near x = 1, where exponentials are largest, its digits would cancel
  const Vector<T> exponent = (x - T(1)) * scale + (scale - shift);
  const Vector<T> rounded = exponent + S::kRound;
  const Vector<T> f = exponent - (rounded - S::kRound);
#endif
  Vector<T> q = broadcast<T>(S::kExp2[S::kDegree - 1]);
  ALLNC_UNROLL for (int k = S::kDegree - 2; k >= 0; --k) q = q * f + S::kExp2[k];
  q = q * f + T(1);
  using Bits = typename Simd<T>::Bits;
  return reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(q) + (reinterpret_cast<Bits>(rounded) << S::kMantissa));
}

template <class T>
ALLNC_INLINE_TILE Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

template <class E>
ALLNC_INLINE_TILE const E* packed(const Problem<E>& p, int64_t row) {
  return p.panels + row / kPanel * kPanel * p.depth + row % kPanel;
}

// One register tile: out_rv (+)= sum_k a_rk b_kv, v over kVectors vectors, a_rk = a[r * kRowStep + k * a_step].
// What it adds to is far away where D is large: asked for at the start, needed at the end.
// Not inlined: constants of a caller's loop would take registers, and one spilled sum halves the speed.
template <class E, int kVectors, int64_t kRowStep, bool kAccumulate>
ALLNC_NO_INLINE void multiply(
    const E* a, int64_t a_step, const E* b, int64_t b_step, int64_t depth, Sum<E>* out, int64_t out_step) {
  using T = Sum<E>;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> sum[kTileRows][kVectors];
  ALLNC_UNROLL for (int r = 0; r < kTileRows; ++r) {
    ALLNC_UNROLL for (int v = 0; v < kVectors; ++v) {
      if (kAccumulate) __builtin_prefetch(out + r * out_step + v * kLanes, 1);
      sum[r][v] = Vector<T>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector<E> part[kVectors];
    ALLNC_UNROLL for (int v = 0; v < kVectors; ++v) part[v] = at(b + v * kLanes);
    ALLNC_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const Vector<E> factor = broadcast(a[r * kRowStep]);
      ALLNC_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add<E>(factor, part[v], sum[r][v]);
    }
  }
  ALLNC_UNROLL for (int r = 0; r < kTileRows; ++r) {
    ALLNC_UNROLL for (int v = 0; v < kVectors; ++v) {
      Vector<T>& at_out = at(out + r * out_step + v * kLanes);
      at_out = kAccumulate ? at_out + sum[r][v] : sum[r][v];
    }
  }
}

// out [kTileRows, kTileColumns] = z_{row + r} . z_{column + v}
template <class E>
ALLNC_INLINE_TILE void dot_products(const Problem<E>& p, int64_t row, int64_t column, Sum<E>* out, int64_t out_step) {
  multiply<E, kTileVectors, 1, false>(packed(p, row), kPanel, packed(p, column), kPanel, p.depth, out, out_step);
}

// x where column != row, else `otherwise`; `distance` is the row minus the first lane's column.
template <class T>
ALLNC_INLINE_TILE Vector<T> replace_self(Vector<T> x, int64_t distance, T otherwise) {
  if (distance >= 0 && distance < Simd<T>::kLanes) x[distance] = otherwise;
  return x;
}

// Forward, shifted: sum_i += e_ij w_j, and sum_j += e_ij w_i off the diagonal, with e = 2^(z_i.z_j scale - shift).
template <class E, bool kDiagonal, bool kKeep>
void sum_shifted(const Problem<E>& p, Block i, Block j, Sum<E>* scratch, Sum<E>* kept) {
  using T = Sum<E>;
  constexpr int kLanes = Simd<T>::kLanes;
  const T scale = p.scale, shift = p.shift;
  T* row_sums = scratch;                   // [i.used, lanes]: added up over the lanes at the end
  T* tile = scratch + kMaxBlock * kLanes;  // [tile rows, tile columns], or a part of `kept`
  const int64_t step = kKeep ? j.rows : kTileColumns<T>;
  for (int64_t k = 0; k < i.used; ++k) at(row_sums + k * kLanes) = Vector<T>{};
  for (int64_t column = j.first; column < j.first + j.rows; column += kTileColumns<T>) {
    Vector<T> column_sums[kTileVectors] = {}, column_weight[kTileVectors];
    ALLNC_UNROLL for (int v = 0; v < kTileVectors; ++v) column_weight[v] = at(p.weight + column + v * kLanes);
    for (int64_t row = i.first; row < i.first + i.used; row += kTileRows) {
      if (kKeep) tile = kept + (row - i.first) * step + column - j.first;
      dot_products(p, row, column, tile, step);
      for (int r = 0; r < kTileRows; ++r) {
        const T row_weight = p.weight[row + r];
        Vector<T> row_sum = at(row_sums + (row - i.first + r) * kLanes);
        ALLNC_UNROLL for (int v = 0; v < kTileVectors; ++v) {
          Vector<T>& x = at(tile + r * step + v * kLanes);
          Vector<T> e = exp2_shifted<T>(x, scale, shift);
          if (kDiagonal) e = replace_self<T>(e, row + r - column - v * kLanes, 0);
          if (kKeep) x = e;
          row_sum += e * column_weight[v];
          column_sums[v] += e * row_weight;
        }
        at(row_sums + (row - i.first + r) * kLanes) = row_sum;
      }
    }
    if (kDiagonal) continue;
    for (int v = 0; v < kTileVectors; ++v) at(p.sum + column + v * kLanes) += column_sums[v];
  }
  for (int64_t k = 0; k < i.used; ++k) p.sum[i.first + k] += horizontal_sum<T>(at(row_sums + k * kLanes));
}

// Unshifted, exponents are x = S + log w in natural units, rounded in one and the same way in both passes: where one
// term rules a row, lse is x itself and the softmax weight exp(x - lse) is exactly 1, however large x.
template <class T, class W>
ALLNC_INLINE_TILE Vector<T> exponent(Vector<T> dot, T scale, W log_weight) {
  return dot * scale + log_weight;
}

template <class T>
ALLNC_INLINE_TILE Vector<T> exp(Vector<T> x) {
  return exp2<T>(x * T(1.44269504088896340736));
}

// Merges the dot products of one row into its running maximum and sum.
template <class T>
ALLNC_INLINE_TILE void merge_row(const T* dot, const T* log_weight, int64_t columns, T scale, T& max, T& sum) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> largest = broadcast(max);
  for (int64_t k = 0; k < columns; k += kLanes) {
    largest = maximum<T>(largest, exponent<T>(at(dot + k), scale, at(log_weight + k)));
  }
  T top = max;
  for (int lane = 0; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
  if (top == -__builtin_inf()) return;  // only weights of zero
  Vector<T> part = {};
  for (int64_t k = 0; k < columns; k += kLanes) {
    part += exp<T>(exponent<T>(at(dot + k), scale, at(log_weight + k)) - top);
  }
  sum = sum * exp<T>(broadcast(max - top))[0] + horizontal_sum<T>(part);
  max = top;
}

// The same for a vector of columns; dot has kMaxBlock elements from row to row.
template <class T>
ALLNC_INLINE_TILE void merge_columns(const T* dot, const T* log_weight, int64_t rows, T scale, T* max, T* sum) {
  const Vector<T> before = at(max);
  Vector<T> top = before;
  for (int64_t k = 0; k < rows; ++k) {
    top = maximum<T>(top, exponent<T>(at(dot + k * kMaxBlock), scale, log_weight[k]));
  }
  at(max) = top;
  top = top == -__builtin_inf() ? Vector<T>{} : top;  // only weights of zero: subtract a finite number
  Vector<T> part = at(sum) * exp<T>(before - top);
  for (int64_t k = 0; k < rows; ++k) {
    part += exp<T>(exponent<T>(at(dot + k * kMaxBlock), scale, log_weight[k]) - top);
  }
  at(sum) = part;
}

// Forward, unshifted: as sum_shifted, relative to each row's running maximum; keeps nothing.
template <class E, bool kDiagonal>
void sum_unshifted(const Problem<E>& p, Block i, Block j, Sum<E>* scratch, Sum<E>*) {
  using T = Sum<E>;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t column = 0; column < j.rows; column += kTileColumns<T>) {
    for (int64_t row = 0; row < i.used; row += kTileRows) {
      dot_products(p, i.first + row, j.first + column, scratch + row * kMaxBlock + column, kMaxBlock);
    }
  }
  if (kDiagonal) {
    for (int64_t k = 0; k < i.used; ++k) scratch[k * kMaxBlock + k] = -__builtin_inf();
  }
  for (int64_t row = i.first; row < i.first + i.used; ++row) {
    merge_row(scratch + (row - i.first) * kMaxBlock, p.weight + j.first, j.rows, p.scale, p.max[row], p.sum[row]);
  }
  if (kDiagonal) return;
  for (int64_t column = j.first; column < j.first + j.rows; column += kLanes) {
    merge_columns(scratch + column - j.first, p.weight + i.first, i.used, p.scale, p.max + column, p.sum + column);
  }
}

// Backward: K_ij = e_ij (u_i w_j + u_j w_i) to scratch [i.used, kMaxBlock], 0 where row and column are the same.
template <class E, bool kShifted, bool kDiagonal>
void coefficients(const Problem<E>& p, Block i, Block j, Sum<E>* scratch) {
  using T = Sum<E>;
  constexpr int kLanes = Simd<T>::kLanes;
  const T scale = p.scale, shift = p.shift;
  for (int64_t column = j.first; column < j.first + j.rows; column += kTileColumns<T>) {
    for (int64_t row = i.first; row < i.first + i.used; row += kTileRows) {
      T* tile = scratch + (row - i.first) * kMaxBlock + column - j.first;
      dot_products(p, row, column, tile, kMaxBlock);
      for (int r = 0; r < kTileRows; ++r) {
        const T u = p.u[row + r], weight = p.weight[row + r], level = p.level[row + r];
        ALLNC_UNROLL for (int v = 0; v < kTileVectors; ++v) {
          const int64_t first = column + v * kLanes;
          const Vector<T> column_u = at(p.u + first), column_weight = at(p.weight + first);
          Vector<T> x = at(tile + r * kMaxBlock + v * kLanes);
          if (kShifted) {
            x = exp2_shifted<T>(x, scale, shift) * (u * column_weight + weight * column_u);
          } else {
            // Each exponential is a softmax weight, at most 1: weights and levels are in the exponent.
            x = u * exp<T>(exponent<T>(x, scale, column_weight) - level) +
                column_u * exp<T>(exponent<T>(x, scale, weight) - at(p.level + first));
          }
          if (kDiagonal) x = replace_self<T>(x, row + r - first, 0);
          at(tile + r * kMaxBlock + v * kLanes) = x;
        }
      }
    }
  }
}

// The same from the exponentials that the forward pass kept, 0 where row and column are the same.
template <class E>
void coefficients_of_kept(const Problem<E>& p, Block i, Block j, const Sum<E>* kept, Sum<E>* scratch) {
  using T = Sum<E>;
  for (int64_t row = 0; row < i.used; ++row) {
    const T u = p.u[i.first + row], weight = p.weight[i.first + row];
    for (int64_t column = 0; column < j.rows; column += Simd<T>::kLanes) {
      const Vector<T> factor = u * at(p.weight + j.first + column) + weight * at(p.u + j.first + column);
      at(scratch + row * kMaxBlock + column) = at(kept + row * j.rows + column) * factor;
    }
  }
}

// K as products take it. K_rk = rows[r * kRowStep + k], its transpose K_kr = columns[r + k * kMaxBlock], in E.
template <class E>
struct Factors {
  static constexpr int64_t kRowStep = kMaxBlock / kPack<E>;
  const E* rows;
  const E* columns;
};

template <class E>
ALLNC_INLINE_TILE Factors<E> make_factors(Block, Block, Sum<E>* scratch) {
  return {scratch, scratch};
}

#if defined(ALLNC_BFLOAT16_PAIRS)
// K rounded to bfloat16, behind K itself: in pairs along its rows and in pairs along its columns.
template <>
ALLNC_INLINE_TILE Factors<BFloat16Pair> make_factors<BFloat16Pair>(Block i, Block j, float* scratch) {
  using Pairs = Vector<BFloat16Pair>;
  typedef uint16_t Half __attribute__((vector_size(ALLNC_VECTOR_BYTES / 2), may_alias));  // one bfloat16 of each pair
  constexpr int kLanes = Simd<float>::kLanes;
  BFloat16Pair* const rows = reinterpret_cast<BFloat16Pair*>(scratch + kMaxBlock * kMaxBlock);
  BFloat16Pair* const columns = rows + kMaxBlock * kMaxBlock / 2;
  for (int64_t row = 0; row < i.used; row += 2) {
    const float* const first = scratch + row * kMaxBlock;
    const float* const second = first + kMaxBlock;
    BFloat16Pair* const first_rounded = rows + row * kMaxBlock / 2;
    BFloat16Pair* const second_rounded = first_rounded + kMaxBlock / 2;
    for (int64_t column = 0; column < j.rows; column += kLanes) {
      const Half x = (Half)_mm512_cvtneps_pbh((__m512)at(first + column));
      const Half y = (Half)_mm512_cvtneps_pbh((__m512)at(second + column));
      *reinterpret_cast<Half*>(first_rounded + column / 2) = x;
      *reinterpret_cast<Half*>(second_rounded + column / 2) = y;
      at(columns + row / 2 * kMaxBlock + column) =
          __builtin_convertvector(x, Pairs) | (__builtin_convertvector(y, Pairs) << 16);
    }
  }
  return {rows, columns};
}
#endif

// grad of the rows `out`, in kVectors vectors of columns from `column` on, += K times the rows `in`, where
// K_rk = coefficient[r * kRowStep + k * step].
template <class E, int kVectors, int64_t kRowStep>
void product_columns(const Problem<E>& p, Block out, Block in, const E* coefficient, int64_t step, int64_t column) {
  for (int64_t row = 0; row < out.used; row += kTileRows) {
    multiply<E, kVectors, kRowStep, true>(
        coefficient + row * kRowStep, step, p.rows + in.first / kPack<E> * p.stride + column, p.stride,
        in.used / kPack<E>, p.grad + (out.first + row) * p.stride + column, p.stride);
  }
}

template <class E, int64_t kRowStep>
void product(const Problem<E>& p, Block out, Block in, const E* coefficient, int64_t step) {
  constexpr int kLanes = Simd<Sum<E>>::kLanes;
  int64_t column = 0;
  for (; column + 2 * kLanes < p.dim; column += 3 * kLanes) {
    product_columns<E, 3, kRowStep>(p, out, in, coefficient, step, column);
  }
  if (column + kLanes < p.dim) {
    product_columns<E, 2, kRowStep>(p, out, in, coefficient, step, column);
  } else if (column < p.dim) {
    product_columns<E, 1, kRowStep>(p, out, in, coefficient, step, column);
  }
}

template <class E>
void forward(const Problem<E>& p, Block i, Block j, Sum<E>* scratch, Sum<E>* kept) {
  const bool diagonal = i.first == j.first;
  if (!p.shifted) {
    (diagonal ? sum_unshifted<E, true> : sum_unshifted<E, false>)(p, i, j, scratch, kept);
  } else if (kept) {
    (diagonal ? sum_shifted<E, true, true> : sum_shifted<E, false, true>)(p, i, j, scratch, kept);
  } else {
    (diagonal ? sum_shifted<E, true, false> : sum_shifted<E, false, false>)(p, i, j, scratch, kept);
  }
}

template <class E>
void backward(const Problem<E>& p, Block i, Block j, Sum<E>* scratch, const Sum<E>* kept) {
  const bool diagonal = i.first == j.first;
  if (!p.shifted) {
    (diagonal ? coefficients<E, false, true> : coefficients<E, false, false>)(p, i, j, scratch);
  } else if (kept) {
    coefficients_of_kept(p, i, j, kept, scratch);
  } else {
    (diagonal ? coefficients<E, true, true> : coefficients<E, true, false>)(p, i, j, scratch);
  }
  const Factors<E> k = make_factors<E>(i, j, scratch);
  product<E, Factors<E>::kRowStep>(p, i, j, k.rows, 1);
  if (!diagonal && j.first < p.grad_rows) product<E, 1>(p, j, i, k.columns, kMaxBlock);
}

template <class E>
Tiles<E> make_tiles() {
  return {&forward<E>, &backward<E>};
}

}  // namespace ALLNC_ISA
}  // namespace cpu
}  // namespace allnc

#undef ALLNC_INLINE_TILE
#undef ALLNC_NO_INLINE
#undef ALLNC_UNROLL
