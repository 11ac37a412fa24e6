/* The entry points of one target: included last by each target_*.c. */

#include "forward.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

typedef struct {
    const Linear *linear;
    const real *x;
    float *y;
    int rows, width;
} Product;

static void product_run(Team *team, int thread, void *argument)
{
    const Product *p = argument;
    int units = weight_units(p->linear);
    (void)thread;
    for (int unit; (unit = team_next(team)) < units;)
        product_unit(p->linear, unit, p->x, p->rows, p->y, p->width);
}

void JOIN(product_, TARGET)(Team *team, const Linear *linear, const void *x, int rows, float *y)
{
    Product product = {linear, x, y, rows, 0};
    for (int i = 0; i < linear->parts; i++)
        product.width += linear->weights[i].rows;
    team_run(team, product_run, &product);
}

void JOIN(forward_, TARGET)(Team *team, Forward *f)
{
    team_run(team, forward, f);
}
