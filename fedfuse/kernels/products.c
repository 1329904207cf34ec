/* Products of two small matrices for each record, and their norms: what book-keeping adds to a plain
   backward pass. For one record, with its input x and its output gradient g,

       outer      A^T G, (p, d): A (T, p) has what each output place of a convolution sees, its patch
       weighted   the sum of A^T G over the records, each times a factor
       gram       |A^T G|^2, without A^T G, as the sum of <a_t, a_u> <g_t, g_u> over all t and u

   Patches are read where they lie in x, never written out. A sequence through a linear layer is a
   convolution whose kernel covers one place. WIDTH floats are in a register; sums over T are made in
   float32 as by any BLAS, squares are added up in float64. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const char source[] = SOURCE;

/* What is held in registers at once: of A^T G, and of the two (T, T) matrices. */
#if WIDTH == 16
enum { ROWS = 14, TILE_I = 4, TILE_J = 4 };
#define EACH_ROWS(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14)
#else
enum { ROWS = 6, TILE_I = 4, TILE_J = 2 };
#define EACH_ROWS(F) F(1) F(2) F(3) F(4) F(5) F(6)
#endif
enum { COLUMNS = 2, STRETCH = 512 }; /* STRETCH places are added up before their sum is stored */
enum { HELD = 1 << 15, FIRST = 32 }; /* numbers of several records at a time; places of the first */
enum { CACHE_LINE = 64 };            /* in bytes */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int ints __attribute__((vector_size(4 * WIDTH)));
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

/* A layer's inputs and output gradients. Where `rows` is given, these records alone count; of those
   that count, the ones from `start` to before `stop` are worked on. */
typedef struct {
    const Shape *s;
    int64_t start, stop;
    const float *x, *g;
    const int64_t *rows;
} Pairs;

/* What is ready to be read: one record, or several side by side. */
typedef struct {
    const Shape *s;
    int64_t places, patch, columns; /* T, p, and d rounded up to whole registers */
    int64_t run;                    /* a patch is runs of so many numbers that lie side by side */
    int64_t *first, *offset;        /* where a place's patch begins, and a number in a patch is */
    int64_t most, area, line;       /* records there is room for; numbers of an x, of a place in b */
    float *x, *g;                   /* their copies, where they can't be read as they lie */
    const float *a, *b;             /* x and g */
    int64_t *base;                  /* where patches begin in a */
    const char *soon[2];            /* the x and g that are needed next */
    int64_t step;                   /* bytes of them that are fetched at a time, by turns */
} Work;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

/* A register's numbers, of which it has whole many, do not lie in two lines of a cache. */
static float *zeros(int64_t count) {
    size_t bytes = parts(count * sizeof(float), CACHE_LINE) * CACHE_LINE;
    float *made = aligned_alloc(CACHE_LINE, bytes);
    return made ? memset(made, 0, bytes) : made;
}

/* With `many`, there is room for as many records as are worth it, and for a copy of their g. */
static int begin(Work *w, const Pairs *pairs, int many) {
    const Shape *s = pairs->s;
    memset(w, 0, sizeof *w);
    w->s = s;
    w->places = s->out_height * s->out_width;
    w->patch = s->kernel_height * s->kernel_width * s->channels;
    w->columns = parts(s->out_channels, WIDTH) * WIDTH;
    w->run = s->channels * (s->dilation_width == 1 ? s->kernel_width : 1);
    w->area = s->padded_height * s->padded_width * s->channels;
    w->line = w->columns + (many ? WIDTH : 0); /* powers of 2 would crowd a part of the cache */
    int padded = s->padded_height != s->height || s->padded_width != s->width;
    int in_order = s->x_channel == 1 && s->x_width == s->channels &&
                   (s->height == 1 || s->x_height == s->width * s->channels);
    int copy_x = padded || !in_order;
    in_order = s->g_channel == 1 && s->g_width == s->out_channels &&
               (s->out_height == 1 || s->g_height == s->out_width * s->out_channels);
    int copy_g = many || !in_order || w->columns != s->out_channels;
    w->most = 1;
    if (many)
        w->most += least(HELD / (w->places * w->line + copy_x * w->area), pairs->stop - pairs->start);
    w->first = malloc(w->places * sizeof *w->first);
    w->offset = malloc(w->patch * sizeof *w->offset);
    w->base = malloc(w->most * w->places * sizeof *w->base);
    if (copy_x)
        w->x = zeros(w->most * w->area);
    if (copy_g)
        w->g = zeros(w->most * w->places * w->line);
    if (!w->first || !w->offset || !w->base || (copy_x && !w->x) || (copy_g && !w->g))
        return 0;
    int64_t *at = w->first;
    for (int64_t i = 0; i < s->out_height; i++)
        for (int64_t j = 0; j < s->out_width; j++)
            *at++ = (i * s->stride_height * s->padded_width + j * s->stride_width) * s->channels;
    at = w->offset;
    for (int64_t i = 0; i < s->kernel_height; i++)
        for (int64_t j = 0; j < s->kernel_width; j++)
            for (int64_t c = 0; c < s->channels; c++)
                *at++ = c + s->channels * (i * s->dilation_height * s->padded_width +
                                           j * s->dilation_width);
    at = w->base;
    for (int64_t k = 0; k < w->most; k++)
        for (int64_t t = 0; t < w->places; t++)
            *at++ = k * w->area + w->first[t];
    return 1;
}

static void end(Work *w) {
    free(w->first);
    free(w->offset);
    free(w->base);
    free(w->x);
    free(w->g);
}

/* factor times (height, width, n) -> the same with n last; a line of `to` has room for `room` of
   them. */
static void copy(int64_t height, int64_t width, int64_t n, const float *from, int64_t by_height,
                 int64_t by_width, int64_t by_n, float factor, float *restrict to, int64_t line,
                 int64_t room) {
    if (by_n == 1 && by_width == n && room == n) {
        n *= width;
        width = 1;
    }
    for (int64_t i = 0; i < height; i++, from += by_height, to += line)
        if (by_n == 1)
            for (int64_t j = 0; j < width; j++)
                for (int64_t c = 0; c < n; c++)
                    to[j * room + c] = factor * from[j * by_width + c];
        else
            for (int64_t c = 0; c < n; c++)
                for (int64_t j = 0; j < width; j++)
                    to[j * room + c] = factor * from[j * by_width + c * by_n];
}

static int64_t row(const Pairs *pairs, int64_t i) { return pairs->rows ? pairs->rows[i] : i; }

/* Makes record i ready, as number k of several: x with zeros around it and channels last, and g as
   (T, columns), which is times factor where it is a copy. */
static void ready(Work *w, const Pairs *pairs, int64_t i, int64_t k, float factor) {
    const Shape *s = w->s;
    int64_t line = s->padded_width * s->channels, start = row(pairs, i) * s->x_record;
    const float *g = pairs->g + row(pairs, i) * s->g_record;
    w->a = w->x ? w->x : pairs->x;
    w->b = w->g ? w->g : g;
    if (w->x)
        copy(s->height, s->width, s->channels, pairs->x + start, s->x_height, s->x_width,
             s->x_channel, 1, w->x + k * w->area + s->top * line + s->left * s->channels, line,
             s->channels);
    for (int64_t t = 0; !w->x && t < w->places; t++)
        w->base[k * w->places + t] = start + w->first[t];
    if (w->g)
        copy(s->out_height, s->out_width, s->out_channels, g, s->g_height, s->g_width, s->g_channel,
             factor, w->g + k * w->places * w->line, s->out_width * w->line, w->line);
}

/* `count` records from i on are needed next. Memory is slow, so they are fetched while others are
   multiplied, in so many `turns`: a step of x, then one of g. */
static void announce(Work *w, const Pairs *pairs, int64_t i, int64_t count, int64_t turns) {
    int64_t x = w->s->height * w->s->width * w->s->channels, g = w->places * w->s->out_channels;
    count = least(count, pairs->stop - i);
    i = count ? row(pairs, i) : 0;
    w->soon[0] = (const char *)(pairs->x + i * w->s->x_record);
    w->soon[1] = (const char *)(pairs->g + i * w->s->g_record);
    w->step = parts(2 * count * (x > g ? x : g) * sizeof *pairs->x, turns);
}

/* A block of out: out[r][c] = sum over t of x[base[t] + offset[r]] g[t][c], to which is added, with
   `more`, what stands there. Meanwhile what is needed soon is fetched, a step for each t. */
typedef struct {
    int64_t places, g_line, out_line;
    const int64_t *base, *offset;
    const float *x, *g;
    float *out;
    int more;
    const char *soon[2];
    int64_t step;
} Block;

/* Of so many rows and registers of columns; `near`: the offsets follow one another. `squares`: of what
   is then in out, by place in a register. */
static inline __attribute__((always_inline)) void block(const Block *b, int rows, int cols, int near,
                                                        vec *squares) {
    vec sum[ROWS][COLUMNS], found[COLUMNS] = {{0}};
    const int64_t *base = b->base, *offset = b->offset, line = b->g_line;
    const float *x = near ? b->x + offset[0] : b->x, *g = b->g;
    const char *soon = b->soon[0], *then = b->soon[1], *after;
    int64_t step = b->step;
    int more = b->more;
    _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            sum[r][c] = (vec){0};
            __builtin_prefetch(b->out + r * b->out_line + c * WIDTH, 1);
        }
    for (int64_t t = 0, places = b->places; t < places; t++, g += line) {
        const float *seen = x + base[t];
        vec y[COLUMNS];
        __builtin_prefetch(soon);
        after = soon + step;
        soon = then;
        then = after;
        for (int c = 0; c < cols; c++)
            y[c] = *(const vec *)(g + c * WIDTH);
        _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                sum[r][c] += seen[near ? r : offset[r]] * y[c];
    }
    _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            vec *to = (vec *)(b->out + r * b->out_line + c * WIDTH);
            vec all = more ? *to + sum[r][c] : sum[r][c];
            *to = all;
            found[c] += all * all;
        }
    *squares = cols == 1 ? found[0] : found[0] + found[1];
}

#define KINDS(R)                                                                                  \
    static void far_one_##R(const Block *b, vec *squares) { block(b, R, 1, 0, squares); }         \
    static void far_two_##R(const Block *b, vec *squares) { block(b, R, 2, 0, squares); }         \
    static void near_one_##R(const Block *b, vec *squares) { block(b, R, 1, 1, squares); }        \
    static void near_two_##R(const Block *b, vec *squares) { block(b, R, 2, 1, squares); }
EACH_ROWS(KINDS)
#define NAMES(R) {{far_one_##R, far_two_##R}, {near_one_##R, near_two_##R}},
static void (*const blocks[ROWS][2][2])(const Block *, vec *) = {EACH_ROWS(NAMES)};

/* So many numbers of a patch are cut into blocks: a run, or all, where runs are short: with too few
   sums at once each waits for its last addition. */
static int64_t stretch(const Work *w) { return w->run >= ROWS / 2 + 2 ? w->run : w->patch; }

/* Through how many places the blocks of out go in all. */
static int64_t turns(const Work *w, int64_t held) {
    return held * w->places * parts(w->columns, COLUMNS * WIDTH) * parts(stretch(w), ROWS) *
           (w->patch / stretch(w));
}

/* out (p, d) = A^T G of the records that are ready, `held` of them, or, with `more`, out + A^T G;
   `squares`: of out, in WIDTH parts. */
static void product(const Work *w, int64_t held, int more, float *out, wide_vec *squares) {
    int64_t d = w->s->out_channels, places = held * w->places, run = stretch(w);
    int near = run == w->run;
    Block b = {.x = w->a, .g_line = w->line, .soon = {w->soon[0], w->soon[1]}};
    /* Longer steps would leave out most; what the processor fetches by itself is better then. */
    b.step = w->step < 2 * CACHE_LINE ? w->step : 0;
    *squares = (wide_vec){0};
    for (int64_t n = 0, some; n < w->columns; n += some) {
        int two = n + 2 * WIDTH <= w->columns;
        some = two ? 2 * WIDTH : WIDTH;
        int64_t cut = d - n < some ? d - n : 0; /* columns of a block that is not whole */
        for (int64_t p = 0, rows; p < w->patch; p += rows) {
            int64_t left = run - p % run;
            rows = parts(left, parts(left, ROWS)); /* as few blocks as can be, about equal */
            float part[ROWS * COLUMNS * WIDTH], *corner = out + p * d + n;
            vec found;
            if (cut)
                memset(part, 0, sizeof part);
            for (int64_t r = 0; more && cut && r < rows; r++)
                memcpy(part + r * some, corner + r * d, cut * sizeof *part);
            b.offset = w->offset + p;
            b.out = cut ? part : corner;
            b.out_line = cut ? some : d;
            for (int64_t t = 0; t < places; t += STRETCH) {
                b.places = least(places - t, STRETCH);
                b.base = w->base + t;
                b.g = w->b + t * w->line + n;
                b.more = more || t > 0;
                blocks[rows - 1][near][two](&b, &found);
                for (int k = 0; k < 2; k++)
                    b.soon[k] += b.places * b.step / 2;
            }
            *squares += __builtin_convertvector(found, wide_vec);
            for (int64_t r = 0; cut && r < rows; r++)
                memcpy(corner + r * d, part + r * some, cut * sizeof *part);
        }
    }
}

/* For each record: out (p, d) = A^T G, and its squared norm; where `to` is given, out is that of
   these. Returns 0, or 1 where memory is missing, as the others do. */
int outer(const Pairs *pairs, float *out, const int64_t *to, int64_t out_record, float *squares) {
    Work w;
    int failed = !begin(&w, pairs, 0);
    for (int64_t i = pairs->start; !failed && i < pairs->stop; i++) {
        wide_vec square;
        ready(&w, pairs, i, 0, 1);
        announce(&w, pairs, i + 1, 1, turns(&w, 1));
        product(&w, 1, 0, out + (to ? to[i] : i) * out_record, &square);
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
    int failed = !begin(&w, pairs, 1);
    /* Several records are as one with all their places: out is fetched and stored once for them. At
       first they are few: nothing fetched these before. */
    int64_t held = 0, wanted = failed ? 0 : least(parts(FIRST, w.places), w.most);
    for (int64_t i = pairs->start; !failed && i < pairs->stop; i++) {
        wide_vec square;
        if (factors[i] != 0)
            ready(&w, pairs, i, held++, factors[i]);
        if (held == wanted || (held && i + 1 == pairs->stop)) {
            wanted = least(2 * wanted, w.most);
            announce(&w, pairs, i + 1, wanted, turns(&w, held));
            product(&w, held, 1, out, &square);
            held = 0;
        }
    }
    end(&w);
    return failed;
}

/* The totals of WIDTH registers, side by side: two registers are added up to one, again and again,
   first within each four lanes, until one lane is left of each. */
#define ONES(k) k, k + WIDTH, k + 1, k + 1 + WIDTH
#define TWOS(k) k, k + 1, k + WIDTH, k + 1 + WIDTH
#define FOUR(k) k, k + 1, k + 2, k + 3
#if WIDTH == 16
#define ALL(F, k) F(k), F(k + 4), F(k + 8), F(k + 12)
#define LAST(k) FOUR(k), FOUR(k + 8), FOUR(k + 16), FOUR(k + 24)
#else
#define ALL(F, k) F(k), F(k + 4)
#define LAST(k) FOUR(k), FOUR(k + 8)
#endif
#define SHUFFLE(...) __builtin_shufflevector(v[2 * k], v[2 * k + 1], __VA_ARGS__)
static inline vec totals(vec *v) {
    int k = 0;
    for (; k < WIDTH / 2; k++)
        v[k] = SHUFFLE(ALL(ONES, 0)) + SHUFFLE(ALL(ONES, 2));
    for (k = 0; k < WIDTH / 4; k++)
        v[k] = SHUFFLE(ALL(TWOS, 0)) + SHUFFLE(ALL(TWOS, 2));
#if WIDTH == 16
    for (k = 0; k < 2; k++)
        v[k] = SHUFFLE(FOUR(0), FOUR(4), FOUR(16), FOUR(20)) +
               SHUFFLE(FOUR(8), FOUR(12), FOUR(24), FOUR(28));
#endif
    k = 0;
    return SHUFFLE(LAST(0)) + SHUFFLE(LAST(4));
}

/* The first n numbers, then zeros; no others are read. */
static inline vec load(const float *from, int64_t n) {
    if (n == WIDTH)
        return *(const vec *)from;
#if WIDTH == 16
    return _mm512_maskz_loadu_ps((1 << n) - 1, from);
#else
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
#endif
}

/* sum[i * TILE_J + j] += products of n numbers from k on, of row i of a and row j of b. */
static inline __attribute__((always_inline)) void multiply(const float *const *a,
                                                           const float *const *b, int64_t k,
                                                           int64_t n, vec *sum) {
    vec y[TILE_J];
    for (int j = 0; j < TILE_J; j++)
        y[j] = load(b[j] + k, n);
    for (int i = 0; i < TILE_I; i++) {
        vec x = load(a[i] + k, n);
        for (int j = 0; j < TILE_J; j++)
            sum[i * TILE_J + j] += x * y[j];
    }
}

/* In lane i * TILE_J + j <row i of a, row j of b>; a row is `runs` of `length` floats, which begin
   where `offset` has their first. */
static inline __attribute__((always_inline)) vec dots(const float *const *a, const float *const *b,
                                                      int64_t runs, int64_t length,
                                                      const int64_t *offset) {
    vec sum[TILE_I * TILE_J] = {{0}};
    for (int64_t r = 0; r < runs; r++) {
        int64_t k = offset[r * length], stop = k + length;
        for (; k + WIDTH <= stop; k += WIDTH)
            multiply(a, b, k, WIDTH, sum);
        if (k < stop)
            multiply(a, b, k, stop - k, sum);
    }
    return totals(sum);
}

/* For each record |A^T G|^2, rounded up: where terms cancel, rounding could make their sum too small,
   and it is raised by what rounding can do to so many as large as the sum over t of |a_t| |g_t|. */
int gram(const Pairs *pairs, float *squares) {
    Work w;
    int failed = !begin(&w, pairs, 0);
    int64_t tiles = parts(w.places, TILE_I) * (parts(w.places, TILE_J) + TILE_I / TILE_J) / 2;
    ints down, across; /* of a lane in a tile */
    for (int k = 0; k < WIDTH; k++) {
        down[k] = k / TILE_J;
        across[k] = k % TILE_J;
    }
    for (int64_t n = pairs->start; !failed && n < pairs->stop; n++) {
        double square = 0, reached = 0;
        wide_vec sum = {0};
        ready(&w, pairs, n, 0, 1);
        announce(&w, pairs, n + 1, 1, 2 * tiles);
        for (int64_t i = 0; i < w.places; i += TILE_I)
            for (int64_t j = i; j < w.places; j += TILE_J) {
                const float *ai[TILE_I], *bi[TILE_I], *aj[TILE_J], *bj[TILE_J];
                for (int64_t at = 0; at < w.step; at += CACHE_LINE) {
                    __builtin_prefetch(w.soon[0] + at);
                    __builtin_prefetch(w.soon[1] + at);
                }
                w.soon[0] += w.step;
                w.soon[1] += w.step;
                for (int k = 0; k < TILE_I; k++) {
                    int64_t t = i + k < w.places ? i + k : i;
                    ai[k] = w.a + w.base[t];
                    bi[k] = w.b + t * w.line;
                }
                for (int k = 0; k < TILE_J; k++) {
                    int64_t u = j + k < w.places ? j + k : j;
                    aj[k] = w.a + w.base[u];
                    bj[k] = w.b + u * w.line;
                }
                vec both = dots(ai, aj, w.patch / w.run, w.run, w.offset) *
                           dots(bi, bj, 1, w.columns, w.offset);
                ints below = down + (int)(i - j), inside = across < (int)(w.places - j);
                ints equal = (below == across) & inside, above = (below < across) & inside;
                for (int k = 0; j < i + TILE_I && k < WIDTH; k++)
                    if (equal[k]) /* |a_t|^2 |g_t|^2 */
                        reached += sqrtf(fmaxf(both[k], 0));
                /* <a_t, a_u> is <a_u, a_t>: where t < u it is taken twice, elsewhere not. */
                both = (vec)((ints)both & (above | equal));
                both += (vec)((ints)both & above);
                sum += __builtin_convertvector(both, wide_vec);
            }
        for (int k = 0; k < WIDTH; k++)
            square += sum[k];
        square += reached * reached * (FLT_EPSILON / 2);
        squares[n] = square < 0 ? 0 : square; /* what is not a number stays so */
    }
    end(&w);
    return failed;
}
