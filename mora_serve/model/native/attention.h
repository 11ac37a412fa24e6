/* Attention of one row and one group of query heads over the pages of its sequence.

   Every key up to the row's own position is looked at, in order, and no other: nothing is masked.
   Scores, softmax and the sum over values are float. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include "adapter.h"
#include "row.h"

enum { VALUE_HEADS = 4 };

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
    float most = scores[0];
    vf total_lanes = splat(0);
    int i = 0;
    for (int j = 1; j < n; j++)
        most = scores[j] > most ? scores[j] : most;
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

/* out[head][lane] = sum over n positions of weight times value, `lanes` columns of the values. */
INLINE void value_sum(int heads, const float *const weights[], const real *values, size_t stride,
                      int n, int lanes, vf acc[])
{
    for (int t = 0; t < n; t++) {
        vf v;
        if (lanes == VL) {
            v = load_real(values + t * stride);
        } else {
            v = splat(0);
            for (int j = 0; j < lanes; j++)
                v[j] = to_float(values[t * stride + j]);
        }
        UNROLL for (int h = 0; h < heads; h++)
            acc[h] += v * weights[h][t];
    }
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
            dot_products(xs, heads, (const real *)l->keys + page_row(m, f->step, row, kv_head, t),
                         dim, n, dim, ys);
            t += n;
        }
    }
    float scale = 1.0f / sqrtf((float)dim);
    for (int h = 0; h < group; h++)
        softmax(scores + (size_t)h * length, length, scale);
    real *out = f->space->attended + ((size_t)r * m->heads + kv_head * group) * dim;
    for (int h = 0; h < group; h += VALUE_HEADS) {
        int heads = group - h < VALUE_HEADS ? group - h : VALUE_HEADS;
        for (int d = 0; d < dim; d += VL) {
            int lanes = dim - d < VL ? dim - d : VL;
            vf acc[VALUE_HEADS];
            for (int i = 0; i < VALUE_HEADS; i++)
                acc[i] = splat(0);
            for (int t = begin; t < end;) {
                int n = size - t % size < end - t ? size - t % size : end - t;
                const float *weights[VALUE_HEADS];
                for (int i = 0; i < heads; i++)
                    weights[i] = scores + (size_t)(h + i) * length + t - begin;
                const real *v = (const real *)l->values
                                + page_row(m, f->step, row, kv_head, t) + d;
                if (heads == VALUE_HEADS)
                    value_sum(VALUE_HEADS, weights, v, dim, n, lanes, acc);
                else
                    for (int i = 0; i < heads; i++)
                        value_sum(1, weights + i, v, dim, n, lanes, acc + i);
                t += n;
            }
            for (int i = 0; i < heads; i++) {
                float lanes_out[VL];
                store(lanes_out, acc[i]);
                to_real(lanes_out, lanes, out + (h + i) * dim + d);
            }
        }
    }
}

#endif
