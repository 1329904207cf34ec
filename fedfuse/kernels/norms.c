/* Group norm of pictures with their channels last, and layer norm, with each record's own gradients
   of weight and bias; C. Wu and K. He 2018 (arXiv:1803.08494), J. L. Ba et al. 2016
   (arXiv:1607.06450); and the sums over places that are each record's gradient of any other bias. A
   record is (places, channels), channels side by side. Sums over places are made in float32 over RUN
   of them, and added up in float64. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const char source[] = SOURCE;

#define INLINE static inline __attribute__((always_inline))

enum { RUN = 64, SPAN = 4 * WIDTH }; /* SPAN sums are in registers at once */
enum { SUM, SPREAD, PRODUCTS };      /* what is added up; see `term` */

typedef struct {
    int64_t places, channels, groups;
} Shape;

static inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

/* Numbers that are worked on side by side: whole places, SPAN of them at least. */
static int64_t span_of(const Shape *s) {
    return (s->channels < SPAN ? (SPAN + s->channels - 1) / s->channels : 1) * s->channels;
}

/* Adds up what each number of a span has, by channel; `part` is zero afterwards. */
static void drain(int64_t span, int64_t n, float *restrict part, double *restrict sum) {
    for (int64_t k = 0; k < span; k += n)
        for (int64_t c = 0; c < n; c++) {
            sum[c] += part[k + c];
            part[k + c] = 0;
        }
}

/* Adds one number's share to its sums, `middle` being the mean. */
INLINE void term(int what, float x, float g, float middle, float *first, float *second) {
    if (what == SUM)
        *first += x;
    if (what == SPREAD)
        *first += (x - middle) * (x - middle);
    if (what == PRODUCTS) {
        *first += g;
        *second += g * (x - middle);
    }
}

/* Adds up what a record's `size` numbers give, by channel: to `sum`, and the products to `product`.
   `middle` (span,) are the means; `part` (2, span) is zero, before and after. */
INLINE void add_up(int what, const float *x, const float *g, const float *middle, int64_t size,
                   int64_t n, int64_t span, float *part, double *sum, double *product) {
    float *first = part, *second = part + span;
    int64_t fast = span / SPAN * SPAN;
    for (int64_t run = 0; run < size; run += RUN * span) {
        int64_t stop = shorter(run + RUN * span, size), whole = run + (stop - run) / span * span;
        for (int64_t column = 0; column < fast; column += SPAN) {
            float a[SPAN] = {0}, b[SPAN] = {0};
            for (int64_t t = run + column; t < whole; t += span)
                for (int k = 0; k < SPAN; k++)
                    term(what, x[t + k], g[t + k], middle[column + k], a + k, b + k);
            memcpy(first + column, a, sizeof a);
            memcpy(second + column, b, sizeof b);
        }
        for (int64_t t = run; t < whole; t += span)
            for (int64_t k = fast; k < span; k++)
                term(what, x[t + k], g[t + k], middle[k], first + k, second + k);
        for (int64_t k = 0; whole + k < stop; k++)
            term(what, x[whole + k], g[whole + k], middle[k], first + k, second + k);
        drain(span, n, first, sum);
        if (what == PRODUCTS)
            drain(span, n, second, product);
    }
}

/* The first n of `values` again and again, as far as a span goes. */
static void repeat(int64_t span, int64_t n, float *values) {
    for (int64_t k = n; k < span; k++)
        values[k] = values[k - n];
}

/* Each function works on the records from `start` to before `stop`, and returns 0, or 1 where memory
   is missing.

   Mean and 1 / deviation of each group of x, and y = (x - mean) / deviation * weight + bias. mean and
   rstd are (records, groups). */
int group_forward(int64_t start, int64_t stop, const Shape *s, const float *x,
                  const float *weight, const float *bias, double eps, float *y, float *mean,
                  float *rstd) {
    int64_t n = s->channels, each = n / s->groups, size = s->places * n, span = span_of(s);
    float *work = calloc(5 * span, sizeof *work);
    double *sum = calloc(n, sizeof *sum), count = (double)s->places * each;
    float *part = work, *restrict middle = work + 2 * span, *restrict scale = work + 3 * span;
    float *restrict shift = work + 4 * span;
    int failed = !work || !sum;
    x += start * size, y += start * size;
    for (int64_t i = start; !failed && i < stop; i++, x += size, y += size) {
        memset(sum, 0, n * sizeof *sum);
        add_up(SUM, x, x, x, size, n, span, part, sum, NULL);
        for (int64_t k = 0; k < s->groups; k++) {
            double total = 0;
            for (int64_t c = k * each; c < (k + 1) * each; c++)
                total += sum[c];
            mean[i * s->groups + k] = total / count;
            for (int64_t c = k * each; c < (k + 1) * each; c++)
                middle[c] = mean[i * s->groups + k];
        }
        repeat(span, n, middle);
        memset(sum, 0, n * sizeof *sum);
        add_up(SPREAD, x, x, middle, size, n, span, part, sum, NULL);
        for (int64_t k = 0; k < s->groups; k++) {
            double total = 0;
            for (int64_t c = k * each; c < (k + 1) * each; c++)
                total += sum[c];
            rstd[i * s->groups + k] = 1 / sqrt(total / count + eps);
            for (int64_t c = k * each; c < (k + 1) * each; c++) {
                scale[c] = rstd[i * s->groups + k] * weight[c];
                shift[c] = bias[c];
            }
        }
        repeat(span, n, scale);
        repeat(span, n, shift);
        for (int64_t t = 0; t < size; t += span)
            for (int64_t k = 0; k < shorter(span, size - t); k++)
                y[t + k] = (x[t + k] - middle[k]) * scale[k] + shift[k];
    }
    free(work);
    free(sum);
    return failed;
}

/* From g, the gradient of y: each record's gradients of weight and bias, (records, channels) with
   `line` floats from record to record, and that of x, unless `back` is NULL. */
int group_backward(int64_t start, int64_t stop, const Shape *s, const float *g, const float *x,
                   const float *mean, const float *rstd, const float *weight, float *back,
                   float *by_weight, float *by_bias, int64_t line) {
    int64_t n = s->channels, each = n / s->groups, size = s->places * n, span = span_of(s);
    float *work = calloc(6 * span, sizeof *work);
    double *sums = calloc(2 * n, sizeof *sums), count = (double)s->places * each;
    float *part = work, *restrict of_g = work + 2 * span;
    float *restrict of_x = work + 3 * span, *restrict rest = work + 4 * span;
    float *restrict middle = work + 5 * span;
    double *slope = sums, *product = sums + n;
    int failed = !work || !sums;
    g += start * size, x += start * size, by_weight += start * line, by_bias += start * line;
    mean += start * s->groups, rstd += start * s->groups, back += back ? start * size : 0;
    for (int64_t i = start; !failed && i < stop; i++, g += size, x += size, mean += s->groups,
                 rstd += s->groups, by_weight += line, by_bias += line) {
        memset(sums, 0, 2 * n * sizeof *sums);
        for (int64_t c = 0; c < n; c++)
            middle[c] = mean[c / each];
        repeat(span, n, middle);
        add_up(PRODUCTS, x, g, middle, size, n, span, part, slope, product);
        for (int64_t c = 0; c < n; c++) {
            by_bias[c] = slope[c];
            by_weight[c] = product[c] * rstd[c / each];
        }
        if (!back)
            continue;
        for (int64_t k = 0; k < s->groups; k++) {
            double r = rstd[k], a = 0, b = 0;
            for (int64_t c = k * each; c < (k + 1) * each; c++) {
                a += weight[c] * slope[c];
                b += weight[c] * product[c];
            }
            b *= r * r * r / count;
            for (int64_t c = k * each; c < (k + 1) * each; c++) {
                of_g[c] = r * weight[c];
                of_x[c] = -b;
                rest[c] = -a * r / count;
            }
        }
        repeat(span, n, of_g);
        repeat(span, n, of_x);
        repeat(span, n, rest);
        for (int64_t t = 0; t < size; t += span)
            for (int64_t k = 0; k < shorter(span, size - t); k++)
                back[t + k] = g[t + k] * of_g[k] + (x[t + k] - middle[k]) * of_x[k] + rest[k];
        back += size;
    }
    free(work);
    free(sums);
    return failed;
}

/* The same of a layer norm over the channels of each place; mean and rstd are (records, places). */
int layer_backward(int64_t start, int64_t stop, const Shape *s, const float *g, const float *x,
                   const float *mean, const float *rstd, const float *weight, float *back,
                   float *by_weight, float *by_bias, int64_t line) {
    int64_t n = s->channels, size = s->places * n;
    float *work = calloc(2 * n, sizeof *work);
    double *sums = calloc(2 * n, sizeof *sums);
    float *restrict first = work, *restrict second = work + n;
    int failed = !work || !sums;
    g += start * size, x += start * size, by_weight += start * line, by_bias += start * line;
    mean += start * s->places, rstd += start * s->places, back += back ? start * size : 0;
    for (int64_t i = start; !failed && i < stop; i++, by_weight += line, by_bias += line) {
        memset(sums, 0, 2 * n * sizeof *sums);
        for (int64_t t = 0; t < s->places; t++, g += n, x += n, mean++, rstd++) {
            float m = *mean, r = *rstd, a = 0, b = 0;
            for (int64_t c = 0; c < n; c++) {
                first[c] += g[c];
                second[c] += g[c] * ((x[c] - m) * r);
                a += g[c] * weight[c];
                b += g[c] * weight[c] * (x[c] - m);
            }
            if ((t + 1) % RUN == 0 || t + 1 == s->places) {
                drain(n, n, first, sums);
                drain(n, n, second, sums + n);
            }
            if (!back)
                continue;
            a *= r / n;
            b *= r * r * r / n;
            for (int64_t c = 0; c < n; c++)
                back[c] = g[c] * weight[c] * r - (x[c] - m) * b - a;
            back += n;
        }
        for (int64_t c = 0; c < n; c++) {
            by_bias[c] = sums[c];
            by_weight[c] = sums[n + c];
        }
    }
    free(work);
    free(sums);
    return failed;
}

/* The sums of g over places, with `line` floats from record to record. Where `loud` is given, the
   numbers of the records that are not zero throughout go there, from its place `start` on, and how
   many they are to `count`. */
int place_sums(int64_t start, int64_t stop, const Shape *s, const float *g, float *sums,
               int64_t line, int64_t *loud, int64_t *count) {
    int64_t n = s->channels, size = s->places * n, span = span_of(s);
    float *part = calloc(2 * span, sizeof *part);
    double *sum = calloc(n, sizeof *sum);
    int failed = !part || !sum;
    *count = 0;
    g += start * size, sums += start * line;
    for (int64_t i = start; !failed && i < stop; i++, g += size, sums += line) {
        int silent = loud != NULL;
        memset(sum, 0, n * sizeof *sum);
        add_up(SUM, g, g, g, size, n, span, part, sum, NULL);
        for (int64_t c = 0; c < n; c++) {
            sums[c] = sum[c];
            silent &= sum[c] == 0;
        }
        for (int64_t k = 0; silent && k < size; k++) /* they may add up to zero */
            silent = g[k] == 0;
        if (loud && !silent)
            loud[start + (*count)++] = i;
    }
    free(part);
    free(sum);
    return failed;
}
