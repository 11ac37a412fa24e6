/* What Python calls: a team of threads, a workspace that grows, and the target that the processor
   can run, chosen once. */

#define _GNU_SOURCE
#define BF16 0
#include "batch.h"

#include <stdlib.h>

#define DECLARE(target)                                                                            \
    void product_##target(Team *, const Linear *, const void *, int, float *);                     \
    void forward_##target(Team *, Forward *);

DECLARE(plain)
#if defined(__x86_64__)
DECLARE(avx512bf16)
DECLARE(avx512)
DECLARE(avx2)
#endif

typedef struct {
    const char *name;
    int real_size;
    void (*product)(Team *, const Linear *, const void *, int, float *);
    void (*forward)(Team *, Forward *);
} Target;

#define ENTRY(target, size) {#target, size, product_##target, forward_##target}

static const Target TARGETS[] = {
#if defined(__x86_64__)
    ENTRY(avx512bf16, 2), ENTRY(avx512, 4), ENTRY(avx2, 4),
#endif
    ENTRY(plain, 4),
};

static int can_run(const Target *target)
{
#if defined(__x86_64__)
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(target->name, "avx512bf16"))
        return avx512 && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(target->name, "avx512"))
        return avx512;
    if (!strcmp(target->name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return 1;
}

typedef struct {
    const Target *target;
    Team *team;
    Workspace space;
} Native;

/* The name of number `index` of the targets whose reals have this many bytes and which the
   processor runs, best first; NULL when there are no more. */
const char *mora_target(int real_size, int index)
{
    for (size_t i = 0; i < sizeof TARGETS / sizeof *TARGETS; i++)
        if (TARGETS[i].real_size == real_size && can_run(&TARGETS[i]) && index-- == 0)
            return TARGETS[i].name;
    return NULL;
}

/* Sizes of the structures in the order of library.py, then the number of phases: what Python's side
   has to agree with. */
size_t mora_layout(int index)
{
    static const size_t LAYOUT[] = {sizeof(Weight), sizeof(Linear), sizeof(Projection),
                                    sizeof(Layer),  sizeof(Model),  sizeof(Chunk),
                                    sizeof(Step),   sizeof(Piece),  PHASES};
    return index < (int)(sizeof LAYOUT / sizeof *LAYOUT) ? LAYOUT[index] : 0;
}

Native *mora_new(const char *target, int threads)
{
    Native *native = calloc(1, sizeof(Native));
    if (!native)
        return NULL;
    for (size_t i = 0; i < sizeof TARGETS / sizeof *TARGETS; i++)
        if (!strcmp(TARGETS[i].name, target))
            native->target = &TARGETS[i];
    native->team = team_new(threads);
    if (native->target && native->team)
        return native;
    free(native);
    return NULL;
}

static void free_space(Workspace *s)
{
    void *all[] = {s->row, s->segment, s->order, s->pair_row, s->pair_slot, s->pair_weight,
                   s->h, s->y, s->q, s->inner, s->x, s->wide, s->attended, s->ordered,
                   s->scores};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    memset(s, 0, sizeof *s);
}

void mora_free(Native *native)
{
    team_free(native->team);
    free_space(&native->space);
    free(native);
}

int mora_threads(const Native *native)
{
    return team_size(native->team);
}

static void *block(size_t size)
{
    return aligned_alloc(64, (size + 127) / 64 * 64);
}

static int grow(Workspace *s, const Model *m, size_t rows, size_t pairs, size_t real_size,
                int threads)
{
    if (rows <= s->rows && pairs <= s->pairs)
        return 1;
    /* Steps of many rows and of many pairs may alternate: neither takes from the other. */
    rows = rows > s->rows ? rows + rows / 4 : s->rows;
    pairs = pairs > s->pairs ? pairs + pairs / 4 : s->pairs;
    free_space(s);
    s->rows = rows, s->pairs = pairs;
    size_t heads = (size_t)m->heads * m->head_dim, inner = m->intermediate, hidden = m->hidden;
    size_t qkv = heads + 2 * (size_t)m->kv_heads * m->head_dim;
    size_t most = qkv > 2 * inner ? qkv : 2 * inner;
    most = most > hidden ? most : hidden;
    size_t widest = inner > hidden ? inner : hidden;
    widest = widest > heads ? widest : heads;
    pairs = pairs ? pairs : 1;
    s->score_size = (size_t)(m->heads / m->kv_heads) * m->max_context;
    s->row = block(rows * sizeof(Row));
    s->segment = block(pairs * sizeof(Segment));
    s->order = block(pairs * sizeof(int));
    s->pair_row = block(pairs * sizeof(int));
    s->pair_slot = block(pairs * sizeof(int));
    s->pair_weight = block(pairs * sizeof(float));
    s->h = block(rows * hidden * sizeof(float));
    s->y = block(rows * most * sizeof(float));
    s->q = block(rows * heads * real_size);
    s->inner = block(pairs * 3 * m->max_rank * sizeof(float));
    s->x = block(rows * hidden * real_size);
    s->wide = block(rows * (inner > hidden ? inner : hidden) * real_size);
    s->attended = block(rows * heads * real_size);
    int ordered = 0;
    for (int l = 0; l < m->layers && m->layer; l++)
        for (int site = 0; site < SITES; site++)
            ordered |= m->layer[l].sites[site].order != NULL;
    s->ordered = block(ordered ? rows * widest * real_size : 1);
    s->scores = block(threads * s->score_size * sizeof(float));
    int ok = s->row && s->segment && s->order && s->pair_row && s->pair_slot && s->pair_weight
             && s->h && s->y && s->q && s->inner && s->x && s->wide && s->attended && s->ordered
             && s->scores;
    if (!ok)
        free_space(s);
    return ok;
}

/* Rows from chunks, (row, adapter) pairs from their mixtures, and the pairs sorted by adapter. */
static int lay_out(Workspace *s, const Model *m, const Step *step)
{
    int row = 0, pairs = 0, segments = 0;
    for (int c = 0; c < step->chunks; c++) {
        const Chunk *chunk = &step->chunk[c];
        for (int i = 0; i < chunk->length; i++, row++) {
            s->row[row] = (Row){chunk, chunk->start + i, pairs};
            for (int a = 0; a < chunk->adapters; a++, pairs++) {
                s->pair_row[pairs] = row;
                s->pair_slot[pairs] = step->mixture_slot[chunk->mixture + a];
                s->pair_weight[pairs] = step->mixture_weight[chunk->mixture + a];
            }
        }
    }
    int first = 0;
    for (int slot = 0; slot < m->slots && first < pairs; slot++) {
        int count = 0;
        for (int p = 0; p < pairs; p++)
            if (s->pair_slot[p] == slot)
                s->order[first + count++] = p;
        if (count)
            s->segment[segments++] = (Segment){slot, first, count};
        first += count;
    }
    return segments;
}

/* Runs one step; 0 when there is no memory for it. Not for two threads at once. */
int mora_forward(Native *native, const Model *model, const Step *step)
{
    size_t pairs = 0;
    int threads = team_size(native->team);
    for (int c = 0; c < step->chunks; c++)
        pairs += (size_t)step->chunk[c].length * step->chunk[c].adapters;
    if (!grow(&native->space, model, step->rows, pairs, native->target->real_size, threads))
        return 0;
    Forward forward = {.model = model, .step = step, .space = &native->space, .marked = now()};
    forward.segments = lay_out(&native->space, model, step);
    native->target->forward(native->team, &forward);
    return 1;
}

/* x real [rows][in] times a linear layer, without its bias -> y float [rows][out]. */
void mora_product(Native *native, const Linear *linear, const void *x, int rows, float *y)
{
    native->target->product(native->team, linear, x, rows, y);
}

/* Codes as bitsandbytes packs them, [rows][columns / 2] with the earlier input in the high half of
   a byte, to tiles (see product.h). */
void mora_tile(const uint8_t *codes, int rows, int columns, uint8_t *tiles)
{
    for (int row = 0; row < rows; row++) {
        const uint8_t *in = codes + (size_t)row * (columns / 2);
        uint8_t *out = tiles + (size_t)(row / LANES) * (columns / 8) * CODE_GROUP
                       + 4 * (row % LANES);
        for (int g = 0; g < columns / 8; g++, in += 4, out += CODE_GROUP) {
            uint32_t word = 0;
            for (int k = 0; k < 8; k++) {
                uint32_t code = k % 2 ? in[k / 2] & 15 : in[k / 2] >> 4;
                word |= code << (4 * (k / 2) + 16 * (k % 2));
            }
            memcpy(out, &word, sizeof word);
        }
    }
}

/* Rows first .. last of an NF4 or INT4 weight as floats [last - first][columns]. */
void mora_untile(const Weight *w, int first, int last, float *out)
{
    const float *values = code_values(w->kind);
    size_t spans = (w->columns + w->span - 1) / w->span;
    for (int row = first; row < last; row++) {
        int lane = row % LANES;
        const uint8_t *in = (const uint8_t *)w->weights
                            + (size_t)(row / LANES) * (w->columns / 8) * CODE_GROUP + 4 * lane;
        for (int k = 0; k < w->columns; k++) {
            uint32_t word;
            memcpy(&word, in + (size_t)(k / 8) * CODE_GROUP, sizeof word);
            int code = word >> (4 * (k % 8 / 2) + 16 * (k % 2)) & 15;
            size_t at = ((row / LANES) * spans + k / w->span) * LANES + lane;
            *out++ = values[code] * w->scales[at] + (w->offsets ? w->offsets[at] : 0);
        }
    }
}
