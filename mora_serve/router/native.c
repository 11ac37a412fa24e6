/* The router's inner loops, for some microseconds each: see native.py. key_search.py, projection.py
   and counting.py have the same in numpy. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Compiled for several processors; the loader takes the best that runs. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#define MOST_CODE 16383.0f /* of a query in 15 bits */
#define LEAST 1e-15 /* shorter vectors are nothing: their scale would not be a number */

/* Inlined, so that each clone has its own. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

static uint32_t crc_table[256];

/* To be asked first. To be raised with every change of what a function takes: a library of another
   version is left alone. */
int mora_router_version(void)
{
    for (int i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? 0xEDB88320u ^ (crc >> 1) : crc >> 1;
        crc_table[i] = crc;
    }
    return 3;
}

/* Integers: the same bits in any order. */
INLINE int32_t dot(const int8_t *restrict row, const int16_t *restrict z, int k)
{
    int32_t sum = 0;
    for (int j = 0; j < k; j++)
        sum += (int16_t)row[j] * z[j];
    return sum;
}

/* z as codes times what is returned, so that no sum of products with int8 overflows. */
INLINE float quantised(const float *z, int k, int16_t *codes)
{
    float most = 0, limit = (float)(INT32_MAX / 128 / k);
    for (int j = 0; j < k; j++)
        most = fabsf(z[j]) > most ? fabsf(z[j]) : most;
    limit = limit < MOST_CODE ? limit : MOST_CODE;
    float factor = most > LEAST ? limit / most : 0;
    for (int j = 0; j < k; j++)
        codes[j] = (int16_t)rintf(z[j] * factor);
    return most / limit;
}

/* Of the keys at[n], below `keys`, those with the `count` largest products of centre and z, and all
   that equal the last of them -> found, in order, and their products -> values, both with room for
   n. How many these are is returned, or -1 for a position that is not below `keys`. */
CLONES int mora_search(const int8_t *const *centres, const float *const *scales, int keys,
                       const int64_t *at, int n, const float *z, int k, int count, float *values,
                       int64_t *found)
{
    int16_t codes[k];
    float top[count], unit = quantised(z, k, codes);
    int held = 0, size = 0;
    for (int i = 0; i < n; i++) {
        if (at[i] < 0 || at[i] >= keys)
            return -1;
        float value = values[i] = (float)dot(centres[at[i]], codes, k) * (unit * scales[at[i]][0]);
        if (held == count && value <= top[held - 1])
            continue;
        held += held < count;
        int place = held - 1;
        for (; place && top[place - 1] < value; place--)
            top[place] = top[place - 1];
        top[place] = value;
    }
    for (int i = 0; i < n; i++)
        if (values[i] >= top[held - 1]) {
            values[size] = values[i];
            found[size++] = at[i];
        }
    return size;
}

/* Of the keys at[n], below `keys`: the product of z with the centre, and the largest with one of
   `count` prototypes. Returns 0, or -1 for a position that is not below `keys`. */
CLONES int mora_scores(const int8_t *const *centres, const int8_t *const *prototypes,
                       const float *const *scales, int keys, const int64_t *at, int n, int count,
                       const float *z, int k, float *cosines, float *nearest)
{
    int16_t codes[k];
    float unit = quantised(z, k, codes);
    for (int i = 0; i < n; i++) {
        if (at[i] < 0 || at[i] >= keys)
            return -1;
        const int8_t *rows = prototypes[at[i]];
        const float *scale = scales[at[i]];
        cosines[i] = (float)dot(centres[at[i]], codes, k) * (unit * scale[0]);
        for (int j = 0; j < count; j++) {
            float value = (float)dot(rows + (size_t)j * k, codes, k) * (unit * scale[1 + j]);
            if (!j || value > nearest[i])
                nearest[i] = value;
        }
    }
    return 0;
}

INLINE void add_row(const int8_t *restrict row, float value, int k, float *restrict out)
{
    for (int j = 0; j < k; j++)
        out[j] += value * row[j];
}

/* out[k] = out[k] * scales[k] - offset[k], at length 1 unless it is nothing. */
INLINE void finish(const float *restrict scales, const float *restrict offset, int k,
                   float *restrict out)
{
    double norm = 0;
    for (int j = 0; j < k; j++) {
        out[j] = out[j] * scales[j] - offset[j];
        norm += (double)out[j] * out[j];
    }
    double factor = norm > LEAST * LEAST ? 1 / sqrt(norm) : 0;
    for (int j = 0; j < k; j++)
        out[j] = (float)(out[j] * factor);
}

/* The unit vector [k] of features: values[i] times rows[index[i]][k], and as `finish` says. */
CLONES void mora_embed(const int8_t *rows, const float *scales, const float *offset, int k,
                       const int64_t *index, const float *values, int n, float *out)
{
    memset(out, 0, k * sizeof(float));
    for (int i = 0; i < n; i++)
        add_row(rows + (size_t)index[i] * k, values[i], k, out);
    finish(scales, offset, k, out);
}

#define SPACE 0x20
#define MIX 0x9E3779B97F4A7C15u
#define QUOTED ((uint64_t)1 << 40) /* beyond the hash of any word */
#define END ((uint64_t)1 << 41)

/* As zlib's. */
static uint32_t crc32(const uint8_t *data, int length)
{
    uint32_t crc = 0xFFFFFFFFu;
    for (int i = 0; i < length; i++)
        crc = crc_table[(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
    return ~crc;
}

static void add(double *counts, int dim, uint64_t hash, double weight)
{
    hash = (hash ^ (hash >> 31)) * 0xBF58476D1CE4E5B9u;
    counts[(hash >> 33) % (uint64_t)dim] += weight;
}

/* The end of the word that starts at or after `*start`, which is set; 0 where there is none. */
static int next_word(const uint8_t *text, int length, int *start)
{
    while (*start < length && text[*start] == SPACE)
        ++*start;
    int end = *start;
    while (end < length && text[end] != SPACE)
        end++;
    return *start < length ? end : 0;
}

/* Puts spaces in the place of words outside quotations whose hash is in words[n], which is sorted;
   whether a word outside quotations is left. */
int mora_without(uint8_t *text, const double *weight, int length, const uint32_t *words, int n)
{
    int left = 0;
    for (int start = 0, end; (end = next_word(text, length, &start)); start = end) {
        if (weight[start] < 1)
            continue;
        uint32_t hash = crc32(text + start, end - start);
        int low = 0, high = n;
        while (low < high) {
            int middle = (low + high) / 2;
            if (words[middle] < hash)
                low = middle + 1;
            else
                high = middle;
        }
        if (low < n && words[low] == hash)
            memset(text + start, SPACE, end - start);
        else
            left = 1;
    }
    return left;
}

/* Adds to counts[dim] what a text's words weigh, then neighbouring words (`pairs` each), then the
   n-grams of `shortest` to `longest` bytes. A word weighs what its first byte does. Quoted words in
   a row are one neighbour, whatever they are, and the text's ends another. An n-gram has no space
   inside, but may begin and end with one; it weighs what its second byte does. */
static void count_features(const uint8_t *text, const double *weight, int length, double pairs,
                           int shortest, int longest, int dim, double *counts)
{
    int some = 0;
    for (int start = 0, end; (end = next_word(text, length, &start)); start = end, some = 1)
        add(counts, dim, crc32(text + start, end - start), weight[start]);
    uint64_t before = END;
    if (some && pairs > 0) {
        for (int start = 0, end; (end = next_word(text, length, &start)); start = end) {
            int quoted = weight[start] < 1;
            uint64_t hash = quoted ? QUOTED : crc32(text + start, end - start);
            if (quoted && before == QUOTED)
                continue;
            add(counts, dim, before * MIX + hash, pairs);
            before = hash;
        }
        add(counts, dim, before * MIX + END, pairs);
    }
    for (int n = shortest; n <= longest; n++)
        for (int i = 0; i + n <= length; i++) {
            uint64_t hash = text[i];
            int whole = 1;
            for (int j = 1; j < n; j++) {
                hash = hash * MIX + text[i + j];
                whole &= j == n - 1 || text[i + j] != SPACE;
            }
            if (whole)
                add(counts, dim, hash + n, weight[i + 1]);
        }
}

void mora_features(const uint8_t *text, const double *weight, int length, double pairs,
                   int shortest, int longest, int dim, double *counts)
{
    count_features(text, weight, length, pairs, shortest, longest, dim, counts);
}

/* The unit vector [k] of a text: log(1 + count) of each bucket, at length 1 together, times its row.
   Zeros where nothing was counted. counts[dim] is zeros before. */
CLONES void mora_embed_text(const int8_t *rows, const float *scales, const float *offset, int k,
                            const uint8_t *text, const double *weight, int length, double pairs,
                            int shortest, int longest, int dim, double *counts, float *out)
{
    count_features(text, weight, length, pairs, shortest, longest, dim, counts);
    double norm = 0;
    for (int i = 0; i < dim; i++)
        if (counts[i] != 0) {
            counts[i] = log1p(counts[i]);
            norm += counts[i] * counts[i];
        }
    memset(out, 0, k * sizeof(float));
    if (norm == 0)
        return;
    norm = sqrt(norm);
    for (int i = 0; i < dim; i++)
        if (counts[i] != 0)
            add_row(rows + (size_t)i * k, (float)(counts[i] / norm), k, out);
    finish(scales, offset, k, out);
}
