#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TARGET avx2
#define BF16 0
#define AVX2 1
#include "target.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
