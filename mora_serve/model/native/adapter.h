/* The adapters' part of a site, y += sum of w B (A x) over a row's mixture, in two halves.

   `shrink` goes adapter by adapter, so that an adapter's A is read once however many rows use it;
   `expand` goes row by row, so that the order of a row's sum is its own. No row is ever multiplied
   by an adapter that is not in its mixture. */

#ifndef ADAPTER_H
#define ADAPTER_H

#include "batch.h"
#include "product.h"

enum { SHRINK_ROWS = 32 };

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

/* Adds w B inner of each adapter of the row to y [width], outputs first .. first + width of one
   projection; then its bias. Outputs beyond whole registers go one by one. */
static void expand(const Forward *f, const Projection *projection, int p, const Row *row, float *y,
                   int first, int width, const real *bias)
{
    const Model *m = f->model;
    const Workspace *s = f->space;
    int adapters = row->chunk->adapters;
    for (int out = 0; out < width; out += VL) {
        int lanes = width - out < VL ? width - out : VL;
        float base_lanes[VL] = {0};
        memcpy(base_lanes, y + out, lanes * sizeof(float));
        vf base = load(base_lanes), total = base;
        for (int i = 0; i < adapters; i++) {
            int pair = row->pair + i, slot = s->pair_slot[pair], rank = m->ranks[slot];
            const float *inner = s->inner + ((size_t)pair * 3 + p) * m->max_rank;
            const real *b = (const real *)projection->b
                            + (size_t)slot * m->max_rank * projection->width + first + out;
            vf delta = splat(0), scale = splat(0);
            if (lanes == VL) {
                for (int r = 0; r < rank; r++)
                    delta += load_real(b + (size_t)r * projection->width) * inner[r];
            } else {
                for (int r = 0; r < rank; r++)
                    for (int j = 0; j < lanes; j++)
                        delta[j] += to_float(b[(size_t)r * projection->width + j]) * inner[r];
            }
            if (projection->dora && m->has_dora[slot]) {
                const real *dora = (const real *)projection->dora
                                   + (size_t)slot * projection->width + first + out;
                if (lanes == VL)
                    scale = load_real(dora);
                for (int j = 0; lanes < VL && j < lanes; j++)
                    scale[j] = to_float(dora[j]);
                delta += scale * (delta + base);
            }
            total += delta * s->pair_weight[pair];
        }
        if (bias)
            for (int j = 0; j < lanes; j++)
                total[j] += to_float(bias[first + out + j]);
        memcpy(y + out, &total, lanes * sizeof(float));
    }
}

#endif
