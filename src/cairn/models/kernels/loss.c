/* Softmax over a vocabulary: logits become errors in one pass through the cache, row by row. */

#include <string.h>

#include "vectors.h"

/* The vector at p; of the last one of a row, which has only n numbers, the rest is `fill`. */
static inline vec load_some(const float *p, int64_t n, float fill) {
    if (n >= LANES) return load(p);
    vec v = all(fill);
    memcpy(&v, p, 4 * n);
    return v;
}

static inline void store_some(float *p, vec v, int64_t n) {
    if (n >= LANES)
        store(p, v);
    else
        memcpy(p, &v, 4 * n);
}

/* Of each row of logits (rows, size): lse, the logarithm of its sum of exponentials, and nll, lse less the target's logit. With
   `errors` the row becomes (1 + 2 z lse) * softmax - onehot(target), the slope of nll + z * lse^2. */
void cairn_softmax_errors(float *logits, int64_t rows, int64_t size, const int64_t *targets, float z, int errors, float *nll,
                          float *lse) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        float *row = logits + r * size;
        vec most = all(-INFINITY), sum = {};
        for (int64_t j = 0; j < size; j += LANES) most = larger(most, load_some(row + j, size - j, -INFINITY));
        const float top = most_of(most), wanted = row[targets[r]];
        for (int64_t j = 0; j < size; j += LANES) {
            vec p = exponential(load_some(row + j, size - j, -INFINITY) - top);
            sum += p;
            if (errors) store_some(row + j, p, size - j);
        }
        const float total = sum_of(sum);
        lse[r] = top + logf(total);
        nll[r] = logf(total) - (wanted - top);
        if (!errors) continue;
        const float share = (1 + 2 * z * lse[r]) / total;
        for (int64_t j = 0; j < size; j += LANES) store_some(row + j, load_some(row + j, size - j, 0) * share, size - j);
        row[targets[r]] -= 1;
    }
}
