#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#define TARGET avx512bf16
#define BF16 1
#define AVX512 1
#include "target.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
