/* Products of a few rows with a weight: x [rows][in] and W [out][in] give y [rows][out] in float.

   A row's result is made by the same operations in the same order whatever the other rows are and
   however many: equal rows of a batch, or of two batches, give equal bits.

   A weight is stored in tiles of 16 outputs, one or several registers wide (strips), so that lanes
   are outputs and nothing has to be summed across them. A tile is made of groups of 8 inputs:

   - NF4, 64 bytes: 32-bit word o is output o, its bits 16 p + 4 j .. + 3 the code of input 2 j + p.
     absmax lies beside: 16 floats for each 64 inputs. Each block of 64 is summed on its own and
     then multiplied by its absmax, which is exact where a dequantised weight in bfloat16 would be
     rounded.
   - TILED, 256 bytes: bfloat16, whatever `real` is. Word 16 j + o is output o, its lower half input
     2 j, its upper half input 2 j + 1. Where the number of outputs is not a multiple of 16, the
     last tile is filled up with zeros.

   DENSE weights are rows of `real`: those that no tile can hold, and the adapters' A. */

#ifndef PRODUCT_H
#define PRODUCT_H

#include "vector.h"

#define STRIPS (LANES / VL) /* registers across a tile */

INLINE size_t group_bytes(int kind)
{
    return kind == NF4 ? NF4_GROUP : TILED_GROUP;
}

/* How many rows share the decoding of a strip, and how many strips go together where there are
   fewer: as many sums as there are registers for, and enough not to wait for each other. */
#if defined(AVX512)
#define TILE_ROWS 8
#else
#define TILE_ROWS 4
#endif
#define CHAINS 4

#if BF16

#define TABLE __m512i
INLINE __m512i nf4_table(void)
{
    uint16_t table[32];
    for (int i = 0; i < 32; i++)
        table[i] = from_float(NF4_VALUES[i % 16]);
    return _mm512_loadu_si512(table);
}

/* part[r] += x[r][k..k + 8] . w[0..8], one strip of outputs at once. The shuffle takes the low
   five bits of each 16-bit lane, and the table is there twice, so the bit above a code does not
   matter. */
INLINE void group_product(int kind, int R, vf part[], const real *const x[], size_t k,
                          const uint8_t *codes, __m512i table)
{
    __m512i packed = _mm512_loadu_si512(codes);
    UNROLL for (int j = 0; j < 4; j++) {
        __m512i shifted = j ? _mm512_srli_epi16(packed, 4 * j) : packed;
        __m512bh w = (__m512bh)(kind == NF4 ? _mm512_permutexvar_epi16(shifted, table)
                                            : _mm512_loadu_si512(codes + 64 * j));
        UNROLL for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x[r] + k + 2 * j, sizeof pair);
            part[r] = (vf)_mm512_dpbf16_ps((__m512)part[r], w, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
}

#else

/* The NF4 weights w[input] of one strip of outputs for 8 inputs. */
#if defined(AVX512)
#define TABLE vf
INLINE vf nf4_table(void)
{
    return load(NF4_VALUES);
}

INLINE void decode_group(const uint8_t *codes, TABLE table, vf w[8])
{
    __m512i packed = _mm512_loadu_si512(codes);
    UNROLL for (int i = 0; i < 8; i++)
        w[i] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4 * (i / 2) + 16 * (i % 2)),
                                         (__m512)table);
}
#elif defined(AVX2)
/* A table of 16 floats is too long for one shuffle of floats, but not for four of bytes: byte p of
   every value. */
typedef struct {
    __m256i plane[4];
} Planes;
#define TABLE Planes
INLINE Planes nf4_table(void)
{
    uint32_t bits[16];
    Planes table;
    memcpy(bits, NF4_VALUES, sizeof bits);
    UNROLL for (int p = 0; p < 4; p++) {
        uint8_t bytes[16];
        UNROLL for (int i = 0; i < 16; i++)
            bytes[i] = bits[i] >> 8 * p;
        __m128i half;
        memcpy(&half, bytes, sizeof half);
        table.plane[p] = _mm256_broadcastsi128_si256(half);
    }
    return table;
}

/* Four inputs from the codes in the low halves of 32 bytes; within 128 bits, 4 outputs of each. */
INLINE void decode_half(__m256i codes, TABLE table, vf *w0, vf *w1, vf *w2, vf *w3)
{
    __m256i b0 = _mm256_shuffle_epi8(table.plane[0], codes);
    __m256i b1 = _mm256_shuffle_epi8(table.plane[1], codes);
    __m256i b2 = _mm256_shuffle_epi8(table.plane[2], codes);
    __m256i b3 = _mm256_shuffle_epi8(table.plane[3], codes);
    __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
    *w0 = (vf)_mm256_unpacklo_epi16(low, high);
    *w1 = (vf)_mm256_unpackhi_epi16(low, high);
    low = _mm256_unpackhi_epi8(b0, b1), high = _mm256_unpackhi_epi8(b2, b3);
    *w2 = (vf)_mm256_unpacklo_epi16(low, high);
    *w3 = (vf)_mm256_unpackhi_epi16(low, high);
}

INLINE void decode_group(const uint8_t *codes, TABLE table, vf w[8])
{
    /* from 4 bytes for each output to 4 outputs for each byte */
    const __m256i by_input = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i low = _mm256_set1_epi8(15);
    __m256i packed = _mm256_loadu_si256((const __m256i *)codes);
    packed = _mm256_shuffle_epi8(packed, by_input);
    decode_half(_mm256_and_si256(packed, low), table, &w[0], &w[4], &w[1], &w[5]);
    packed = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    decode_half(packed, table, &w[2], &w[6], &w[3], &w[7]);
}
#else
#define TABLE const float *
INLINE const float *nf4_table(void)
{
    return NF4_VALUES;
}

INLINE void decode_group(const uint8_t *codes, TABLE table, vf w[8])
{
    vu packed;
    memcpy(&packed, codes, sizeof packed);
    UNROLL for (int i = 0; i < 8; i++) {
        vf x = splat(0);
        UNROLL for (int n = 0; n < VL; n++)
            x[n] = table[packed[n] >> (4 * (i / 2) + 16 * (i % 2)) & 15];
        w[i] = x;
    }
}
#endif

INLINE void group_weights(int kind, const uint8_t *codes, TABLE table, vf w[8])
{
    if (kind == NF4) {
        decode_group(codes, table, w);
        return;
    }
    UNROLL for (int j = 0; j < 4; j++) {
        vu pair;
        memcpy(&pair, codes + j * LANES * 4, sizeof pair);
        w[2 * j] = (vf)(pair << 16);
        w[2 * j + 1] = (vf)(pair & 0xffff0000);
    }
}

INLINE void group_product(int kind, int R, vf part[], const real *const x[], size_t k,
                          const uint8_t *codes, TABLE table)
{
    vf w[8];
    group_weights(kind, codes, table, w);
    UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int r = 0; r < R; r++)
            part[r] = multiply_add(w[i], splat(x[r][k + i]), part[r]);
}

#endif

/* R rows times N neighbouring strips; strip n begins at codes + offset[n], absmax + scales[n]. */
INLINE void strip_rows(int kind, int R, int N, const real *x, size_t stride, const uint8_t *codes,
                       const float *absmax, const size_t offset[], const size_t scales[],
                       int columns, int fetching, float *y, size_t y_stride)
{
    TABLE table = nf4_table();
    vf total[CHAINS][TILE_ROWS], part[CHAINS][TILE_ROWS];
    const real *row[TILE_ROWS];
    const size_t group = group_bytes(kind), lines = group / STRIPS < 64 ? 1 : group / STRIPS / 64;
    const uint8_t *next = codes + offset[0] + (size_t)N * columns / 8 * group / STRIPS;
    size_t k = 0;
    UNROLL for (int r = 0; r < R; r++)
        row[r] = x + r * stride;
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            total[n][r] = splat(0);
    for (int block = 0; block < columns / BLOCK; block++) {
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int r = 0; r < R; r++)
                part[n][r] = splat(0);
        for (size_t end = k + BLOCK; k < end; k += 8)
            UNROLL for (int n = 0; n < N; n++) {
                if (fetching) { /* what comes next, in the order of memory (see dots) */
                    UNROLL for (size_t i = 0; i < lines; i++)
                        __builtin_prefetch(next += group / STRIPS / lines);
                }
                group_product(kind, R, part[n], row, k, codes + offset[n] + k / 8 * group, table);
            }
        UNROLL for (int n = 0; n < N; n++) {
            vf scale = kind == NF4 ? load(absmax + scales[n] + block * LANES) : splat(1);
            UNROLL for (int r = 0; r < R; r++)
                total[n][r] = multiply_add(part[n][r], scale, total[n][r]);
        }
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            store(y + r * y_stride + n * VL, total[n][r]);
}

/* How many neighbouring strips go together. */
static int strips_together(int rows)
{
    return rows <= 2 ? 4 : rows <= TILE_ROWS / 2 ? 2 : 1;
}

#if !BF16 && !defined(AVX512)

/* Where decoding takes as long as the product of a few rows, and registers are few, a block of a
   tile is decoded once for all rows: [64][16] floats, which stay in the nearest cache. The sums are
   those of strip_rows. */
#define DECODED_ROWS (VL == 8 ? 6 : 4)

INLINE void decode_block(int kind, const uint8_t *codes, float *w)
{
    TABLE table = nf4_table();
    for (int group = 0; group < BLOCK / 8; group++) {
        fetch(codes + (group + BLOCK / 8 * 2) * group_bytes(kind), group_bytes(kind));
        UNROLL for (int strip = 0; strip < STRIPS; strip++) {
            vf decoded[8];
            group_weights(kind, codes + group * group_bytes(kind) + strip * VL * 4, table, decoded);
            UNROLL for (int i = 0; i < 8; i++)
                store(w + (group * 8 + i) * LANES + strip * VL, decoded[i]);
        }
    }
}

/* y[r] += absmax * (x[r][0..64] . w), two strips of outputs of R rows. */
INLINE void decoded_rows(int kind, int R, const real *x, size_t stride, const float *w, const float *absmax,
                         float *y, size_t y_stride)
{
    vf part[DECODED_ROWS][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 2; n++)
            part[r][n] = splat(0);
    for (int k = 0; k < BLOCK; k++) {
        vf w0 = load(w + k * LANES), w1 = load(w + k * LANES + VL);
        UNROLL for (int r = 0; r < R; r++) {
            vf in = splat(x[r * stride + k]);
            part[r][0] = multiply_add(w0, in, part[r][0]);
            part[r][1] = multiply_add(w1, in, part[r][1]);
        }
    }
    UNROLL for (int n = 0; n < 2; n++) {
        vf scale = kind == NF4 ? load(absmax + n * VL) : splat(1);
        UNROLL for (int r = 0; r < R; r++) {
            float *out = y + r * y_stride + n * VL;
            store(out, multiply_add(part[r][n], scale, load(out)));
        }
    }
}

INLINE void decoded_product(int kind, const real *x, size_t stride, int rows, const uint8_t *codes,
                            const float *absmax, int columns, int tiles, float *y, size_t y_stride)
{
    _Alignas(64) float w[BLOCK * LANES];
    for (int r = 0; r < rows; r++)
        memset(y + r * y_stride, 0, tiles * LANES * sizeof(float));
    for (int tile = 0; tile < tiles; tile++, y += LANES)
        for (int k = 0; k < columns; k += BLOCK, codes += BLOCK / 8 * group_bytes(kind)) {
            decode_block(kind, codes, w);
            for (int strip = 0; strip < STRIPS; strip += 2)
                for (int r = 0, count; r < rows; r += count) {
                    const real *in = x + r * stride + k;
                    const float *scale = kind == NF4 ? absmax + strip * VL : NULL;
                    float *out = y + r * y_stride + strip * VL;
                    count = rows - r < DECODED_ROWS ? rows - r : DECODED_ROWS;
#define CASE(R)                                                                                    \
    case R:                                                                                        \
        decoded_rows(kind, R, in, stride, w + strip * VL, scale, out, y_stride);                   \
        break;
                    switch (count) {
                        CASE(1) CASE(2) CASE(3) CASE(4)
#if VL == 8
                        CASE(5) CASE(6)
#endif
                    }
#undef CASE
                }
            absmax += kind == NF4 ? LANES : 0;
        }
}

#endif

/* y [rows][16 tiles] = x [rows][columns] times neighbouring tiles. */
INLINE void kind_product(int kind, const real *x, size_t stride, int rows, const uint8_t *codes,
                         const float *absmax, int columns, int tiles, float *y, size_t y_stride)
{
#if !BF16 && !defined(AVX512)
    if (rows > TILE_ROWS) {
        decoded_product(kind, x, stride, rows, codes, absmax, columns, tiles, y, y_stride);
        return;
    }
#endif
    for (int from = 0; from < rows; from += TILE_ROWS) {
        int count = rows - from < TILE_ROWS ? rows - from : TILE_ROWS;
        int strips = tiles * STRIPS, together = strips_together(count);
        for (int strip = 0; strip < strips; strip += together) {
            int n = strips - strip < together ? strips - strip : together;
            size_t offset[CHAINS], scales[CHAINS];
            for (int i = 0; i < n; i++) {
                size_t tile = (strip + i) / STRIPS, part = (strip + i) % STRIPS;
                offset[i] = tile * columns / 8 * group_bytes(kind) + part * VL * 4;
                scales[i] = tile * columns / BLOCK * LANES + part * VL;
            }
            const real *in = x + from * stride;
            float *out = y + from * y_stride + strip * VL;
#define CASE(R, N)                                                                                 \
    case 8 * (N) + (R):                                                                            \
        strip_rows(kind, R, N, in, stride, codes, absmax, offset, scales, columns, from == 0, out, \
                   y_stride);                                                                      \
        break;
            switch (8 * n + count) {
                CASE(1, 2) CASE(1, 4) CASE(2, 2) CASE(2, 4) CASE(3, 1) CASE(4, 1)
#if TILE_ROWS == 8
                CASE(1, 1) CASE(1, 3) CASE(2, 1) CASE(2, 3)
                CASE(3, 2) CASE(4, 2) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
#endif
            }
#undef CASE
        }
    }
}

static void tile_product(int kind, const real *x, size_t stride, int rows, const uint8_t *codes,
                         const float *absmax, int columns, int tiles, float *y, size_t y_stride)
{
    if (kind == NF4)
        kind_product(NF4, x, stride, rows, codes, absmax, columns, tiles, y, y_stride);
    else
        kind_product(TILED, x, stride, rows, codes, NULL, columns, tiles, y, y_stride);
}

#if defined(AVX512)
#define DOT_ROWS 4
#else
#define DOT_ROWS 3
#endif
#define DOT_OUTS 4
#define FETCH_AHEAD 8 /* rows */

/* acc + x[0..DOT_STEP] * w[0..DOT_STEP] by lanes, in bfloat16 two to a lane. */
#if BF16
#define DOT_STEP 32
INLINE vf dot_step(vf acc, const real *x, const real *w)
{
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(x),
                                (__m512bh)_mm512_loadu_si512(w));
}

INLINE vf dot_rest(vf acc, const real *x, const real *w, int n)
{
    __mmask32 mask = (1u << n) - 1;
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_maskz_loadu_epi16(mask, x),
                                (__m512bh)_mm512_maskz_loadu_epi16(mask, w));
}
#else
#define DOT_STEP VL
INLINE vf dot_step(vf acc, const real *x, const real *w)
{
    return multiply_add(load(x), load(w), acc);
}

INLINE vf dot_rest(vf acc, const real *x, const real *w, int n)
{
    float a[VL] = {0}, b[VL] = {0};
    memcpy(a, x, n * sizeof(float));
    memcpy(b, w, n * sizeof(float));
    return multiply_add(load(a), load(b), acc);
}
#endif

/* y[r][n] = x[r] . w[n] for R rows and N outputs, N being 1 or 4. Meanwhile what comes next is
   fetched in the order of memory, `lines` of 64 bytes a step: a processor foresees one stream of
   reads, but not N that run side by side. */
INLINE void dots(int R, int N, const real *const x[], const real *w, size_t stride, int columns,
                 const real *next, int lines, float *const y[])
{
    vf acc[DOT_ROWS][DOT_OUTS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++)
            acc[r][n] = splat(0);
    int k = 0;
    for (; k + DOT_STEP <= columns; k += DOT_STEP) {
        for (int i = 0; i < lines; i++, next += 64 / sizeof(real))
            __builtin_prefetch(next);
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int r = 0; r < R; r++)
                acc[r][n] = dot_step(acc[r][n], x[r] + k, w + n * stride + k);
    }
    if (k < columns)
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++)
                acc[r][n] = dot_rest(acc[r][n], x[r] + k, w + n * stride + k, columns - k);
    UNROLL for (int r = 0; r < R; r++)
        if (N == 4)
            sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], y[r]);
        else
            y[r][0] = sum(acc[r][0]);
}

/* y[r][0..outs] = x[r] . w[0..outs]; rows anywhere, w [outs][columns] with `stride` between. */
static void dot_products(const real *const x[], int rows, const real *w, size_t stride, int outs,
                         int columns, float *const y[])
{
    /* each pass over the weights of four outputs fetches its share of four later ones */
    int passes = (rows + DOT_ROWS - 1) / DOT_ROWS, lines = DOT_STEP * DOT_OUTS * sizeof(real) / 64;
    lines = passes < lines ? lines / passes : passes <= lines ? 1 : 0;
    size_t share = (size_t)columns / DOT_STEP * lines * 64 / sizeof(real);
    for (int n = 0; n < outs; n += DOT_OUTS) {
        const real *v = w + n * stride;
        int width = outs - n < DOT_OUTS ? outs - n : DOT_OUTS;
        for (int r = 0; r < rows; r += DOT_ROWS) {
            int count = rows - r < DOT_ROWS ? rows - r : DOT_ROWS;
            const real *next = v + FETCH_AHEAD * stride + (size_t)r / DOT_ROWS * share;
            float *out[DOT_ROWS];
            for (int i = 0; i < count; i++)
                out[i] = y[r + i] + n;
            if (width < DOT_OUTS)
                for (int i = 0; i < count; i++)
                    for (int j = 0; j < width; j++)
                        dots(1, 1, x + r + i, v + j * stride, stride, columns, v, 0,
                             (float *[]){out[i] + j});
#if DOT_ROWS == 4
            else if (count == 4)
                dots(4, DOT_OUTS, x + r, v, stride, columns, next, lines, out);
#endif
            else if (count == 3)
                dots(3, DOT_OUTS, x + r, v, stride, columns, next, lines, out);
            else if (count == 2)
                dots(2, DOT_OUTS, x + r, v, stride, columns, next, lines, out);
            else
                dots(1, DOT_OUTS, x + r, v, stride, columns, next, lines, out);
        }
    }
}

#endif
