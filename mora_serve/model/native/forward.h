/* One forward of a decoder of the Llama shape over a batch of chunks, adapters included.

   All threads of the team go through `forward` together. Between two barriers work is handed out in
   units: some tiles of a weight for all rows, a row, or a row and a group of heads. The residual
   stream is float; what enters a product is `real`. */

#include "adapter.h"
#include "attention.h"
#include "row.h"

enum { TILES = 4, PRODUCT_ROWS = 64, SEGMENT = 512 };

/* y [rows][16 n] = rows of x times n tiles of a weight, from tile `first` on. */
static void weight_tiles(const Weight *w, const real *x, int rows, int first, int n, float *y,
                         size_t y_stride)
{
    int out = first * LANES;
    size_t stride = w->columns;
    if (w->kind != DENSE) {
        size_t size = (size_t)w->columns / 8 * group_bytes(w->kind);
        const uint8_t *tile = (const uint8_t *)w->weights + first * size;
        Tiles tiles = {tile, w->scales, w->offsets, w->columns, w->span};
        int rest = w->rows - out < n * LANES ? w->rows % LANES : 0, whole = rest ? n - 1 : n;
        if (w->kind != TILED) {
            size_t scales = (size_t)first * spans(&tiles) * LANES;
            tiles.scales += scales;
            tiles.offsets += w->offsets ? scales : 0;
        }
        if (whole)
            tile_product(w->kind, w->block, x, stride, rows, tiles, whole, y + out, y_stride);
        if (rest) { /* TILED: the last tile's zeros have no place in y */
            float last[PRODUCT_ROWS][LANES];
            tiles.codes += whole * size;
            tile_product(w->kind, w->block, x, stride, rows, tiles, 1, *last, LANES);
            for (int r = 0; r < rows; r++)
                memcpy(y + r * y_stride + out + whole * LANES, last[r], rest * sizeof(float));
        }
        return;
    }
    int width = w->rows - out < n * LANES ? w->rows - out : n * LANES;
    const real *xs[PRODUCT_ROWS];
    float *ys[PRODUCT_ROWS];
    for (int r = 0; r < rows; r++) {
        xs[r] = x + r * stride;
        ys[r] = y + r * y_stride + out;
    }
    dot_products(xs, rows, (const real *)w->weights + (size_t)out * w->columns, w->columns, width,
                 w->columns, ys);
}

static int weight_units(const Linear *linear)
{
    int units = 0;
    for (int i = 0; i < linear->parts; i++)
        units += (linear->weights[i].rows + TILES * LANES - 1) / (TILES * LANES);
    return units;
}

/* Unit number `unit` of the product x [rows][in] -> y [rows][out]. */
static void product_unit(const Linear *linear, int unit, const real *x, int rows, float *y,
                         size_t y_stride)
{
    for (int i = 0; i < linear->parts; i++) {
        const Weight *w = &linear->weights[i];
        int tiles = (w->rows + LANES - 1) / LANES, units = (tiles + TILES - 1) / TILES;
        if (unit >= units) {
            unit -= units;
            y += w->rows;
            continue;
        }
        int last = (unit + 1) * TILES < tiles ? (unit + 1) * TILES : tiles;
        for (int from = 0; from < rows; from += PRODUCT_ROWS) {
            int count = rows - from < PRODUCT_ROWS ? rows - from : PRODUCT_ROWS;
            weight_tiles(w, x + (size_t)from * w->columns, count, unit * TILES,
                         last - unit * TILES, y + from * y_stride, y_stride);
        }
        return;
    }
}

static void reorder(const int32_t *order, int n, const real *x, real *out)
{
    for (int i = 0; i < n; i++)
        out[i] = x[order[i]];
}

/* A site's product and the first half of its adapters' for all rows, up to the barrier. */
static void site_products(Team *team, int thread, Forward *f, int layer, int site,
                          const real *x, float *y)
{
    const Linear *linear = &f->model->layer[layer].sites[site];
    const Projection *projections = f->model->layer[layer].projections[site];
    int columns = linear->weights[0].columns, shrinks = shrink_units(f);
    int units = shrinks + weight_units(linear), width = 0;
    for (int i = 0; i < linear->parts; i++)
        width += linear->weights[i].rows;
    const real *in = x;
    if (linear->order) { /* the adapters' A have the inputs as they are */
        for (int r; (r = team_next(team)) < f->step->rows;)
            reorder(linear->order, columns, x + (size_t)r * columns,
                    f->space->ordered + (size_t)r * columns);
        team_barrier(team);
        in = f->space->ordered;
    }
    for (int unit; (unit = team_next(team)) < units;) {
        if (unit < shrinks)
            shrink_unit(f, projections, unit, x, columns);
        else
            product_unit(linear, unit - shrinks, in, f->step->rows, y, width);
    }
    static const int PHASE[SITES] = {QKV_PRODUCT, O_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT};
    end_phase(team, thread, f, PHASE[site]);
}

/* h += y with the adapters' part of a site that has one projection; y is used up. */
static void add_row(Forward *f, int layer, int site, const Row *row, float *y, float *h)
{
    const Layer *l = &f->model->layer[layer];
    int hidden = f->model->hidden;
    expand(f, &l->projections[site][0], 0, row, y, 0, hidden, l->sites[site].bias);
    for (int i = 0; i < hidden; i++)
        h[i] += y[i];
}

/* The gate's and the up projection's outputs first .. first + width -> silu(gate) * up. */
static void swiglu(Forward *f, int layer, const Row *row, float *y, int first, int width,
                   real *out)
{
    const Layer *l = &f->model->layer[layer];
    const Projection *p = l->projections[GATE_UP];
    int n = f->model->intermediate, i = 0;
    const real *bias = l->sites[GATE_UP].bias;
    float *gate = y + first, *up = y + n + first;
    expand(f, &p[0], 0, row, gate, first, width, bias);
    expand(f, &p[1], 1, row, up, first, width, bias ? bias + n : NULL);
    for (; i + VL <= width; i += VL)
        store_real(out + i, silu(load(gate + i)) * load(up + i));
    for (; i < width; i++)
        out[i] = from_float(gate[i] / (1.0f + expf(-gate[i])) * up[i]);
}

static void embed(const Model *m, int token, float *h)
{
    if (m->embedding.kind == TILED) {
        const uint32_t *pair = (const uint32_t *)m->embedding.weights + token % LANES
                               + (size_t)(token / LANES) * m->hidden / 2 * LANES;
        for (int i = 0; i < m->hidden; i += 2, pair += LANES) {
            uint32_t two[2] = {*pair << 16, *pair & 0xffff0000};
            memcpy(h + i, two, sizeof two);
        }
        return;
    }
    const real *row = (const real *)m->embedding.weights + (size_t)token * m->hidden;
    for (int i = 0; i < m->hidden; i++)
        h[i] = to_float(row[i]);
}

/* --- all of it ------------------------------------------------------------------------------- */

static void run_layer(Team *team, int thread, Forward *f, int layer)
{
    const Model *m = f->model;
    const Layer *l = &m->layer[layer];
    Workspace *s = f->space;
    int rows = f->step->rows, hidden = m->hidden, inner = m->intermediate;
    int q_width = m->heads * m->head_dim, width = q_width + 2 * m->kv_heads * m->head_dim;
    int units = rows * m->kv_heads, pieces = (inner + SEGMENT - 1) / SEGMENT;

    site_products(team, thread, f, layer, QKV, s->x, s->y);
    for (int unit; (unit = team_next(team)) < units;) {
        int r = unit / m->kv_heads;
        write_heads(f, layer, r, unit % m->kv_heads, s->y + (size_t)r * width);
    }
    end_phase(team, thread, f, HEADS);
    for (int unit; (unit = team_next(team)) < units;) {
        attend(f, layer, unit / m->kv_heads, unit % m->kv_heads,
               s->scores + thread * s->score_size);
    }
    end_phase(team, thread, f, ATTENTION);

    site_products(team, thread, f, layer, O, s->attended, s->y);
    for (int r; (r = team_next(team)) < rows;) {
        float *y = s->y + (size_t)r * hidden, *h = s->h + (size_t)r * hidden;
        add_row(f, layer, O, &s->row[r], y, h);
        norm_row(h, l->post_norm, hidden, m->eps, y, s->x + (size_t)r * hidden);
    }
    end_phase(team, thread, f, O_ROWS);

    site_products(team, thread, f, layer, GATE_UP, s->x, s->y);
    for (int unit; (unit = team_next(team)) < rows * pieces;) {
        int r = unit / pieces, first = unit % pieces * SEGMENT;
        int count = inner - first < SEGMENT ? inner - first : SEGMENT;
        swiglu(f, layer, &s->row[r], s->y + (size_t)r * 2 * inner, first, count,
               s->wide + (size_t)r * inner + first);
    }
    end_phase(team, thread, f, SWIGLU);

    site_products(team, thread, f, layer, DOWN, s->wide, s->y);
    const real *next = layer + 1 < m->layers ? m->layer[layer + 1].input_norm : m->norm;
    for (int r; (r = team_next(team)) < rows;) {
        float *y = s->y + (size_t)r * hidden, *h = s->h + (size_t)r * hidden;
        add_row(f, layer, DOWN, &s->row[r], y, h);
        norm_row(h, next, hidden, m->eps, y, s->x + (size_t)r * hidden);
    }
    end_phase(team, thread, f, DOWN_ROWS);
}

static void judge(const float *logits, int n, int32_t *best, int32_t *finite)
{
    vf most = splat(-INFINITY), zero = splat(0);
    int i = 0, ok = 1;
    for (; i + VL <= n; i += VL) {
        vf x = load(logits + i);
        most = select_vf(x > most, x, most);
        zero += x * 0.0f; /* NaN unless x is finite */
    }
    float greatest_ = greatest(most), check = sum(zero);
    for (; i < n; i++) {
        greatest_ = logits[i] > greatest_ ? logits[i] : greatest_;
        check += logits[i] * 0.0f;
    }
    ok = check == 0.0f;
    *finite = ok;
    *best = 0;
    for (i = 0; ok && i < n; i++)
        if (logits[i] == greatest_) {
            *best = i;
            break;
        }
}

static void forward(Team *team, int thread, void *argument)
{
    Forward *f = argument;
    const Model *m = f->model;
    const Step *step = f->step;
    Workspace *s = f->space;
    for (int r; (r = team_next(team)) < step->rows;) {
        float *h = s->h + (size_t)r * m->hidden;
        embed(m, step->tokens[r], h);
        norm_row(h, m->layer[0].input_norm, m->hidden, m->eps, s->y + (size_t)r * m->hidden,
                 s->x + (size_t)r * m->hidden);
    }
    end_phase(team, thread, f, EMBEDDING);
    for (int layer = 0; layer < m->layers; layer++)
        run_layer(team, thread, f, layer);
    for (int i; (i = team_next(team)) < step->wanted;) {
        const real *x = s->x + (size_t)step->wanted_rows[i] * m->hidden;
        real *out = s->wide + (size_t)i * m->hidden;
        if (m->head.order)
            reorder(m->head.order, m->hidden, x, out);
        else
            memcpy(out, x, m->hidden * sizeof(real));
    }
    team_barrier(team);
    int units = weight_units(&m->head);
    for (int unit; step->wanted && (unit = team_next(team)) < units;)
        product_unit(&m->head, unit, s->wide, step->wanted, step->logits, m->vocabulary);
    end_phase(team, thread, f, HEAD_PRODUCT);
    for (int i; (i = team_next(team)) < step->wanted;)
        judge(step->logits + (size_t)i * m->vocabulary, m->vocabulary, step->best + i,
              step->finite + i);
    end_phase(team, thread, f, JUDGEMENT);
}
