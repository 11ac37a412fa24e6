/* Attention of one row and one group of query heads over the pages of its sequence.

   Every key up to the row's own position is looked at, in order, and no other: nothing is masked.
   Scores, softmax and the sum over values are float. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include "adapter.h"
#include "row.h"

/* What one pass over the values takes; as many sums as there are registers for. */
#if defined(AVX512)
enum { VALUE_HEADS = 4, VALUE_STRIPS = 4 };
#else
enum { VALUE_HEADS = 2, VALUE_STRIPS = 4 };
#endif

INLINE size_t page_row(const Model *m, const Step *step, const Row *row, int kv_head, int position)
{
    int page = step->pages[row->chunk->table + position / m->page_size];
    return (((size_t)kv_head * m->pages + page) * m->page_size + position % m->page_size)
           * m->head_dim;
}

/* One head: its norm, where the model has one, then its turn by the position's angles. */
static void turn(const Model *m, int position, const real *norm, float *x, real *out)
{
    int dim = m->head_dim, half = dim / 2;
    const real *cos = (const real *)m->cos + (size_t)position * dim;
    const real *sin = (const real *)m->sin + (size_t)position * dim;
    if (norm)
        rms_norm(x, norm, dim, m->eps, x);
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * to_float(cos[i]) - b * to_float(sin[i]);
        x[i + half] = b * to_float(cos[i + half]) + a * to_float(sin[i + half]);
    }
    to_real(x, dim, out);
}

/* From a row's qkv outputs: the queries of one group, and their key and value into the page. */
static void write_heads(const Forward *f, int layer, int r, int kv_head, float *y)
{
    const Model *m = f->model;
    const Layer *l = &m->layer[layer];
    const Row *row = &f->space->row[r];
    const Projection *p = l->projections[QKV];
    const real *bias = l->sites[QKV].bias;
    int dim = m->head_dim, group = m->heads / m->kv_heads;
    int first[3] = {kv_head * group * dim, kv_head * dim, kv_head * dim};
    for (int i = 0; i < 3; i++)
        expand(f, &p[i], i, row, y + p[i].start + first[i], first[i], i ? dim : group * dim,
               bias ? bias + p[i].start : NULL);
    real *q = f->space->q + ((size_t)r * m->heads + kv_head * group) * dim;
    for (int i = 0; i < group; i++)
        turn(m, row->position, l->q_norm, y + first[0] + i * dim, q + i * dim);
    size_t place = page_row(m, f->step, row, kv_head, row->position);
    turn(m, row->position, l->k_norm, y + p[1].start + first[1], (real *)l->keys + place);
    to_real(y + p[2].start + first[2], dim, (real *)l->values + place);
}

static void softmax(float *scores, int n, float scale)
{
    vf most_lanes = splat(-INFINITY), total_lanes = splat(0);
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vf x = load(scores + i);
        most_lanes = select_vf(x > most_lanes, x, most_lanes);
    }
    float most = greatest(most_lanes);
    for (; i < n; i++)
        most = scores[i] > most ? scores[i] : most;
    i = 0;
    for (; i + VL <= n; i += VL) {
        vf e = exp_vf((load(scores + i) - most) * scale);
        store(scores + i, e);
        total_lanes += e;
    }
    float total = sum(total_lanes);
    for (; i < n; i++) {
        scores[i] = exp_vf(splat((scores[i] - most) * scale))[0];
        total += scores[i];
    }
    for (i = 0; i < n; i++)
        scores[i] /= total;
}

/* acc[head][strip] += weight times value over n positions, `strips` registers of the values. */
INLINE void value_sum(int heads, int strips, const float *const weights[], const real *values,
                      size_t stride, int n, vf acc[][VALUE_STRIPS])
{
    vf total[VALUE_HEADS][VALUE_STRIPS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int s = 0; s < strips; s++)
            total[h][s] = acc[h][s];
    for (int t = 0; t < n; t++) {
        vf v[VALUE_STRIPS];
        UNROLL for (int s = 0; s < strips; s++)
            v[s] = load_real(values + t * stride + s * VL);
        UNROLL for (int h = 0; h < heads; h++) {
            vf weight = splat(weights[h][t]);
            UNROLL for (int s = 0; s < strips; s++)
                total[h][s] = multiply_add(v[s], weight, total[h][s]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int s = 0; s < strips; s++)
            acc[h][s] = total[h][s];
}

/* The same for one column, where a head's size is not made of whole registers. */
static void value_column(const float *weights, const real *values, size_t stride, int n, float *acc)
{
    for (int t = 0; t < n; t++)
        *acc += to_float(values[t * stride]) * weights[t];
}

static void attend(const Forward *f, int layer, int r, int kv_head, float *scores)
{
    const Model *m = f->model;
    const Layer *l = &m->layer[layer];
    const Row *row = &f->space->row[r];
    int dim = m->head_dim, group = m->heads / m->kv_heads, size = m->page_size;
    int end = row->position + 1;
    int begin = m->window && end > m->window ? end - m->window : 0;
    int length = end - begin;
    const real *q = f->space->q + ((size_t)r * m->heads + kv_head * group) * dim;
    for (int h = 0; h < group; h += DOT_ROWS) {
        int heads = group - h < DOT_ROWS ? group - h : DOT_ROWS;
        for (int t = begin; t < end;) {
            int n = size - t % size < end - t ? size - t % size : end - t;
            const real *xs[DOT_ROWS];
            float *ys[DOT_ROWS];
            for (int i = 0; i < heads; i++) {
                xs[i] = q + (h + i) * dim;
                ys[i] = scores + (size_t)(h + i) * length + t - begin;
            }
            size_t page = page_row(m, f->step, row, kv_head, t);
            if (h == 0)
                fetch((const real *)l->values + page, n * dim * sizeof(real));
            if (h == 0 && t + n < end)
                fetch((const real *)l->keys + page_row(m, f->step, row, kv_head, t + n),
                      size * dim * sizeof(real));
            dot_products(xs, heads, (const real *)l->keys + page, dim, n, dim, ys);
            t += n;
        }
    }
    float scale = 1.0f / sqrtf((float)dim);
    for (int h = 0; h < group; h++)
        softmax(scores + (size_t)h * length, length, scale);
    real *out = f->space->attended + ((size_t)r * m->heads + kv_head * group) * dim;
    for (int h = 0; h < group; h += VALUE_HEADS) {
        int heads = group - h < VALUE_HEADS ? group - h : VALUE_HEADS;
        for (int d = 0, width; d < dim; d += width) {
            width = dim - d >= VALUE_STRIPS * VL ? VALUE_STRIPS * VL : dim - d >= VL ? VL : 1;
            vf acc[VALUE_HEADS][VALUE_STRIPS];
            float column[VALUE_HEADS] = {0};
            memset(acc, 0, sizeof acc);
            for (int t = begin; t < end;) {
                int n = size - t % size < end - t ? size - t % size : end - t;
                const float *weights[VALUE_HEADS];
                for (int i = 0; i < heads; i++)
                    weights[i] = scores + (size_t)(h + i) * length + t - begin;
                const real *v = (const real *)l->values
                                + page_row(m, f->step, row, kv_head, t) + d;
                if (width == VALUE_STRIPS * VL && heads == VALUE_HEADS)
                    value_sum(VALUE_HEADS, VALUE_STRIPS, weights, v, dim, n, acc);
                else
                    for (int i = 0; i < heads; i++)
                        if (width == VALUE_STRIPS * VL)
                            value_sum(1, VALUE_STRIPS, weights + i, v, dim, n, acc + i);
                        else if (width == VL)
                            value_sum(1, 1, weights + i, v, dim, n, acc + i);
                        else
                            value_column(weights[i], v, dim, n, &column[i]);
                t += n;
            }
            for (int i = 0; i < heads; i++)
                for (int s = 0; s * VL < width; s++)
                    if (width == 1)
                        out[(h + i) * dim + d] = from_float(column[i]);
                    else
                        store_real(out + (h + i) * dim + d + s * VL, acc[i][s]);
        }
    }
}

#endif
