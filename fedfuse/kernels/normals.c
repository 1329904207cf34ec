/* Normal numbers out of random bits, added to what is there: the arithmetic of
   fedfuse/privacy/noise.py, where the reasons for it stand. A product and a sum are joined, with one
   rounding, where this text says so, and nowhere else; so each processor gives the same numbers. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

const char source[] = SOURCE;

enum { LANES = WIDTH / 2 }; /* of a register, as doubles */
enum { SOME = 64 };         /* eights at once: their numbers stay in the first cache */

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef uint64_t bits __attribute__((vector_size(8 * LANES)));
typedef uint64_t loose_bits __attribute__((vector_size(8 * LANES), aligned(8)));

#if WIDTH == 16
#define OF(NAME) _mm512_##NAME
#define HALF(NAME) _mm256_##NAME
#else
#define OF(NAME) _mm256_##NAME
#define HALF(NAME) _mm_##NAME
#endif

static const uint64_t SIGN = 1ull << 63, FRACTION = (1ull << 52) - 1; /* of a double's bits */
static const uint64_t ONE = 0x3ff0000000000000;                       /* those of 1.0 */

static inline doubles all(double x) { return OF(set1_pd)(x); }

/* a b + c */
static inline doubles joined(doubles a, doubles b, doubles c) { return OF(fmadd_pd)(a, b, c); }

/* c[0] + c[1] z + ... + c[6] z^6 */
static inline doubles series(const double c[7], doubles z) {
    doubles sum = joined(z, all(c[6]), all(c[5]));
    for (int k = 4; k >= 0; k--)
        sum = joined(z, sum, all(c[k]));
    return sum;
}

/* -2 log u of u in [2^-52, 1]. With u = 2^e m, m in [sqrt(1/2), sqrt(2)), and s = (m - 1) / (m + 1),
   log m = 2 s + 2/3 s^3 + ...; this series (Remez) is right to 1.9e-16 of it. */
static inline doubles minus_two_log(doubles u) {
    static const double c[7] = {
        -4.0, -1.3333333333317432, -0.8000000010460342, -0.5714283424976226,
        -0.44446744108539393, -0.36247259932858866, -0.33639959739973263};
    const uint64_t root = 0x3fe6a09e667f3bcd; /* sqrt(1/2) */
    bits from_root = (bits)u + (ONE - root);
    /* a whole number in the last bits of a double, beside 2^52 */
    doubles e = (doubles)(from_root >> 52 | 0x4330000000000000) - (0x1p52 + 1023.0);
    doubles m = (doubles)((from_root & FRACTION) + root);
    doubles s = (m - 1.0) / (m + 1.0);
    return joined(e, all(-1.3862943611198906), s * series(c, s * s));
}

/* x where the second highest bit of `word` is 0, y where it is 1. */
static inline doubles chosen(bits word, doubles x, doubles y) {
#if WIDTH == 16
    __m512i second = _mm512_set1_epi64(1ll << 62);
    return _mm512_mask_blend_pd(_mm512_test_epi64_mask((__m512i)word, second), x, y);
#else
    return _mm256_blendv_pd(x, y, (doubles)(word << 1));
#endif
}

/* Box and Muller's pair, sqrt(-2 log u) times cosine and sine, each right to 6e-16 of itself. Of
   `first` the last 52 bits are 1 - u. Of `second` the two highest are the quarter of a turn, the next
   52 the place t in it, in quarters and from its middle: |t| <= 1/2. These series (Remez) are right
   to 7e-17 and 4e-18 of cosine and sine. */
static inline void pair(bits first, bits second, doubles *real, doubles *imaginary) {
    static const double cosine[7] = {
        1.0, -1.233700550136157, 0.25366950790005294, -0.020863480737573954,
        0.0009192599677599193, -2.5200192420200903e-05, 4.65600384448924e-07};
    static const double sine[7] = {
        1.5707963267948966, -0.6459640975062443, 0.07969262624604308, -0.004681754132342261,
        0.00016044115075209973, -3.59864338820814e-06, 5.63393847796019e-08};
    doubles radius = OF(sqrt_pd)(minus_two_log(2.0 - (doubles)((first & FRACTION) | ONE)));
    doubles t = (doubles)((second >> 10 & FRACTION) | ONE) - 1.5, z = t * t;
    radius = (doubles)((bits)radius ^ (second & SIGN)); /* half a turn on, or not */
    doubles x = radius * series(cosine, z), y = radius * t * series(sine, z);
    *real = chosen(second, x, -y); /* a quarter of a turn on, or not */
    *imaginary = chosen(second, y, x);
}

static inline void butterfly(doubles *a, doubles *b) {
    doubles sum = *a + *b;
    *b = *a - *b;
    *a = sum;
}

/* to[] += value, in float64, cut once */
static inline void add_to_float(float *to, doubles value) {
    HALF(storeu_ps)(to, OF(cvtpd_ps)(OF(cvtps_pd)(HALF(loadu_ps)(to)) + value));
}

static inline void add_to_double(double *to, doubles value) {
    OF(storeu_pd)(to, OF(loadu_pd)(to) + value);
}

/* How many of `some` numbers from number `at` on are among the first `count`. */
static inline int64_t among(int64_t at, int64_t some, int64_t count) {
    int64_t left = count - at;
    return left < 0 ? 0 : left < some ? left : some;
}

/* add_REAL: adds 14 `eights` normals, or the first `count` of them, made of 16 `eights` words;
   `scale` is the deviation of one of eight.
   some_REAL: SOME of each of the 14; what belongs together lies `line` words, or values, apart. */
#define ADD(REAL)                                                                                  \
    static inline void some_##REAL(const uint64_t *words, int64_t line, double scale, REAL *to) {  \
        doubles z[2][8][SOME / LANES];                                                             \
        for (int k = 0; k < 8; k++)                                                                \
            for (int i = 0; i < SOME / LANES; i++) {                                               \
                const uint64_t *first = words + k * line + i * LANES;                              \
                pair(*(const loose_bits *)first, *(const loose_bits *)(first + 8 * line),          \
                     &z[0][k][i], &z[1][k][i]);                                                    \
            }                                                                                      \
        for (int part = 0; part < 2; part++)                                                       \
            for (int i = 0; i < SOME / LANES; i++) {                                               \
                doubles v[8]; /* times rows 1 to 7 of a Hadamard matrix, in noise.py's order */    \
                for (int k = 0; k < 8; k++)                                                        \
                    v[k] = z[part][k][i];                                                          \
                for (int k = 0; k < 8; k += 2)                                                     \
                    butterfly(&v[k], &v[k + 1]);                                                   \
                for (int k = 0; k < 8; k += 4)                                                     \
                    for (int l = k; l < k + 2; l++)                                                \
                        butterfly(&v[l], &v[l + 2]);                                               \
                REAL *row = to + part * 7 * line + i * LANES;                                      \
                for (int k = 1; k < 4; k++, row += line)                                           \
                    add_to_##REAL(row, scale * (v[k] + v[k + 4]));                                 \
                for (int k = 0; k < 4; k++, row += line)                                           \
                    add_to_##REAL(row, scale * (v[k] - v[k + 4]));                                 \
            }                                                                                      \
    }                                                                                              \
    void add_##REAL(const uint64_t *words, int64_t eights, double scale, REAL *values,             \
                    int64_t count) {                                                               \
        int64_t start = 0;                                                                         \
        for (; start + SOME <= eights && 13 * eights + start + SOME <= count; start += SOME)       \
            some_##REAL(words + start, eights, scale, values + start);                             \
        for (; start < eights; start += SOME) {                                                    \
            int64_t some = eights - start < SOME ? eights - start : SOME;                          \
            uint64_t last[16][SOME] = {0};                                                         \
            REAL sums[14][SOME] = {0};                                                             \
            for (int k = 0; k < 16; k++)                                                           \
                memcpy(last[k], words + k * eights + start, some * sizeof(uint64_t));              \
            for (int64_t k = 0, at = start; k < 14; k++, at += eights)                             \
                memcpy(sums[k], values + at, among(at, some, count) * sizeof(REAL));               \
            some_##REAL(last[0], SOME, scale, sums[0]);                                            \
            for (int64_t k = 0, at = start; k < 14; k++, at += eights)                             \
                memcpy(values + at, sums[k], among(at, some, count) * sizeof(REAL));               \
        }                                                                                          \
    }
ADD(float)
ADD(double)
