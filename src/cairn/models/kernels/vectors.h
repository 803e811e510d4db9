/* Vectors of as many numbers as one instruction of this processor takes. */

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec all(float x) { return x - (vec){}; }

/* exp(x) for x <= 0, and 0 below -87: 2^n times a polynomial of the rest, within 2 units of the last place. NaN stays NaN. */
static inline vec exponential(vec x) {
    const vec magic = all(12582912.0f);
    vec n = x * all(1.44269504088896341f) + magic;
    ints whole = (ints)n << 23;
    n -= magic;
    vec r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    return (vec)(((ints)p + whole) & ~(x < all(-87.0f)));
}

static inline vec larger(vec a, vec b) {
    ints m = a > b;
    return (vec)(((ints)a & m) | ((ints)b & ~m));
}

static inline float sum_of(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

static inline float most_of(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}
