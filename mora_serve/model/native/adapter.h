/* The adapters' part of a site, y += sum of w B (A x) over a row's mixture, in two halves.

   `shrink` goes adapter by adapter, so that an adapter's A is read once however many rows use it;
   `expand` goes row by row, so that the order of a row's sum is its own. No row is ever multiplied
   by an adapter that is not in its mixture. */

#ifndef ADAPTER_H
#define ADAPTER_H

#include "batch.h"
#include "product.h"

enum { SHRINK_ROWS = 32, STRIPS_TOGETHER = 4 };

/* The inner products A x of one adapter for some of its pairs, at all projections of a site. */
static void shrink(const Forward *f, const Projection *projections, const Segment *segment,
                   int from, const real *x, int columns)
{
    const Model *m = f->model;
    Workspace *s = f->space;
    int rank = m->ranks[segment->slot];
    int count = segment->count - from < SHRINK_ROWS ? segment->count - from : SHRINK_ROWS;
    const real *xs[SHRINK_ROWS];
    float *ys[SHRINK_ROWS];
    for (int p = 0; p < 3 && projections[p].a; p++) {
        for (int i = 0; i < count; i++) {
            int pair = s->order[segment->first + from + i];
            xs[i] = x + (size_t)s->pair_row[pair] * columns;
            ys[i] = s->inner + ((size_t)pair * 3 + p) * m->max_rank;
        }
        const real *a = (const real *)projections[p].a
                        + (size_t)segment->slot * m->max_rank * columns;
        dot_products(xs, count, a, columns, rank, columns, ys);
    }
}

static int shrink_units(const Forward *f)
{
    int units = 0;
    for (int i = 0; i < f->segments; i++)
        units += (f->space->segment[i].count + SHRINK_ROWS - 1) / SHRINK_ROWS;
    return units;
}

static void shrink_unit(const Forward *f, const Projection *projections, int unit, const real *x,
                        int columns)
{
    for (int i = 0; i < f->segments; i++) {
        const Segment *segment = &f->space->segment[i];
        int units = (segment->count + SHRINK_ROWS - 1) / SHRINK_ROWS;
        if (unit < units) {
            shrink(f, projections, segment, unit * SHRINK_ROWS, x, columns);
            return;
        }
        unit -= units;
    }
}

/* Adds w B inner of each adapter of the row to y, `count` registers of outputs from `first` on. */
INLINE void expand_strips(int count, const Forward *f, const Projection *projection, int p,
                          const Row *row, float *y, int first)
{
    const Model *m = f->model;
    const Workspace *s = f->space;
    size_t width = projection->width;
    vf base[STRIPS_TOGETHER], total[STRIPS_TOGETHER];
    UNROLL for (int n = 0; n < count; n++)
        total[n] = base[n] = load(y + n * VL);
    for (int i = 0; i < row->chunk->adapters; i++) {
        int pair = row->pair + i, slot = s->pair_slot[pair], rank = m->ranks[slot];
        const float *inner = s->inner + ((size_t)pair * 3 + p) * m->max_rank;
        const real *b = (const real *)projection->b + (size_t)slot * m->max_rank * width + first;
        vf delta[STRIPS_TOGETHER];
        UNROLL for (int n = 0; n < count; n++)
            delta[n] = splat(0);
        for (int r = 0; r < rank; r++, b += width) {
            fetch(b + count * VL, count * VL * sizeof(real)); /* the next call's */
            UNROLL for (int n = 0; n < count; n++)
                delta[n] = multiply_add(load_real(b + n * VL), splat(inner[r]), delta[n]);
        }
        if (projection->dora && m->has_dora[slot]) {
            const real *dora = (const real *)projection->dora + slot * width + first;
            UNROLL for (int n = 0; n < count; n++)
                delta[n] += load_real(dora + n * VL) * (delta[n] + base[n]);
        }
        UNROLL for (int n = 0; n < count; n++)
            total[n] += delta[n] * s->pair_weight[pair];
    }
    UNROLL for (int n = 0; n < count; n++)
        store(y + n * VL, total[n]);
}

/* The same for one output, where a projection's width is not made of whole registers. */
static float expand_one(const Forward *f, const Projection *projection, int p, const Row *row,
                        float base, int first)
{
    const Model *m = f->model;
    const Workspace *s = f->space;
    size_t width = projection->width;
    float total = base;
    for (int i = 0; i < row->chunk->adapters; i++) {
        int pair = row->pair + i, slot = s->pair_slot[pair];
        const float *inner = s->inner + ((size_t)pair * 3 + p) * m->max_rank;
        const real *b = (const real *)projection->b + (size_t)slot * m->max_rank * width + first;
        float delta = 0;
        for (int r = 0; r < m->ranks[slot]; r++)
            delta += to_float(b[r * width]) * inner[r];
        if (projection->dora && m->has_dora[slot])
            delta += to_float(((const real *)projection->dora)[slot * width + first])
                     * (delta + base);
        total += delta * s->pair_weight[pair];
    }
    return total;
}

/* Adds the row's adapters to y [width], outputs first .. first + width of one projection, then
   their bias. */
static void expand(const Forward *f, const Projection *projection, int p, const Row *row, float *y,
                   int first, int width, const real *bias)
{
    int out = row->chunk->adapters ? 0 : width;
    for (; out + STRIPS_TOGETHER * VL <= width; out += STRIPS_TOGETHER * VL)
        expand_strips(STRIPS_TOGETHER, f, projection, p, row, y + out, first + out);
    for (; out + VL <= width; out += VL)
        expand_strips(1, f, projection, p, row, y + out, first + out);
    for (; out < width; out++)
        y[out] = expand_one(f, projection, p, row, y[out], first + out);
    for (out = 0; bias && out < width; out++)
        y[out] += to_float(bias[first + out]);
}

#endif
