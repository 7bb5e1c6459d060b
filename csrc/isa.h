// The CPU kernel files are compiled once per instruction set, each into its own namespace.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(MEGARUBRIC_ISA)
#error "define MEGARUBRIC_ISA: baseline, avx2 or avx512"
#endif
