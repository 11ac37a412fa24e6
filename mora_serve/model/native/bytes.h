/* Products in 8 bits: where the processor multiplies bytes twice as fast as bfloat16 (VNNI).

   An input row is rounded to signed bytes, each block of 64 by its own scale; the codes of a 4-bit
   weight stand for unsigned bytes, the value times 112.03 (for which rounding loses least) plus
   128; sums are 32-bit integers, and exact. 128 times the sum of a block's input is taken off at
   its start. Inputs lie in the order in which a tile's 8 codes are unpacked. */

#ifndef BYTES_H
#define BYTES_H

#include "product.h"

#if BF16

#define NF4_SCALE 112.03f

/* Rows of inputs as bytes. */
typedef struct {
    int8_t *q;       /* [rows][columns] */
    float *scale;    /* [rows][columns / 64] */
    int32_t *offset; /* [rows][columns / 64], -128 times the block's sum */
} Bytes;

INLINE __m512i nf4_bytes(void)
{
    uint8_t table[64];
    for (int i = 0; i < 64; i++)
        table[i] = (uint8_t)(128 + (int)lrintf(NF4_VALUES[i % 16] * NF4_SCALE));
    return _mm512_loadu_si512(table);
}

/* n values, whole blocks, from column `first` of row r on. */
static void to_bytes(const real *x, int n, const Bytes *bytes, size_t r, size_t columns, int first)
{
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    size_t block = (r * columns + first) / BLOCK;
    int8_t *q = bytes->q + r * columns + first;
    for (int i = 0; i < n; i += BLOCK, block++, q += BLOCK) {
        __m512 v[4], most = _mm512_setzero_ps();
        for (int j = 0; j < 4; j++) {
            v[j] = (__m512)load_real(x + i + 16 * j);
            most = _mm512_max_ps(most, _mm512_abs_ps(v[j]));
        }
        float top = _mm512_reduce_max_ps(most);
        __m512i sums = _mm512_setzero_si512();
        __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
        for (int j = 0; j < 4; j++) {
            __m512i n32 = _mm512_cvtps_epi32(_mm512_mul_ps(v[j], inverse));
            sums = _mm512_add_epi32(sums, n32);
            __m128i n8 = _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(n32), order);
            _mm_storeu_si128((__m128i *)(q + 16 * j), n8);
        }
        int finite = top <= 3.4e38f; /* NaN is lost by the maximum, but not by a sum */
        float check = _mm512_reduce_add_ps(v[0] * 0.0f + v[1] * 0.0f + v[2] * 0.0f + v[3] * 0.0f);
        bytes->scale[block] = finite && check == 0.0f ? top / (127.0f * NF4_SCALE) : NAN;
        bytes->offset[block] = -128 * _mm512_reduce_add_epi32(sums);
    }
}

INLINE __m512i quad(const int8_t *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}

INLINE void byte_rows(int R, int N, const Bytes *in, size_t first, int columns,
                      const uint8_t *codes, const float *absmax, int fetching, float *y,
                      size_t y_stride)
{
    const __m512i table = nf4_bytes(), low = _mm512_set1_epi8(15);
    size_t size = (size_t)columns / 8 * GROUP_BYTES, scales = (size_t)columns / BLOCK * LANES;
    size_t blocks = columns / BLOCK, k = 0;
    const uint8_t *next = codes + N * size;
    const int8_t *row[TILE_ROWS];
    __m512 total[CHAINS][TILE_ROWS];
    UNROLL for (int r = 0; r < R; r++)
        row[r] = in->q + (first + r) * columns;
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            total[n][r] = _mm512_setzero_ps();
    for (size_t block = 0; block < blocks; block++) {
        __m512i part[CHAINS][TILE_ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            __m512i start = _mm512_set1_epi32(in->offset[(first + r) * blocks + block]);
            UNROLL for (int n = 0; n < N; n++)
                part[n][r] = start;
        }
        for (size_t end = k + BLOCK; k < end; k += 8)
            UNROLL for (int n = 0; n < N; n++) {
                if (fetching)
                    __builtin_prefetch(next += GROUP_BYTES);
                __m512i packed = _mm512_loadu_si512(codes + n * size + k * LANES / 2);
                __m512i a = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low));
                packed = _mm512_srli_epi16(packed, 4);
                __m512i b = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low));
                UNROLL for (int r = 0; r < R; r++) {
                    part[n][r] = _mm512_dpbusd_epi32(part[n][r], a, quad(row[r] + k));
                    part[n][r] = _mm512_dpbusd_epi32(part[n][r], b, quad(row[r] + k + 4));
                }
            }
        UNROLL for (int n = 0; n < N; n++) {
            __m512 scale = (__m512)load(absmax + n * scales + block * LANES);
            UNROLL for (int r = 0; r < R; r++) {
                __m512 factor = scale * _mm512_set1_ps(in->scale[(first + r) * blocks + block]);
                total[n][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[n][r]), factor, total[n][r]);
            }
        }
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int r = 0; r < R; r++)
            store(y + r * y_stride + n * LANES, (vf)total[n][r]);
}

/* y [rows][16 tiles] = rows first .. of the input times neighbouring tiles (see tile_product). */
static void byte_product(const Bytes *in, size_t first, int rows, const uint8_t *codes,
                         const float *absmax, int columns, int tiles, float *y, size_t y_stride)
{
    size_t size = (size_t)columns / 8 * GROUP_BYTES, scales = (size_t)columns / BLOCK * LANES;
    for (int from = 0; from < rows; from += TILE_ROWS) {
        int count = rows - from < TILE_ROWS ? rows - from : TILE_ROWS;
        int together = strips_together(count);
        for (int tile = 0; tile < tiles; tile += together) {
            int n = tiles - tile < together ? tiles - tile : together;
#define CASE(R, N)                                                                                 \
    case 8 * (N) + (R):                                                                            \
        byte_rows(R, N, in, first + from, columns, codes + tile * size, absmax + tile * scales,    \
                  from == 0, y + from * y_stride + tile * LANES, y_stride);                        \
        break;
            switch (8 * n + count) {
                CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 1) CASE(2, 2) CASE(2, 3)
                CASE(2, 4) CASE(3, 1) CASE(3, 2) CASE(4, 1) CASE(4, 2) CASE(5, 1) CASE(6, 1)
                CASE(7, 1) CASE(8, 1)
            }
#undef CASE
        }
    }
}

#endif
#endif
