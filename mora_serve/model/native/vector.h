/* One register of floats at a time, in GCC's vector extension: VL of them, 16 with AVX-512, 8 with
   AVX2, 4 with NEON or SSE. BF16 says whether `real` is bfloat16 (then the processor multiplies
   pairs of them) or float. Included once by each target_*.c. */

#ifndef VECTOR_H
#define VECTOR_H

#include <math.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "mora.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(AVX512)
#define VL 16
#elif defined(AVX2)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));

#if BF16
typedef uint16_t real;
#else
typedef float real;
#endif

/* The 16 values of NF4, Dettmers et al. 2023 (arXiv 2305.14314), appendix E. */
static const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/* The values of INT4's codes: offsets make up for another zero than 8. */
static const float INT4_VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

INLINE const float *code_values(int kind)
{
    return kind == INT4 ? INT4_VALUES : NF4_VALUES;
}

/* Asks for `bytes` of memory that will be read soon; addresses beyond an array do no harm. */
INLINE void fetch(const void *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)p + i);
}

INLINE vf splat(float x)
{
    return x - (vf){0};
}

INLINE vf load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, vf x)
{
    memcpy(p, &x, sizeof x);
}

/* a * b + c, rounded once where the processor can. Left to the compiler, the code around would
   decide whether it is rounded once or twice, and so a row's bits could depend on how many rows
   there are. */
INLINE vf multiply_add(vf a, vf b, vf c)
{
#if defined(AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* The sums of four registers, each in the same fixed order. */
#if defined(AVX512)
INLINE void sum4(vf a, vf b, vf c, vf d, float out[4])
{
    __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
    __m512 xy = _mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y);
    __m512 zw = _mm512_unpacklo_ps(z, w) + _mm512_unpackhi_ps(z, w);
    __m512d low = _mm512_unpacklo_pd((__m512d)xy, (__m512d)zw);
    __m512d high = _mm512_unpackhi_pd((__m512d)xy, (__m512d)zw);
    __m512 all = (__m512)low + (__m512)high;
    __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
    _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#elif defined(AVX2)
INLINE void sum4(vf a, vf b, vf c, vf d, float out[4])
{
    __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
}
#else
INLINE void sum4(vf a, vf b, vf c, vf d, float out[4])
{
    vf all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        float x[VL];
        memcpy(x, &all[i], sizeof x);
        for (int n = VL / 2; n; n /= 2)
            for (int j = 0; j < n; j++)
                x[j] += x[j + n];
        out[i] = x[0];
    }
}
#endif

INLINE float sum(vf x)
{
    float out[4];
    sum4(x, x, x, x, out);
    return out[0];
}

INLINE float greatest(vf x)
{
#if defined(AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float a[VL], most;
    memcpy(a, &x, sizeof a);
    most = a[0];
    for (int i = 1; i < VL; i++)
        most = a[i] > most ? a[i] : most;
    return most;
}

INLINE vf select_vf(vi mask, vf yes, vf no)
{
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}

#if BF16

INLINE vf load_real(const real *p)
{
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf)_mm512_slli_epi32(x, 16);
}

INLINE float to_float(real x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE void store_real(real *p, vf x)
{
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &y, sizeof y);
}

INLINE real from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (real)((bits >> 16) | 0x40);
    return (real)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#else

INLINE vf load_real(const real *p)
{
    return load(p);
}

INLINE float to_float(real x)
{
    return x;
}

INLINE void store_real(real *p, vf x)
{
    store(p, x);
}

INLINE real from_float(float x)
{
    return x;
}

#endif

/* e^x to 2 units in the last place, after Cephes' expf; 0 far below, no overflow above. */
INLINE vf exp_vf(vf x)
{
    x = select_vf(x > 88.0f, splat(88.0f), x);
    vi under = x < -87.0f;
    x = select_vf(under, splat(-87.0f), x);
    vf shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    vf n = shifted - 12582912.0f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return select_vf(under, splat(0.0f), y * (vf)power);
}

INLINE vf silu(vf x)
{
    return x / (exp_vf(-x) + 1.0f);
}

#endif
