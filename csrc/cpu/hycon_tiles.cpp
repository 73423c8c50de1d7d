// Compiles hycon_tiles_isa.h for each instruction set and chooses one at run time.
//
// target_clones would not do: the code is written in vectors of a fixed width and in inlined helpers, which must be
// compiled for the instruction set of their caller.

#include "hycon_tiles.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(__GNUC__)
#error "csrc/cpu needs the vector extensions of GCC or Clang"
#endif

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ALLNC_ISA avx512bf16
#define ALLNC_VECTOR_BYTES 64
#define ALLNC_TILE_ROWS 8
#define ALLNC_BFLOAT16_PAIRS
#include "hycon_tiles_isa.h"
#undef ALLNC_ISA
#undef ALLNC_VECTOR_BYTES
#undef ALLNC_TILE_ROWS
#undef ALLNC_BFLOAT16_PAIRS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ALLNC_ISA avx512
#define ALLNC_VECTOR_BYTES 64
#define ALLNC_TILE_ROWS 8
#include "hycon_tiles_isa.h"
#undef ALLNC_ISA
#undef ALLNC_VECTOR_BYTES
#undef ALLNC_TILE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ALLNC_ISA avx2
#define ALLNC_VECTOR_BYTES 32
#define ALLNC_TILE_ROWS 4
#include "hycon_tiles_isa.h"
#undef ALLNC_ISA
#undef ALLNC_VECTOR_BYTES
#undef ALLNC_TILE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// 128 bits: what x86-64 (16 registers) and AArch64 (32 registers) always have.
#define ALLNC_ISA baseline
#define ALLNC_VECTOR_BYTES 16
#if defined(__aarch64__)
#define ALLNC_TILE_ROWS 8
#else
#define ALLNC_TILE_ROWS 4
#endif
#include "hycon_tiles_isa.h"

namespace allnc {
namespace cpu {

namespace {

#if defined(__x86_64__)
// Whether the processor has `isa`. ALLNC_CPU_ISA names the highest set to use, so that the tests can reach every
// version on one machine.
enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

bool has(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  if (const char* limit = std::getenv("ALLNC_CPU_ISA")) {
    for (int lower = kBaseline; lower < isa; ++lower) {
      if (std::strcmp(limit, kNames[lower]) == 0) return false;
    }
  }
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case kAvx512: return avx512;
    case kAvx2: return avx2;
    default: return true;
  }
}
// Whether pairs of bfloat16 are multiplied faster than their values as float32 would be. Measured, forward and backward
// at N = 8192, D = 128: 1.6 times as fast on an AMD EPYC, 0.6 times on an Intel Xeon (Sapphire Rapids).
// ALLNC_CPU_ISA=avx512bf16 asks for them on any processor that has them.
bool pairs_are_fast() {
  const char* asked = std::getenv("ALLNC_CPU_ISA");
  return __builtin_cpu_is("amd") || (asked != nullptr && std::strcmp(asked, "avx512bf16") == 0);
}
#endif

template <class E>
Tiles<E> choose() {
#if defined(__x86_64__)
  if (has(kAvx512)) return avx512::make_tiles<E>();
  if (has(kAvx2)) return avx2::make_tiles<E>();
#endif
  return baseline::make_tiles<E>();
}

}  // namespace

template <class E>
const Tiles<E>* tiles() {
  static const Tiles<E> chosen = choose<E>();
  return &chosen;
}

template const Tiles<float>* tiles<float>();
template const Tiles<double>* tiles<double>();

template <>
const Tiles<BFloat16Pair>* tiles<BFloat16Pair>() {
#if defined(__x86_64__)
  static const Tiles<BFloat16Pair> chosen = avx512bf16::make_tiles<BFloat16Pair>();
  static const bool available = has(kAvx512Bf16) && pairs_are_fast();
  return available ? &chosen : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace cpu
}  // namespace allnc
