/* What happens to one row between two products. */

#ifndef ROW_H
#define ROW_H

#include "vector.h"

static void rms_norm(const float *x, const real *weight, int n, float eps, float *out)
{
    vf squares = splat(0);
    int i = 0;
    for (; i + VL <= n; i += VL)
        squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++)
        total += x[i] * x[i];
    float scale = 1.0f / sqrtf(total / n + eps);
    for (i = 0; i + VL <= n; i += VL)
        store(out + i, load(x + i) * scale * load_real(weight + i));
    for (; i < n; i++)
        out[i] = x[i] * scale * to_float(weight[i]);
}

static void to_real(const float *x, int n, real *out)
{
    int i = 0;
    for (; i + VL <= n; i += VL)
        store_real(out + i, load(x + i));
    for (; i < n; i++)
        out[i] = from_float(x[i]);
}

static void norm_row(const float *h, const real *weight, int n, float eps, float *buffer, real *out)
{
    rms_norm(h, weight, n, eps, buffer);
    to_real(buffer, n, out);
}

#endif
