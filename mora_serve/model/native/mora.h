/* What Python hands to the native CPU path; the fields mirror the structures of library.py.

   Activations and weights are `real`: bfloat16 or float, as the target was compiled. Outputs of
   products and the residual stream are float. Nothing here is owned: all memory is Python's,
   except the workspace and the team of threads. */

#ifndef MORA_H
#define MORA_H

#include <stddef.h>
#include <stdint.h>

#define LANES 16      /* outputs of one tile of a weight */
#define BLOCK 64      /* inputs that are summed before they are scaled */
#define HALF_BLOCK 32
#define CODE_GROUP 64 /* bytes of 16 outputs x 8 inputs: see product.h */
#define TILED_GROUP 256

enum { DENSE = 0, NF4 = 1, TILED = 2, INT4 = 3 };

typedef struct {
    int32_t kind, rows, columns;
    int32_t block, span;  /* NF4, INT4: inputs summed at once; inputs that share a scale, blocks */
    const void *weights;  /* DENSE: real [rows][columns]; the others: see product.h */
    const float *scales;  /* NF4, INT4: [rows / 16][columns / span, rounded up][16] */
    const float *offsets; /* INT4: as scales, or NULL if all are 0 */
} Weight;

typedef struct {
    int32_t parts;
    const Weight *weights; /* stacked along the output */
    const void *bias;      /* real [rows], or NULL */
    const int32_t *order;  /* [columns] input j of the weights is x[order[j]]; or NULL: x[j] */
} Linear;

/* One projection of one layer in all adapter slots, see model/lora.py. */
typedef struct {
    int32_t start, width; /* where its outputs begin in the site, and how many */
    const void *a;        /* real [slots][max_rank][in] */
    const void *b;        /* real [slots][max_rank][width] */
    const void *dora;     /* real [slots][width], or NULL */
} Projection;

enum { QKV, O, GATE_UP, DOWN, SITES };

typedef struct {
    const void *input_norm, *post_norm, *q_norm, *k_norm; /* the last two may be NULL */
    Linear sites[SITES];
    Projection projections[SITES][3];
    void *keys, *values; /* real [kv_heads][pages][page_size][head_dim] */
} Layer;

typedef struct {
    int32_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary;
    int32_t max_context, window; /* window 0: none */
    float eps;
    Weight embedding;             /* [vocabulary][hidden], not NF4 */
    const void *norm;             /* real [hidden] */
    const void *cos, *sin;        /* real [positions][head_dim] */
    Linear head;
    const Layer *layer;
    int32_t pages, page_size;
    int32_t slots, max_rank;
    const int32_t *ranks, *has_dora; /* of each slot */
} Model;

/* Consecutive tokens of one sequence. */
typedef struct {
    int32_t start, length;    /* position of the first token, number of tokens */
    int32_t table;            /* where the page table begins in `pages` */
    int32_t mixture, adapters; /* where its mixture begins in `mixture_*`, and its size */
} Chunk;

typedef struct {
    int32_t chunks, rows, wanted;
    const Chunk *chunk;
    const int32_t *tokens, *pages;         /* of all chunks, end to end */
    const int32_t *mixture_slot;
    const float *mixture_weight;
    const int32_t *wanted_rows;            /* rows whose logits are asked for, ascending */
    float *logits;                         /* [wanted][vocabulary] */
    int32_t *best;                         /* [wanted] the first of the greatest logits */
    int32_t *finite;                       /* [wanted] whether all logits are finite */
    double *seconds;                       /* [PHASES] time spent is added; or NULL */
} Step;

/* A tensor of an adapter's file, [rows][columns] of `type`, not aligned, all of it finite; and where
   it goes, as bfloat16 or float, [columns][rows] if transposed. */
enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef struct {
    const uint8_t *from;
    void *to;
    int32_t type, rows, columns, transposed, bf16;
    float scale;
} Piece;

/* What a step's time goes into. */
enum { EMBEDDING, QKV_PRODUCT, HEADS, ATTENTION, O_PRODUCT, O_ROWS, GATE_UP_PRODUCT, SWIGLU,
       DOWN_PRODUCT, DOWN_ROWS, HEAD_PRODUCT, JUDGEMENT, PHASES };

typedef struct Team Team;
typedef struct Workspace Workspace;

#endif
