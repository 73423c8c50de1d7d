// Compiles hycon_tiles_isa.h for each instruction set and chooses one at run time.
//
// target_clones would not do: the code is written in vectors of a fixed width and in inlined helpers, which must be
// compiled for the instruction set of their caller.

#include "hycon_tiles.h"

#include <cstdlib>
#include <cstring>

#if !defined(__GNUC__)
#error "csrc/cpu needs the vector extensions of GCC or Clang"
#endif

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
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

template <class T>
Tiles<T> choose() {
#if defined(__x86_64__)
  // ALLNC_CPU_ISA takes instruction sets away, so that the tests can reach every version on one machine.
  const char* limit = std::getenv("ALLNC_CPU_ISA");
  const bool no_avx512 = limit != nullptr && std::strcmp(limit, "avx512") != 0;
  const bool no_avx2 = no_avx512 && std::strcmp(limit, "avx2") != 0;
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return avx512::make_tiles<T>();
  }
  if (!no_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::make_tiles<T>();
  }
#endif
  return baseline::make_tiles<T>();
}

}  // namespace

template <class T>
const Tiles<T>& tiles() {
  static const Tiles<T> chosen = choose<T>();
  return chosen;
}

template const Tiles<float>& tiles<float>();
template const Tiles<double>& tiles<double>();

}  // namespace cpu
}  // namespace allnc
