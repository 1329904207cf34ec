/* Norms of gradients of an embedding: a record's tokens (places) each have a row of g (places, width),
   and rows of equal tokens are added up before they are squared, so that nothing cancels. Squares are
   added up in float32 over RUN numbers, and of these sums in float64. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const char source[] = SOURCE;

enum { RUN = 512 };

static double square(const float *row, int64_t width) {
    double total = 0;
    for (int64_t run = 0; run < width; run += RUN) {
        float part = 0;
        for (int64_t k = run; k < (run + RUN < width ? run + RUN : width); k++)
            part += row[k] * row[k];
        total += part;
    }
    return total;
}

/* The squared norms of the records from `start` to before `stop`. Returns 0, or 1 where memory is
   missing. */
int token_squares(int64_t start, int64_t stop, int64_t places, int64_t width, const int64_t *ids,
                  const float *g, float *squares) {
    uint64_t slots = 4; /* of a table of the tokens seen, half of it empty at least */
    while (slots < 2 * (uint64_t)places)
        slots *= 2;
    int64_t *seen = malloc(slots * sizeof *seen); /* at which place first, or -1 */
    float *sums = malloc((places * width + 1) * sizeof *sums);
    int failed = !seen || !sums;
    ids += start * places, g += start * places * width;
    for (int64_t i = start; !failed && i < stop; i++, ids += places, g += places * width) {
        double total = 0;
        memset(seen, -1, slots * sizeof *seen);
        for (int64_t t = 0; t < places; t++) {
            uint64_t slot = (uint64_t)ids[t] * 0x9e3779b97f4a7c15u >> 20 & (slots - 1);
            while (seen[slot] >= 0 && ids[seen[slot]] != ids[t])
                slot = (slot + 1) & (slots - 1);
            float *sum = sums + (seen[slot] >= 0 ? seen[slot] : t) * width;
            const float *row = g + t * width;
            if (seen[slot] < 0)
                memcpy(sum, row, width * sizeof *sum);
            else
                for (int64_t k = 0; k < width; k++)
                    sum[k] += row[k];
            if (seen[slot] < 0)
                seen[slot] = t;
        }
        for (uint64_t slot = 0; slot < slots; slot++)
            if (seen[slot] >= 0)
                total += square(sums + seen[slot] * width, width);
        squares[i] = total;
    }
    free(seen);
    free(sums);
    return failed;
}
