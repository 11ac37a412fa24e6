/* Products of a few rows with a weight: x [rows][in] and W [out][in] give y [rows][out] in float.

   A row's result is made by the same operations in the same order whatever the other rows are and
   however many: equal rows of a batch, or of two batches, give equal bits.

   A weight is stored in tiles of 16 outputs, one or several registers wide (strips), so that lanes
   are outputs and nothing has to be summed across them. A tile is made of groups of 8 inputs:

   - NF4, 64 bytes: 32-bit word o is output o, its bits 16 p + 4 j .. + 3 the code of input 2 j + p.
     Scales (absmax) lie beside: 16 floats for each `span` of inputs. Each block of 64 is summed on
     its own and then multiplied by its scale, which is exact where a dequantised weight in bfloat16
     would be rounded.
   - INT4, in the same layout: a weight is (code - 8) scale + offset, as GPTQ and AWQ have it with
     offset = (8 - zero) scale. So a block is scale (its sum as above) + offset (the sum of its
     inputs), and nothing in it is rounded but sums: the 16 values are whole numbers, exact in
     bfloat16 too. Blocks are of 32 inputs where spans are no multiples of 64.
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
    return kind == TILED ? TILED_GROUP : CODE_GROUP;
}

/* Neighbouring tiles of one weight, from the first one's memory on. */
typedef struct {
    const uint8_t *codes;
    const float *scales, *offsets; /* see Weight */
    int columns, span;
} Tiles;

/* Scales of one output. */
INLINE int spans(const Tiles *t)
{
    return (t->columns + t->span - 1) / t->span;
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
INLINE __m512i code_table(int kind)
{
    uint16_t table[32];
    for (int i = 0; i < 32; i++)
        table[i] = from_float(code_values(kind)[i % 16]);
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
        __m512bh w = (__m512bh)(kind == TILED ? _mm512_loadu_si512(codes + 64 * j)
                                              : _mm512_permutexvar_epi16(shifted, table));
        UNROLL for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x[r] + k + 2 * j, sizeof pair);
            part[r] = (vf)_mm512_dpbf16_ps((__m512)part[r], w, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
}

#else

/* The values w[input] of the codes of one strip of outputs for 8 inputs. */
#if defined(AVX512)
#define TABLE vf
INLINE vf code_table(int kind)
{
    return load(code_values(kind));
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
INLINE Planes code_table(int kind)
{
    uint32_t bits[16];
    Planes table;
    memcpy(bits, code_values(kind), sizeof bits);
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
INLINE const float *code_table(int kind)
{
    return code_values(kind);
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
    if (kind != TILED) {
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

/* sums[r][b] = the sum of x[r] over block b of `size` inputs, of whole blocks alone. */
INLINE void block_sums(int size, const real *x, size_t stride, int rows, int columns, float *sums)
{
    int blocks = columns / size;
    for (int r = 0; r < rows; r++)
        for (int b = 0, n; b < blocks; b += n) {
            vf acc[4] = {splat(0), splat(0), splat(0), splat(0)};
            float out[4];
            n = blocks - b < 4 ? blocks - b : 4;
            for (int i = 0; i < n; i++)
                for (int k = 0; k < size; k += VL)
                    acc[i] += load_real(x + r * stride + (b + i) * size + k);
            sum4(acc[0], acc[1], acc[2], acc[3], out);
            memcpy(sums + (size_t)r * blocks + b, out, n * sizeof(float));
        }
}

/* R rows times N neighbouring strips; strip n begins at codes + offset[n], scales + scale[n].
   Blocks are of `size` inputs; sums are block_sums' of these rows where there are offsets. */
INLINE void strip_rows(int kind, int size, int R, int N, const real *x, size_t stride,
                       const Tiles *t, const size_t offset[], const size_t scale[],
                       const float *sums, int fetching, float *y, size_t y_stride)
{
    TABLE table = code_table(kind);
    vf total[CHAINS][TILE_ROWS], part[CHAINS][TILE_ROWS];
    const real *row[TILE_ROWS];
    const size_t group = group_bytes(kind), lines = group / STRIPS < 64 ? 1 : group / STRIPS / 64;
    const uint8_t *next = t->codes + offset[0] + (size_t)N * t->columns / 8 * group / STRIPS;
    const int blocks = t->columns / size, per = kind == INT4 ? t->span / size : 1;
    size_t k = 0;
    UNROLL for (int r = 0; r < R; r++)
        row[r] = x + r * stride;
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            total[n][r] = splat(0);
    for (int block = 0; block < blocks; block++) {
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int r = 0; r < R; r++)
                part[n][r] = splat(0);
        for (size_t end = k + size; k < end; k += 8)
            UNROLL for (int n = 0; n < N; n++) {
                if (fetching) { /* what comes next, in the order of memory (see dots) */
                    UNROLL for (size_t i = 0; i < lines; i++)
                        __builtin_prefetch(next += group / STRIPS / lines);
                }
                group_product(kind, R, part[n], row, k, t->codes + offset[n] + k / 8 * group,
                              table);
            }
        size_t at = (size_t)(block / per) * LANES;
        UNROLL for (int n = 0; n < N; n++) {
            vf by = kind == TILED ? splat(1) : load(t->scales + scale[n] + at);
            UNROLL for (int r = 0; r < R; r++)
                total[n][r] = multiply_add(part[n][r], by, total[n][r]);
        }
        if (kind == INT4 && t->offsets)
            UNROLL for (int n = 0; n < N; n++) {
                vf by = load(t->offsets + scale[n] + at);
                UNROLL for (int r = 0; r < R; r++)
                    total[n][r] = multiply_add(splat(sums[r * blocks + block]), by, total[n][r]);
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

INLINE void decode_block(int kind, int size, const uint8_t *codes, float *w)
{
    TABLE table = code_table(kind);
    for (int group = 0; group < size / 8; group++) {
        fetch(codes + (group + size / 8 * 2) * group_bytes(kind), group_bytes(kind));
        UNROLL for (int strip = 0; strip < STRIPS; strip++) {
            vf decoded[8];
            group_weights(kind, codes + group * group_bytes(kind) + strip * VL * 4, table, decoded);
            UNROLL for (int i = 0; i < 8; i++)
                store(w + (group * 8 + i) * LANES + strip * VL, decoded[i]);
        }
    }
}

/* y[r] += scale * (x[r][0..size] . w) + offset * sums[r], two strips of outputs of R rows; the
   offsets may be NULL, and sums are `blocks` apart. */
INLINE void decoded_rows(int kind, int size, int R, const real *x, size_t stride, const float *w,
                         const float *scales, const float *offsets, const float *sums, int blocks,
                         float *y, size_t y_stride)
{
    vf part[DECODED_ROWS][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < 2; n++)
            part[r][n] = splat(0);
    for (int k = 0; k < size; k++) {
        vf w0 = load(w + k * LANES), w1 = load(w + k * LANES + VL);
        UNROLL for (int r = 0; r < R; r++) {
            vf in = splat(x[r * stride + k]);
            part[r][0] = multiply_add(w0, in, part[r][0]);
            part[r][1] = multiply_add(w1, in, part[r][1]);
        }
    }
    UNROLL for (int n = 0; n < 2; n++) {
        UNROLL for (int r = 0; r < R; r++) {
            float *out = y + r * y_stride + n * VL;
            /* a product with 1 would hold one more register: half the speed with AVX2 */
            vf total = kind == TILED ? part[r][n] + load(out)
                                     : multiply_add(part[r][n], load(scales + n * VL), load(out));
            if (kind == INT4 && offsets)
                total = multiply_add(splat(sums[r * blocks]), load(offsets + n * VL), total);
            store(out, total);
        }
    }
}

INLINE void decoded_product(int kind, int size, const real *x, size_t stride, int rows,
                            const Tiles *t, const float *sums, int tiles, float *y,
                            size_t y_stride)
{
    _Alignas(64) float w[BLOCK * LANES];
    const uint8_t *codes = t->codes;
    const int blocks = t->columns / size, per = kind == INT4 ? t->span / size : 1;
    for (int r = 0; r < rows; r++)
        memset(y + r * y_stride, 0, tiles * LANES * sizeof(float));
    for (int tile = 0; tile < tiles; tile++, y += LANES)
        for (int b = 0; b < blocks; b++, codes += size / 8 * group_bytes(kind)) {
            size_t at = ((size_t)tile * spans(t) + b / per) * LANES;
            decode_block(kind, size, codes, w);
            for (int strip = 0; strip < STRIPS; strip += 2)
                for (int r = 0, count; r < rows; r += count) {
                    const real *in = x + r * stride + (size_t)b * size;
                    const float *scales = kind == TILED ? NULL : t->scales + at + strip * VL;
                    const float *offsets = kind == INT4 && t->offsets
                                               ? t->offsets + at + strip * VL : NULL;
                    const float *sum = sums + (offsets ? (size_t)r * blocks + b : 0);
                    float *out = y + r * y_stride + strip * VL;
                    count = rows - r < DECODED_ROWS ? rows - r : DECODED_ROWS;
#define CASE(R)                                                                                    \
    case R:                                                                                        \
        decoded_rows(kind, size, R, in, stride, w + strip * VL, scales, offsets, sum, blocks, out, \
                     y_stride);                                                                    \
        break;
                    switch (count) {
                        CASE(1) CASE(2) CASE(3) CASE(4)
#if VL == 8
                        CASE(5) CASE(6)
#endif
                    }
#undef CASE
                }
        }
}

#endif

/* y [rows][16 tiles] = x [rows][columns] times neighbouring tiles. */
INLINE void kind_product(int kind, int size, const real *x, size_t stride, int rows,
                         const Tiles *t, int tiles, float *y, size_t y_stride)
{
    int summed = kind == INT4 && t->offsets, blocks = t->columns / size;
    float sums[summed ? rows * blocks : 1];
    if (summed)
        block_sums(size, x, stride, rows, t->columns, sums);
#if !BF16 && !defined(AVX512)
    if (rows > TILE_ROWS) {
        decoded_product(kind, size, x, stride, rows, t, sums, tiles, y, y_stride);
        return;
    }
#endif
    for (int from = 0; from < rows; from += TILE_ROWS) {
        int count = rows - from < TILE_ROWS ? rows - from : TILE_ROWS;
        int strips = tiles * STRIPS, together = strips_together(count);
        for (int strip = 0; strip < strips; strip += together) {
            int n = strips - strip < together ? strips - strip : together;
            size_t offset[CHAINS], scale[CHAINS];
            for (int i = 0; i < n; i++) {
                size_t tile = (strip + i) / STRIPS, part = (strip + i) % STRIPS;
                offset[i] = tile * t->columns / 8 * group_bytes(kind) + part * VL * 4;
                scale[i] = kind == TILED ? 0 : tile * spans(t) * LANES + part * VL;
            }
            const real *in = x + from * stride;
            const float *sum = sums + (summed ? (size_t)from * blocks : 0);
            float *out = y + from * y_stride + strip * VL;
#define CASE(R, N)                                                                                 \
    case 8 * (N) + (R):                                                                            \
        strip_rows(kind, size, R, N, in, stride, t, offset, scale, sum, from == 0, out, y_stride); \
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

/* A function for each kind: in one that holds all, GCC allocates registers worse (a third slower at
   4 rows of TILED, AVX-512). */
#define PRODUCT(name, kind, size)                                                                  \
    static __attribute__((noinline)) void name(const real *x, size_t stride, int rows,             \
                                               const Tiles *t, int tiles, float *y,                \
                                               size_t y_stride)                                    \
    {                                                                                              \
        kind_product(kind, size, x, stride, rows, t, tiles, y, y_stride);                          \
    }
PRODUCT(nf4_product, NF4, BLOCK)
PRODUCT(int4_product, INT4, BLOCK)
PRODUCT(int4_half_product, INT4, HALF_BLOCK)
PRODUCT(tiled_product, TILED, BLOCK)
#undef PRODUCT

static void tile_product(int kind, int block, const real *x, size_t stride, int rows, Tiles tiles,
                         int count, float *y, size_t y_stride)
{
    if (kind == NF4)
        nf4_product(x, stride, rows, &tiles, count, y, y_stride);
    else if (kind == TILED)
        tiled_product(x, stride, rows, &tiles, count, y, y_stride);
    else if (block == BLOCK)
        int4_product(x, stride, rows, &tiles, count, y, y_stride);
    else
        int4_half_product(x, stride, rows, &tiles, count, y, y_stride);
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
