/* An adapter's tensors from its file into what the slots hold: another type, B transposed and scaled.
   In float, and rounded once. */

#include <string.h>

#include "mora.h"

static float from_half(uint16_t half)
{
    /* Exponent and fraction moved to where a float has them, then the biases' difference made good
       by a product, which is exact for subnormal numbers too. */
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p112f;
    return half & 0x8000 ? -x : x;
}

static inline float number(const uint8_t *p, int type)
{
    float x;
    uint16_t half;
    uint32_t bits;
    if (type == FLOAT32) {
        memcpy(&x, p, sizeof x);
        return x;
    }
    memcpy(&half, p, sizeof half);
    if (type == FLOAT16)
        return from_half(half);
    bits = (uint32_t)half << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline void unpack(const Piece *p, int type)
{
    size_t size = type == FLOAT32 ? 4 : 2, step = p->transposed ? p->columns * size : size;
    int outer = p->transposed ? p->columns : p->rows, inner = p->transposed ? p->rows : p->columns;
    uint16_t *half = p->to;
    float *real = p->to;
    for (int i = 0; i < outer; i++) {
        const uint8_t *from = p->from + i * (p->transposed ? size : p->columns * size);
        for (int j = 0; j < inner; j++, from += step) {
            float x = number(from, type) * p->scale;
            uint32_t bits;
            memcpy(&bits, &x, sizeof bits);
            if (p->bf16)
                *half++ = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            else
                *real++ = x;
        }
    }
}

void mora_unpack(const Piece *pieces, int count)
{
    for (const Piece *p = pieces; p < pieces + count; p++)
        if (p->type == FLOAT32)
            unpack(p, FLOAT32);
        else if (p->type == FLOAT16)
            unpack(p, FLOAT16);
        else
            unpack(p, BFLOAT16);
}
