/* The router's inner loops, for a handful of microseconds each: see native.py, which has the same
   in numpy. The order of a row's sum is its own, whatever is beside it. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Compiled for several processors; the loader takes the best that runs. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#define LANES 32

/* To be raised with every change of what a function takes: a library of another version is left
   alone. */
int mora_router_version(void)
{
    return 1;
}

/* out[i] = rows[i] . z over k numbers. */
CLONES void mora_int8_products(const int8_t *const *rows, int n, const float *z, int k, float *out)
{
    for (int i = 0; i < n; i++) {
        const int8_t *row = rows[i];
        float part[LANES] = {0};
        int j = 0;
        for (; j + LANES <= k; j += LANES)
            for (int lane = 0; lane < LANES; lane++)
                part[lane] += (float)row[j + lane] * z[j + lane];
        for (; j < k; j++)
            part[0] += (float)row[j] * z[j];
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                part[lane] += part[lane + half];
        out[i] = part[0];
    }
}

/* out[k] = sum over i of values[i] * rows[index[i]][k], in the order of i. */
CLONES void mora_weighted_sum(const float *rows, const int64_t *index, const float *values, int n,
                              int k, float *out)
{
    memset(out, 0, k * sizeof(float));
    for (int i = 0; i < n; i++) {
        const float *row = rows + (size_t)index[i] * k;
        for (int j = 0; j < k; j++)
            out[j] += values[i] * row[j];
    }
}

static size_t bucket(uint64_t hash, uint64_t dim)
{
    hash = (hash ^ (hash >> 31)) * 0xBF58476D1CE4E5B9u;
    return (hash >> 33) % dim;
}

/* Adds to counts[dim] what hashes and, after them, the n-grams of `length` bytes of text weigh,
   the shortest first. An n-gram has no space inside, but may begin and end with one; it weighs
   what its second byte does. */
void mora_count_ngrams(const uint64_t *hashes, const double *weights, int hashed,
                       const uint8_t *text, const double *weight, int length, int shortest,
                       int longest, int dim, double *counts)
{
    for (int i = 0; i < hashed; i++)
        counts[bucket(hashes[i], dim)] += weights[i];
    for (int n = shortest; n <= longest; n++)
        for (int i = 0; i + n <= length; i++) {
            uint64_t hash = text[i];
            int whole = 1;
            for (int j = 1; j < n; j++) {
                hash = hash * 0x9E3779B97F4A7C15u + text[i + j];
                whole &= j == n - 1 || text[i + j] != 0x20;
            }
            if (whole)
                counts[bucket(hash + n, dim)] += weight[i + 1];
        }
}
