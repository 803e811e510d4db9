/* Attention in float32 on the vector units of one processor: the scores of a block of queries never leave its cache.

   "FlashAttention-2" (2307.08691) divides the work the same way; here a row of scores is short enough to be held whole.
   Every product is one shape of `product`: rows of C are sums over k of a(r, k) * B[k][:], where a is read one number at
   a time and B by whole vectors. The order of the additions of one element depends neither on how many rows and
   sequences are computed together nor on the number of threads, so a sequence gives the same bits in any batch. */

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#if LANES == 16
#define ROWS 8 /* rows of a tile: ROWS * 3 sums are held in registers, beside 3 vectors of B */
#else
#define ROWS 4
#endif
#define QUERIES 32 /* queries of a block, half as many where heads are small */
#define KEYS 256   /* keys of a panel of transposed keys */

#define TILE(M, N)                                                                                                     \
    static inline __attribute__((always_inline)) void tile_##M##_##N(int64_t depth, const float *a, int64_t row,       \
                                                                     int64_t step, const float *b, int64_t width,      \
                                                                     float *c, int64_t out, int add) {                 \
        vec sum[M][N];                                                                                                 \
        for (int r = 0; r < M; r++)                                                                                    \
            for (int n = 0; n < N; n++) sum[r][n] = add ? load(c + r * out + n * LANES) : (vec){};                     \
        for (int64_t k = 0; k < depth; k++, a += step, b += width) {                                                   \
            vec right[N];                                                                                              \
            for (int n = 0; n < N; n++) right[n] = load(b + n * LANES);                                                \
            for (int r = 0; r < M; r++) {                                                                              \
                vec left = all(a[r * row]);                                                                            \
                for (int n = 0; n < N; n++) sum[r][n] += left * right[n];                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < M; r++)                                                                                    \
            for (int n = 0; n < N; n++) store(c + r * out + n * LANES, sum[r][n]);                                     \
    }
#define TILES(M) TILE(M, 1) TILE(M, 2) TILE(M, 3)
TILES(8) TILES(4) TILES(1)

#define COLUMNS(N)                                                                                                     \
    static void columns_##N(int64_t rows, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,    \
                            int64_t width, float *c, int64_t out, int add) {                                           \
        int64_t r = 0;                                                                                                 \
        if (ROWS == 8)                                                                                                 \
            for (; r + 8 <= rows; r += 8) tile_8_##N(depth, a + r * row, row, step, b, width, c + r * out, out, add);  \
        for (; r + 4 <= rows; r += 4) tile_4_##N(depth, a + r * row, row, step, b, width, c + r * out, out, add);      \
        for (; r < rows; r++) tile_1_##N(depth, a + r * row, row, step, b, width, c + r * out, out, add);              \
    }
COLUMNS(1) COLUMNS(2) COLUMNS(3)

/* C (rows, n) = [C +] sum over k < depth of a[r * row + k * step] * B[k * width + :]; n is a multiple of LANES. */
static void product(int64_t rows, int64_t n, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,
                    int64_t width, float *c, int64_t out, int add) {
    for (int64_t left = n / LANES; left;) {
        int take = left == 4 ? 2 : left < 3 ? (int)left : 3;
        if (take == 3)
            columns_3(rows, depth, a, row, step, b, width, c, out, add);
        else if (take == 2)
            columns_2(rows, depth, a, row, step, b, width, c, out, add);
        else
            columns_1(rows, depth, a, row, step, b, width, c, out, add);
        left -= take, b += take * LANES, c += take * LANES;
    }
}

typedef struct {
    int64_t batch, heads, kv_heads, queries, keys, size; /* size: of a head, a multiple of LANES */
    int64_t q[3], k[3], v[3], out[3];                    /* strides of batch, head, position; the last one is 1 */
    int64_t error[3], dq[3], dk[3], dv[3];               /* those of the gradients */
    int64_t mask[2], rope[2];                            /* strides of batch and query of the mask, of batch and position of the angles */
    float scale;
    int causal;
} shape;

static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

/* rows (n, size) from one stride to another; a call of memcpy for so few bytes would cost more than they do */
static void rows_to(const float *from, int64_t stride, int64_t n, int64_t size, float *to, int64_t out) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < size; i += LANES) store(to + r * out + i, load(from + r * stride + i));
}

/* Have rows ready in the second cache: their lines lie too far apart for a processor to see them coming. */
static void fetch(const float *from, int64_t stride, int64_t n, int64_t size) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(from + r * stride + i, 0, 2);
}

/* The same for rows that will be written. */
static void claim(const float *from, int64_t stride, int64_t n, int64_t size) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(from + r * stride + i, 1, 2);
}

/* The same with each pair (i, i + size / 2) of a row turned by its angle (cosines and sines (n, size / 2)), or back. */
static void turn(const float *from, int64_t stride, int64_t n, int64_t size, const float *cosine, const float *sine,
                 int64_t step, float way, float *to, int64_t out) {
    if (!cosine) {
        rows_to(from, stride, n, size, to, out);
        return;
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < size / 2; i += LANES) {
            vec c = load(cosine + r * step + i), s = load(sine + r * step + i) * way;
            vec first = load(from + r * stride + i), second = load(from + r * stride + size / 2 + i);
            store(to + r * out + i, first * c - second * s);
            store(to + r * out + size / 2 + i, second * c + first * s);
        }
}

/* the transpose of rows (n, size), in panels (size, KEYS); columns beyond n are 0 */
static void transpose(const float *rows, int64_t n, int64_t size, float *to) {
    for (int64_t first = 0; first < n; first += KEYS, to += size * KEYS) {
        int64_t here = lesser(KEYS, n - first), whole = here / 16 * 16;
        const float *from = rows + first * size;
        for (int64_t d = 0; d < size; d++) memset(to + d * KEYS + here, 0, 4 * (padded(here) - here));
        for (int64_t j = 0; j < whole; j += 16)
            for (int64_t d = 0; d < size; d++)
                for (int i = 0; i < 16; i++) to[d * KEYS + j + i] = from[(j + i) * size + d];
        for (int64_t j = whole; j < here; j++)
            for (int64_t d = 0; d < size; d++) to[d * KEYS + j] = from[j * size + d];
    }
}

/* out (rows, width) = left (rows, size) times the panels of a transpose, for columns begin..end */
static void against(const float *left, int64_t stride, int64_t rows, int64_t size, const float *panels, int64_t begin,
                    int64_t end, float *out, int64_t width) {
    for (int64_t first = begin; first < end; first = (first / KEYS + 1) * KEYS) {
        const float *panel = panels + first / KEYS * KEYS * size + first % KEYS;
        const int64_t last = lesser((first / KEYS + 1) * KEYS, end);
        product(rows, padded(last - first), size, left, stride, 1, panel, KEYS, out + first, width, 0);
    }
}

/* Where the keys begin (at a multiple of LANES) and end that a block of queries can see. */
static void seen(const shape *s, const uint8_t *mask, int64_t first, int64_t rows, int64_t *begin, int64_t *end) {
    *begin = 0, *end = s->keys;
    if (s->causal) *end = lesser(s->keys, first + rows + s->keys - s->queries);
    if (!mask) return;
    int64_t low = s->keys, high = 0;
    for (int64_t r = first; r < first + rows; r++) {
        const uint8_t *allowed = mask + r * s->mask[1];
        for (int64_t j = 0; j < low; j++)
            if (allowed[j]) low = j;
        for (int64_t j = s->keys; j > high; j--)
            if (allowed[j - 1]) {
                high = j;
                break;
            }
    }
    *begin = low / LANES * LANES, *end = high > *begin ? high : *begin;
}

/* Scores that may not be seen become -inf. */
static void hide(const shape *s, const uint8_t *mask, int64_t first, int64_t rows, int64_t begin, int64_t end,
                 float *scores, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * width;
        const uint8_t *allowed = mask ? mask + (first + r) * s->mask[1] : 0;
        for (int64_t j = begin; mask && j < end; j++) row[j] = allowed[j] ? row[j] : -INFINITY;
        int64_t own = s->causal ? lesser(end, first + r + 1 + s->keys - s->queries) : end;
        for (int64_t j = own; j < padded(end); j++) row[j] = -INFINITY;
    }
}

static _Thread_local float *space;
static _Thread_local int64_t room;

/* Memory that this thread keeps: fresh pages would cost as much as the products. */
static float *scratch(int64_t floats) {
    if (floats > room) {
        free(space);
        room = floats;
        if (posix_memalign((void **)&space, 64, 4 * (size_t)floats)) abort();
    }
    return space;
}

int cairn_attention_lanes(void) { return LANES; }

/* Queries and keys are turned by the angles of their positions, where there are any: then there are as many keys as queries.
   out, with the strides of the shape, and lse (batch, heads, queries): the logarithm of the sum of exponentials. A query that
   sees nothing gets 0 and +inf. */
void cairn_attention(const shape *s, const float *q, const float *k, const float *v, const uint8_t *mask,
                     const float *cosine, const float *sine, float *out, float *lse) {
    const int64_t d = s->size, step = d <= 64 ? QUERIES / 2 : QUERIES, group = s->heads / s->kv_heads, width = padded(s->keys);
    const int64_t panels = (s->keys + KEYS - 1) / KEYS * KEYS * d;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < s->batch * s->kv_heads; task++) {
        const int64_t b = task / s->kv_heads, kv = task % s->kv_heads;
        const uint8_t *hidden = mask ? mask + b * s->mask[0] : 0;
        float *keys = scratch(panels + 2 * s->keys * d + QUERIES * (width + d)), *values = keys + panels;
        float *rows = values + s->keys * d, *block = rows + s->keys * d, *scores = block + QUERIES * d;
        const float *cos = cosine ? cosine + b * s->rope[0] : 0, *sin = cosine ? sine + b * s->rope[0] : 0;
        turn(k + b * s->k[0] + kv * s->k[1], s->k[2], s->keys, d, cos, sin, s->rope[1], 1, rows, d);
        transpose(rows, s->keys, d, keys);
        rows_to(v + b * s->v[0] + kv * s->v[1], s->v[2], s->keys, d, values, d);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++)
            for (int64_t first = 0; first < s->queries; first += step) {
                const int64_t n = lesser(step, s->queries - first);
                int64_t begin, end;
                seen(s, hidden, first, n, &begin, &end);
                float *to = out + b * s->out[0] + h * s->out[1] + first * s->out[2], share[QUERIES];
                turn(q + b * s->q[0] + h * s->q[1] + first * s->q[2], s->q[2], n, d, cos ? cos + first * s->rope[1] : 0,
                     cos ? sin + first * s->rope[1] : 0, s->rope[1], 1, block, d);
                against(block, d, n, d, keys, begin, end, scores, width);
                hide(s, hidden, first, n, begin, end, scores, width);
                for (int64_t r = 0; r < n; r++) {
                    float *row = scores + r * width;
                    vec most = all(-INFINITY), sum = {};
                    for (int64_t j = begin; j < end; j += LANES) most = larger(most, load(row + j));
                    const float top = most_of(most), base = top == -INFINITY ? 0 : top * s->scale;
                    for (int64_t j = begin; j < end; j += LANES) {
                        vec p = exponential(load(row + j) * s->scale - base);
                        sum += p;
                        store(row + j, p);
                    }
                    const float total = sum_of(sum);
                    lse[(b * s->heads + h) * s->queries + first + r] = total == 0 ? INFINITY : base + logf(total);
                    share[r] = total == 0 ? 0 : 1 / total;
                }
                product(n, d, end - begin, scores + begin, width, 1, values + begin * d, d, to, s->out[2], 0);
                for (int64_t r = 0; r < n; r++)
                    for (int64_t i = r * s->out[2]; i < r * s->out[2] + d; i += LANES) store(to + i, load(to + i) * share[r]);
            }
    }
}

/* The gradients of q, k and v, with the strides of the shape, from that of out. One thread adds up all that concerns a head of
   keys. */
void cairn_attention_backward(const shape *s, const float *q, const float *k, const float *v, const uint8_t *mask,
                              const float *cosine, const float *sine, const float *out, const float *lse,
                              const float *gradient, float *dq, float *dk, float *dv) {
    const int64_t d = s->size, step = d <= 64 ? QUERIES / 2 : QUERIES, group = s->heads / s->kv_heads, width = padded(s->keys);
    const int64_t panels = (s->keys + KEYS - 1) / KEYS * KEYS * d, side = s->keys * d;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < s->batch * s->kv_heads; task++) {
        const int64_t b = task / s->kv_heads, kv = task % s->kv_heads;
        const uint8_t *hidden = mask ? mask + b * s->mask[0] : 0;
        float *keys = scratch(2 * panels + 4 * side + 2 * QUERIES * (width + d)), *values = keys + panels;
        float *rows = values + panels, *for_keys = rows + side, *for_values = for_keys + side;
        float *weights = for_values + side, *slopes = weights + QUERIES * width;
        float *block = slopes + QUERIES * width, *other = block + QUERIES * d;
        const float *cos = cosine ? cosine + b * s->rope[0] : 0, *sin = cosine ? sine + b * s->rope[0] : 0;
        fetch(v + b * s->v[0] + kv * s->v[1], s->v[2], s->keys, d);
        fetch(k + b * s->k[0] + kv * s->k[1], s->k[2], s->keys, d);
        fetch(q + b * s->q[0] + kv * group * s->q[1], s->q[2], s->queries, d);
        fetch(gradient + b * s->error[0] + kv * group * s->error[1], s->error[2], s->queries, d);
        claim(dq + b * s->dq[0] + kv * group * s->dq[1], s->dq[2], s->queries, d);
        claim(dk + b * s->dk[0] + kv * s->dk[1], s->dk[2], s->keys, d);
        claim(dv + b * s->dv[0] + kv * s->dv[1], s->dv[2], s->keys, d);
        fetch(out + b * s->out[0] + kv * group * s->out[1], s->out[2], s->queries, d);
        rows_to(v + b * s->v[0] + kv * s->v[1], s->v[2], s->keys, d, rows, d);
        transpose(rows, s->keys, d, values);
        turn(k + b * s->k[0] + kv * s->k[1], s->k[2], s->keys, d, cos, sin, s->rope[1], 1, rows, d);
        transpose(rows, s->keys, d, keys);
        memset(for_keys, 0, 8 * side);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++)
            for (int64_t first = 0; first < s->queries; first += step) {
                const int64_t n = lesser(step, s->queries - first);
                int64_t begin, end;
                seen(s, hidden, first, n, &begin, &end);
                const float *own_cos = cos ? cos + first * s->rope[1] : 0, *own_sin = cos ? sin + first * s->rope[1] : 0;
                turn(q + b * s->q[0] + h * s->q[1] + first * s->q[2], s->q[2], n, d, own_cos, own_sin, s->rope[1], 1, block, d);
                const float *error = gradient + b * s->error[0] + h * s->error[1] + first * s->error[2];
                const float *result = out + b * s->out[0] + h * s->out[1] + first * s->out[2];
                against(block, d, n, d, keys, begin, end, weights, width);
                hide(s, hidden, first, n, begin, end, weights, width);
                against(error, s->error[2], n, d, values, begin, end, slopes, width);
                for (int64_t r = 0; r < n; r++) {
                    const float level = lse[(b * s->heads + h) * s->queries + first + r];
                    vec dot = {};
                    for (int64_t i = 0; i < d; i += LANES) dot += load(error + r * s->error[2] + i) * load(result + r * s->out[2] + i);
                    const float mean = sum_of(dot);
                    float *row = weights + r * width, *slope = slopes + r * width;
                    for (int64_t j = begin; j < end; j += LANES) {
                        vec p = exponential(load(row + j) * s->scale - level);
                        store(row + j, p);
                        store(slope + j, p * (load(slope + j) - mean) * s->scale);
                    }
                }
                product(end - begin, d, n, weights + begin, 1, width, error, s->error[2], for_values + begin * d, d, 1);
                product(end - begin, d, n, slopes + begin, 1, width, block, d, for_keys + begin * d, d, 1);
                product(n, d, end - begin, slopes + begin, width, 1, rows + begin * d, d, other, d, 0);
                turn(other, d, n, d, own_cos, own_sin, s->rope[1], -1, dq + b * s->dq[0] + h * s->dq[1] + first * s->dq[2], s->dq[2]);
            }
        turn(for_keys, d, s->keys, d, cos, sin, s->rope[1], -1, dk + b * s->dk[0] + kv * s->dk[1], s->dk[2]);
        rows_to(for_values, d, s->keys, d, dv + b * s->dv[0] + kv * s->dv[1], s->dv[2]);
    }
}
