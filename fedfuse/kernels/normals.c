/* Normal numbers out of random bits, added to what is there: the arithmetic of
   fedfuse/privacy/noise.py, where the reasons for it stand. Multiplications and additions are never
   joined, so that each processor gives the same numbers. */

#include <math.h>
#include <stdint.h>
#include <string.h>

const char source[] = SOURCE;

enum { SOME = 64 }; /* eights at once: their numbers stay in the first cache */

static inline double number(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t bits(double value) {
    uint64_t found;
    memcpy(&found, &value, sizeof found);
    return found;
}

/* Natural logarithm of u in [2^-52, 1], to about an ulp: u = 2^e m with m in [sqrt(1/2), sqrt(2)),
   and with s = (m - 1) / (m + 1), log m = 2 s + 2/3 s^3 + ... (coefficients: W. J. Cody and W. Waite
   1980 as in fdlibm's e_log.c, Sun Microsystems 1993). */
static inline double logarithm(double u) {
    uint64_t shifted = bits(u) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    double e = number((shifted >> 52) | 0x4330000000000000u) - (4503599627370496.0 + 1023.0);
    double m = number((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    double f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z, half = 0.5 * f * f;
    double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 +
                  w * 1.531383769920937332e-01));
    double odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 +
                 w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    return e * 6.93147180369123816490e-01 -
           ((half - (s * (half + even + odd) + e * 1.90821492927058770002e-10)) - f);
}

/* Box and Muller's pairs: sqrt(scale log u) times cosine and sine of a turn's `angle`. */
static inline void pairs(const uint64_t *first, const uint64_t *second, double scale, int64_t count,
                         double *real, double *imaginary) {
    for (int64_t i = 0; i < count; i++) {
        double u = 2.0 - number(first[i] >> 12 | 0x3ff0000000000000u);
        double turn = number(second[i] >> 12 | 0x3ff0000000000000u) - 1.5;
        double radius = sqrt(logarithm(u) * scale);
        /* turn = quarter / 4 + rest; adding 1.5 2^52 rounds, and leaves `quarter` in the last bits */
        double rounded = turn * 4.0 + 6755399441055744.0;
        uint64_t quarter = bits(rounded);
        double x = (turn - (rounded - 6755399441055744.0) * 0.25) * 6.283185307179586477;
        double z = x * x; /* fdlibm's k_sin.c and k_cos.c, |x| <= pi / 4 */
        double sine = x + x * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 +
                      z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 +
                      z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
        double cosine = 1.0 - (0.5 * z - z * z * (4.16666666666666019037e-02 +
                        z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 +
                        z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 +
                        z * -1.13596475577881948265e-11))))));
        uint64_t odd = -(quarter & 1), a = bits(cosine), b = bits(sine);
        uint64_t change = (a ^ b) & odd; /* a quarter of a turn on, cosine is -sine, sine cosine */
        real[i] = radius * number(a ^ change ^ ((quarter + 1) << 62 & 1ull << 63));
        imaginary[i] = radius * number(b ^ change ^ (quarter << 62 & 1ull << 63));
    }
}

/* rows 1 to 7 of a Hadamard matrix (8, 8) times z (8, SOME), in the order of noise.py. */
static inline void seven(double z[8][SOME], double out[7][SOME]) {
    for (int i = 0; i < SOME; i++) {
        double w[8], v[8];
        for (int k = 0; k < 8; k += 2) {
            w[k] = z[k][i] + z[k + 1][i];
            w[k + 1] = z[k][i] - z[k + 1][i];
        }
        for (int k = 0; k < 8; k += 4)
            for (int l = 0; l < 2; l++) {
                v[k + l] = w[k + l] + w[k + 2 + l];
                v[k + 2 + l] = w[k + l] - w[k + 2 + l];
            }
        for (int k = 1; k < 4; k++)
            out[k - 1][i] = v[k] + v[k + 4];
        for (int k = 0; k < 4; k++)
            out[k + 3][i] = v[k] - v[k + 4];
    }
}

/* Adds 14 `eights` normals, or the first `count` of them, made of 16 `eights` words; `scale` is -2
   times the variance of one of eight. */
#define ADD(NAME, REAL)                                                                           \
    void NAME(const uint64_t *words, int64_t eights, double scale, REAL *values, int64_t count) { \
        double z[2][8][SOME], found[7][SOME];                                                     \
        memset(z, 0, sizeof z);                                                                   \
        for (int64_t start = 0; start < eights; start += SOME) {                                  \
            int64_t some = eights - start < SOME ? eights - start : SOME;                         \
            for (int k = 0; k < 8; k++) {                                                         \
                const uint64_t *first = words + k * eights + start;                               \
                pairs(first, first + 8 * eights, scale, some, z[0][k], z[1][k]);                  \
            }                                                                                     \
            for (int part = 0; part < 2; part++) {                                                \
                seven(z[part], found);                                                            \
                for (int k = 0; k < 7; k++) {                                                     \
                    int64_t at = (part * 7 + k) * eights + start;                                 \
                    int64_t here = count - at < some ? count - at : some;                         \
                    for (int64_t i = 0; i < here; i++)                                            \
                        values[at + i] = (REAL)(values[at + i] + found[k][i]);                    \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }
ADD(add_float32, float)
ADD(add_float64, double)
