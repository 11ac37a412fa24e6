/* One step as the threads see it: its rows, who uses which adapter, and where results go. */

#ifndef BATCH_H
#define BATCH_H

#include <time.h>

#include "team.h"
#include "vector.h"

/* A row: one token. */
typedef struct {
    const Chunk *chunk;
    int position;
    int pair; /* its first (row, adapter) pair */
} Row;

/* The pairs of one adapter, in the order of rows. */
typedef struct {
    int slot, first, count; /* in Workspace.order */
} Segment;

struct Workspace {
    size_t rows, pairs;
    Row *row;
    Segment *segment;
    int *order, *pair_row, *pair_slot;
    float *pair_weight;
    float *h, *y;
    float *inner; /* [pairs][3][max_rank] */
    real *x, *q, *wide, *attended;
    real *ordered; /* the inputs of a product whose weight has them in another order */
    float *scores; /* [threads][group * max_context] */
    size_t score_size;
};

typedef struct {
    const Model *model;
    const Step *step;
    Workspace *space;
    int segments;
    double marked; /* when the last phase ended, or the step began */
} Forward;

static inline double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

/* Ends a phase: all threads are done with it. */
static void end_phase(Team *team, int thread, Forward *f, int phase)
{
    team_barrier(team);
    if (thread || !f->step->seconds)
        return;
    double end = now();
    f->step->seconds[phase] += end - f->marked;
    f->marked = end;
}

#endif
