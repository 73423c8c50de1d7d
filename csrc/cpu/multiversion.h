// ALLNC_MULTIVERSION: compile a function for AVX-512, AVX2 and the baseline, and let the loader choose.
//
// One binary then runs on every x86-64 and uses the vector units that are there. Put it on the function that holds
// the hot loops; what it calls must be inlined into it (ALLNC_INLINE), because a plain call, or a lambda given to
// parallel_for, is compiled once for the baseline. Needs GCC 12 and glibc; elsewhere the baseline is compiled.
#pragma once

#include <cstdint>  // defines __GLIBC__ where it is glibc

#define ALLNC_INLINED __attribute__((always_inline))  // of a lambda
#define ALLNC_INLINE inline ALLNC_INLINED

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ALLNC_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ALLNC_MULTIVERSION
#endif
