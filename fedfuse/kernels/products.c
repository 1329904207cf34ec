/* Products of two small matrices for each record, and their norms: what book-keeping adds to a plain
   backward pass. For one record, with its input x and its output gradient g,

       outer      A^T G, (p, d): A (T, p) has what each output place of a convolution sees, its patch
       weighted   the sum of A^T G over the records, each times a factor
       gram       |A^T G|^2, without A^T G, as the sum of <a_t, a_u> <g_t, g_u> over all t and u

   Patches are read where they lie in x, never written out. A sequence through a linear layer is a
   convolution whose kernel covers one place. WIDTH floats are in a register; sums over T are made in
   float32 as by any BLAS, squares are added up in float64. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const char source[] = SOURCE;

/* What is held in registers at once: of A^T G, and of the two (T, T) matrices. */
#if WIDTH == 16
enum { ROWS = 12, TILE_I = 4, TILE_J = 4 };
#else
enum { ROWS = 6, TILE_I = 4, TILE_J = 2 };
#endif
enum { COLUMNS = 2, STRETCH = 512 }; /* STRETCH places are added up before their sum is stored */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef double wide_vec __attribute__((vector_size(8 * WIDTH)));

/* Sizes; and how many floats lie between neighbours in x (record, height, width, channel) and g. */
typedef struct {
    int64_t height, width, channels;
    int64_t x_record, x_height, x_width, x_channel;
    int64_t top, left, padded_height, padded_width;
    int64_t kernel_height, kernel_width, dilation_height, dilation_width;
    int64_t stride_height, stride_width;
    int64_t out_height, out_width, out_channels;
    int64_t g_record, g_height, g_width, g_channel;
} Shape;

/* A layer's inputs and output gradients. Where `rows` is given, these records alone count. */
typedef struct {
    const Shape *s;
    int64_t records;
    const float *x, *g;
    const int64_t *rows;
} Pairs;

typedef struct {
    const Shape *s;
    int64_t places, patch, columns; /* T, p, and d rounded up to whole registers */
    int64_t *base, *offset;         /* where a place's patch begins, and a number in a patch is */
    float *x, *g;                   /* a record's copy, where it can't be read as it lies */
    const float *a, *b;             /* this record's x and g, ready to be read */
} Work;

static int begin(Work *w, const Shape *s) {
    int64_t area = s->padded_height * s->padded_width * s->channels;
    memset(w, 0, sizeof *w);
    w->s = s;
    w->places = s->out_height * s->out_width;
    w->patch = s->kernel_height * s->kernel_width * s->channels;
    w->columns = (s->out_channels + WIDTH - 1) / WIDTH * WIDTH;
    w->base = malloc(w->places * sizeof *w->base);
    w->offset = malloc((w->patch + ROWS) * sizeof *w->offset);
    int padded = s->padded_height != s->height || s->padded_width != s->width;
    int in_order = s->x_channel == 1 && s->x_width == s->channels &&
                   (s->height == 1 || s->x_height == s->width * s->channels);
    int copy_x = padded || !in_order;
    if (copy_x)
        w->x = calloc(area, sizeof *w->x);
    in_order = s->g_channel == 1 && s->g_width == s->out_channels &&
               (s->out_height == 1 || s->g_height == s->out_width * s->out_channels);
    int copy_g = !in_order || w->columns != s->out_channels;
    if (copy_g)
        w->g = calloc(w->places * w->columns, sizeof *w->g);
    if (!w->base || !w->offset || (copy_x && !w->x) || (copy_g && !w->g))
        return 0;
    int64_t *at = w->base;
    for (int64_t i = 0; i < s->out_height; i++)
        for (int64_t j = 0; j < s->out_width; j++)
            *at++ = (i * s->stride_height * s->padded_width + j * s->stride_width) * s->channels;
    at = w->offset;
    for (int64_t i = 0; i < s->kernel_height; i++)
        for (int64_t j = 0; j < s->kernel_width; j++)
            for (int64_t c = 0; c < s->channels; c++)
                *at++ = c + s->channels * (i * s->dilation_height * s->padded_width +
                                           j * s->dilation_width);
    for (int64_t i = 0; i < ROWS; i++) /* the last rows, where they are fewer than ROWS */
        at[i] = at[-1];
    return 1;
}

static void end(Work *w) {
    free(w->base);
    free(w->offset);
    free(w->x);
    free(w->g);
}

/* (height, width, n) -> the same with n last; a line of `to` has room for `room` of them. */
static void copy(int64_t height, int64_t width, int64_t n, const float *from, int64_t by_height,
                 int64_t by_width, int64_t by_n, float *to, int64_t line, int64_t room) {
    for (int64_t i = 0; i < height; i++, from += by_height, to += line)
        if (by_n == 1 && by_width == n && room == n)
            memcpy(to, from, width * n * sizeof *to);
        else if (by_n == 1)
            for (int64_t j = 0; j < width; j++)
                memcpy(to + j * room, from + j * by_width, n * sizeof *to);
        else
            for (int64_t c = 0; c < n; c++)
                for (int64_t j = 0; j < width; j++)
                    to[j * room + c] = from[j * by_width + c * by_n];
}

/* Makes record i ready: x with zeros around it and channels last, g as (T, columns). */
static void ready(Work *w, const Pairs *pairs, int64_t i) {
    const Shape *s = w->s;
    int64_t line = s->padded_width * s->channels;
    w->a = pairs->x + (pairs->rows ? pairs->rows[i] : i) * s->x_record;
    w->b = pairs->g + (pairs->rows ? pairs->rows[i] : i) * s->g_record;
    if (w->x) {
        copy(s->height, s->width, s->channels, w->a, s->x_height, s->x_width, s->x_channel,
             w->x + s->top * line + s->left * s->channels, line, s->channels);
        w->a = w->x;
    }
    if (w->g) {
        copy(s->out_height, s->out_width, s->out_channels, w->b, s->g_height, s->g_width,
             s->g_channel, w->g, s->out_width * w->columns, w->columns);
        w->b = w->g;
    }
}

/* out[r][c] = sum over t of x[base[t] + AT] g[t][c], for r < rows and c < COLS * WIDTH; with `more`
   it is added to what stands there. `squares`: of what is then in out, by place in a register. */
#define PRODUCT(NAME, COLS, AT)                                                                   \
    static void NAME(int64_t places, const int64_t *base, const float *x, const int64_t *offset,  \
                     const float *g, int64_t columns, int more, int64_t rows, float *out,         \
                     int64_t line, vec *squares) {                                                \
        vec sum[ROWS][COLS], found = {0};                                                         \
        (void)offset;                                                                             \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int c = 0; c < COLS; c++)                                                        \
                sum[r][c] = (vec){0};                                                             \
        for (int64_t t = 0; t < places; t++) {                                                    \
            const float *seen = x + base[t];                                                      \
            vec b[COLS];                                                                          \
            for (int c = 0; c < COLS; c++)                                                        \
                b[c] = *(const vec *)(g + t * columns + c * WIDTH);                               \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++)                               \
                for (int c = 0; c < COLS; c++)                                                    \
                    sum[r][c] += seen[AT] * b[c];                                                 \
        }                                                                                         \
        _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++) if (r < rows)                     \
            for (int c = 0; c < COLS; c++) {                                                      \
                vec *to = (vec *)(out + r * line + c * WIDTH);                                    \
                vec all = more ? *to + sum[r][c] : sum[r][c];                                     \
                *to = all;                                                                        \
                found += all * all;                                                               \
            }                                                                                     \
        *squares = found;                                                                         \
    }
PRODUCT(near_two, 2, r)
PRODUCT(near_one, 1, r)
PRODUCT(far_two, 2, offset[r])
PRODUCT(far_one, 1, offset[r])

/* out (p, d) = A^T G of the record that is ready, or, with `more`, out + A^T G; `squares`: of out, in
   WIDTH parts. */
static void product(const Work *w, int more, float *out, wide_vec *squares) {
    int64_t d = w->s->out_channels;
    *squares = (wide_vec){0};
    for (int64_t n = 0, some; n < w->columns; n += some) {
        int two = n + 2 * WIDTH <= w->columns;
        some = two ? 2 * WIDTH : WIDTH;
        int64_t cut = d - n < some ? d - n : 0; /* columns of a block that is not whole */
        for (int64_t p = 0; p < w->patch; p += ROWS) {
            const int64_t *offset = w->offset + p;
            int64_t lines = w->patch - p < ROWS ? w->patch - p : ROWS;
            int near = lines == ROWS && offset[ROWS - 1] == offset[0] + ROWS - 1;
            float part[ROWS * COLUMNS * WIDTH], *block = out + p * d + n;
            vec found = {0};
            if (cut)
                memset(part, 0, sizeof part);
            for (int64_t r = 0; more && cut && r < lines; r++)
                memcpy(part + r * some, block + r * d, cut * sizeof *part);
            for (int64_t t = 0; t < w->places; t += STRETCH)
                (near ? (two ? near_two : near_one) : (two ? far_two : far_one))(
                    w->places - t < STRETCH ? w->places - t : STRETCH, w->base + t,
                    near ? w->a + offset[0] : w->a, offset, w->b + t * w->columns + n, w->columns,
                    more || t > 0, lines, cut ? part : block, cut ? some : d, &found);
            *squares += __builtin_convertvector(found, wide_vec);
            for (int64_t r = 0; cut && r < lines; r++)
                memcpy(block + r * d, part + r * some, cut * sizeof *part);
        }
    }
}

/* For each record: out (p, d) = A^T G, and its squared norm; where `to` is given, out is that of
   these. Returns 0, or 1 where memory is missing, as the others do. */
int outer(const Pairs *pairs, float *out, const int64_t *to, int64_t out_record, float *squares) {
    Work w;
    int failed = !begin(&w, pairs->s);
    for (int64_t i = 0; !failed && i < pairs->records; i++) {
        wide_vec square;
        ready(&w, pairs, i);
        product(&w, 0, out + (to ? to[i] : i) * out_record, &square);
        double all = 0;
        for (int k = 0; k < WIDTH; k++)
            all += square[k];
        squares[i] = all;
    }
    end(&w);
    return failed;
}

/* out (p, d) += the sum of factor times A^T G; a record with factor 0 is not looked at. */
int weighted(const Pairs *pairs, const float *factors, float *out) {
    Work w;
    int failed = !begin(&w, pairs->s);
    if (!failed && !w.g) /* there is always a copy, which is scaled */
        failed = !(w.g = malloc(w.places * w.columns * sizeof *w.g));
    for (int64_t i = 0; !failed && i < pairs->records; i++) {
        wide_vec square;
        if (factors[i] == 0)
            continue;
        ready(&w, pairs, i);
        for (int64_t k = 0; k < w.places * w.columns; k++)
            w.g[k] *= factors[i];
        product(&w, 1, out, &square);
    }
    end(&w);
    return failed;
}

/* sums[i][j] = <row i of a, row j of b>, in WIDTH parts; a row is `runs` of `length` floats. */
static inline __attribute__((always_inline)) void dots(const float *const *a, const float *const *b,
                                                       int64_t runs, int64_t length, int64_t stride,
                                                       vec (*sums)[TILE_J]) {
    vec sum[TILE_I][TILE_J];
    for (int i = 0; i < TILE_I; i++)
        for (int j = 0; j < TILE_J; j++)
            sum[i][j] = (vec){0};
    for (int64_t r = 0; r < runs; r++) {
        int64_t k = r * stride, whole = k + length / WIDTH * WIDTH, stop = k + length;
        for (; k < whole; k += WIDTH) {
            vec y[TILE_J];
            for (int j = 0; j < TILE_J; j++)
                y[j] = *(const vec *)(b[j] + k);
            for (int i = 0; i < TILE_I; i++) {
                vec z = *(const vec *)(a[i] + k);
                for (int j = 0; j < TILE_J; j++)
                    sum[i][j] += z * y[j];
            }
        }
        for (; k < stop; k++)
            for (int i = 0; i < TILE_I; i++)
                for (int j = 0; j < TILE_J; j++)
                    sum[i][j][0] += a[i][k] * b[j][k];
    }
    for (int i = 0; i < TILE_I; i++)
        for (int j = 0; j < TILE_J; j++)
            sums[i][j] = sum[i][j];
}

static inline float total(vec v) {
    typedef float quarter __attribute__((vector_size(16)));
#if WIDTH == 16
    typedef float half __attribute__((vector_size(32)));
    half h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    vec h = v;
#endif
    quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

/* For each record |A^T G|^2, rounded up: where terms cancel, rounding could make their sum too small,
   and it is raised by what rounding can do to so many as large as the sum over t of |a_t| |g_t|. */
int gram(const Pairs *pairs, float *squares) {
    const Shape *s = pairs->s;
    Work w;
    int failed = !begin(&w, s);
    /* A patch is runs of floats that lie side by side: lines of the kernel, or its places. */
    int whole = s->dilation_width == 1;
    int64_t length = s->channels * (whole ? s->kernel_width : 1);
    int64_t across = whole ? 1 : s->kernel_width, right = s->dilation_width * s->channels;
    int64_t down = s->dilation_height * s->padded_width * s->channels;
    for (int64_t n = 0; !failed && n < pairs->records; n++) {
        double square = 0, reached = 0;
        ready(&w, pairs, n);
        for (int64_t i = 0; i < w.places; i += TILE_I)
            for (int64_t j = i; j < w.places; j += TILE_J) {
                const float *ai[TILE_I], *bi[TILE_I], *aj[TILE_J], *bj[TILE_J];
                for (int k = 0; k < TILE_I; k++) {
                    int64_t t = i + k < w.places ? i + k : i;
                    ai[k] = w.a + w.base[t];
                    bi[k] = w.b + t * w.columns;
                }
                for (int k = 0; k < TILE_J; k++) {
                    int64_t u = j + k < w.places ? j + k : j;
                    aj[k] = w.a + w.base[u];
                    bj[k] = w.b + u * w.columns;
                }
                vec aa[TILE_I][TILE_J], gg[TILE_I][TILE_J], sum = {0};
                dots(bi, bj, 1, w.columns, 0, gg);
                dots(ai, aj, s->kernel_height, length, down, aa);
                for (int64_t r = 1; r < across; r++) {
                    vec more[TILE_I][TILE_J];
                    for (int k = 0; k < TILE_I; k++)
                        ai[k] += right;
                    for (int l = 0; l < TILE_J; l++)
                        aj[l] += right;
                    dots(ai, aj, s->kernel_height, length, down, more);
                    for (int k = 0; k < TILE_I; k++)
                        for (int l = 0; l < TILE_J; l++)
                            aa[k][l] += more[k][l];
                }
                for (int k = 0; k < TILE_I; k++)
                    for (int l = 0; l < TILE_J; l++) {
                        int64_t t = i + k, u = j + l;
                        if (t > u || u >= w.places)
                            continue; /* <a_t, a_u> is <a_u, a_t>: taken once, twice as much */
                        float dot = total(gg[k][l]);
                        if (t == u)
                            reached += sqrtf(fmaxf(dot, 0) * total(aa[k][l]));
                        sum += aa[k][l] * (t == u ? dot : 2 * dot);
                    }
                square += total(sum);
            }
        square += reached * reached * (FLT_EPSILON / 2);
        squares[n] = square < 0 ? 0 : square; /* what is not a number stays so */
    }
    end(&w);
    return failed;
}
