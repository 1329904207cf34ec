/* Products of two small matrices for each record, and their norms: what book-keeping adds to a plain
   backward pass. For one record, with its input x and its output gradient g,

       outer   A^T G, (p, d): A (T, p) has what each output place of a convolution sees, its patch
       gram    |A^T G|^2, without A^T G, as the sum of <a_t, a_u> <g_t, g_u> over all t and u

   Patches are read where they lie in x, never written out. A sequence through a linear layer is a
   convolution whose kernel covers one place. WIDTH floats are in a register; sums over T are made in
   float32 as by any BLAS, squares are added up in float64. */

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

typedef struct {
    const Shape *s;
    int64_t places, patch, columns; /* T, p, and d rounded up to whole registers */
    int64_t *base, *offset;         /* where a place's patch begins, and a number in a patch is */
    float *x, *g;                   /* a record's copy, where it can't be read as it lies */
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

/* A record's x, with zeros around it and channels last. */
static const float *input(Work *w, const float *x) {
    const Shape *s = w->s;
    int64_t line = s->padded_width * s->channels;
    if (!w->x)
        return x;
    copy(s->height, s->width, s->channels, x, s->x_height, s->x_width, s->x_channel,
         w->x + s->top * line + s->left * s->channels, line, s->channels);
    return w->x;
}

/* A record's g, (T, columns). */
static const float *gradient(Work *w, const float *g) {
    const Shape *s = w->s;
    if (!w->g)
        return g;
    copy(s->out_height, s->out_width, s->out_channels, g, s->g_height, s->g_width, s->g_channel,
         w->g, s->out_width * w->columns, w->columns);
    return w->g;
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

/* For each of `records`: out (p, d) = A^T G, and its squared norm. Where `rows` is given, x is that
   of these records; where `to` is given, out is. Returns 0, or 1 where memory is missing. */
int outer(const Shape *s, int64_t records, const float *x, const int64_t *rows, const float *g,
          float *out, const int64_t *to, int64_t out_record, double *squares) {
    Work w;
    if (!begin(&w, s)) {
        end(&w);
        return 1;
    }
    for (int64_t i = 0; i < records; i++) {
        const float *a = input(&w, x + (rows ? rows[i] : i) * s->x_record);
        const float *b = gradient(&w, g + i * s->g_record);
        float *mine = out + (to ? to[i] : i) * out_record;
        wide_vec square = {0};
        for (int64_t n = 0, some; n < w.columns; n += some) {
            int two = n + 2 * WIDTH <= w.columns;
            some = two ? 2 * WIDTH : WIDTH;
            int64_t cut = s->out_channels - n < some ? s->out_channels - n : 0;
            for (int64_t p = 0; p < w.patch; p += ROWS) {
                const int64_t *offset = w.offset + p;
                int64_t lines = w.patch - p < ROWS ? w.patch - p : ROWS;
                int near = lines == ROWS && offset[ROWS - 1] == offset[0] + ROWS - 1;
                float part[ROWS * COLUMNS * WIDTH], *block = mine + p * s->out_channels + n;
                vec found = {0};
                for (int64_t t = 0; t < w.places; t += STRETCH)
                    (near ? (two ? near_two : near_one) : (two ? far_two : far_one))(
                        w.places - t < STRETCH ? w.places - t : STRETCH, w.base + t,
                        near ? a + offset[0] : a, offset, b + t * w.columns + n, w.columns, t > 0,
                        lines, cut ? part : block, cut ? some : s->out_channels, &found);
                square += __builtin_convertvector(found, wide_vec);
                for (int64_t r = 0; cut && r < lines; r++)
                    memcpy(block + r * s->out_channels, part + r * some, cut * sizeof *part);
            }
        }
        squares[i] = 0;
        for (int k = 0; k < WIDTH; k++)
            squares[i] += square[k];
    }
    end(&w);
    return 0;
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

static float total(vec v) {
    float sum = 0;
    for (int k = 0; k < WIDTH; k++)
        sum += v[k];
    return sum;
}

/* For each of `records`: |A^T G|^2, and `reach`, the sum over t of |a_t| |g_t|, which rounding errors
   are a share of. Returns 0, or 1 where memory is missing. */
int gram(const Shape *s, int64_t records, const float *x, const int64_t *rows, const float *g,
         double *squares, double *reach) {
    Work w;
    if (!begin(&w, s)) {
        end(&w);
        return 1;
    }
    /* A patch is runs of floats that lie side by side: lines of the kernel, or its places. */
    int lines = s->dilation_width == 1;
    int64_t length = s->channels * (lines ? s->kernel_width : 1);
    int64_t across = lines ? 1 : s->kernel_width;
    int64_t down = s->dilation_height * s->padded_width * s->channels;
    for (int64_t n = 0; n < records; n++) {
        const float *a = input(&w, x + (rows ? rows[n] : n) * s->x_record);
        const float *b = gradient(&w, g + n * s->g_record);
        double square = 0, reached = 0;
        for (int64_t i = 0; i < w.places; i += TILE_I)
            for (int64_t j = i; j < w.places; j += TILE_J) {
                const float *ai[TILE_I], *bi[TILE_I], *aj[TILE_J], *bj[TILE_J];
                for (int k = 0; k < TILE_I; k++) {
                    int64_t t = i + k < w.places ? i + k : i;
                    ai[k] = a + w.base[t];
                    bi[k] = b + t * w.columns;
                }
                for (int k = 0; k < TILE_J; k++) {
                    int64_t u = j + k < w.places ? j + k : j;
                    aj[k] = a + w.base[u];
                    bj[k] = b + u * w.columns;
                }
                vec aa[TILE_I][TILE_J], gg[TILE_I][TILE_J], sum = {0};
                dots(bi, bj, 1, w.columns, 0, gg);
                if (across == 1)
                    dots(ai, aj, s->kernel_height, length, down, aa);
                else
                    for (int64_t r = 0; r < across; r++) {
                        vec more[TILE_I][TILE_J];
                        dots(ai, aj, s->kernel_height, length, down, r ? more : aa);
                        for (int k = 0; k < TILE_I; k++)
                            for (int l = 0; l < TILE_J; l++)
                                aa[k][l] += r ? more[k][l] : (vec){0};
                        for (int k = 0; k < TILE_I; k++)
                            ai[k] += s->dilation_width * s->channels;
                        for (int k = 0; k < TILE_J; k++)
                            aj[k] += s->dilation_width * s->channels;
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
        squares[n] = square;
        reach[n] = reached;
    }
    end(&w);
    return 0;
}
