/* What heads guess for some rows. */

#pragma once

#include "products.h"

typedef struct {
    const Weight *blocks; /* [layers]; the first reads [hidden; num_read embeddings of the path] */
    const float *biases;  /* [layers][D] */
    int64_t num_read;
} Head;

typedef struct {
    const Head *heads;
    int64_t num_layers, hidden;
    Weight lm_head;
    const int64_t *vocabulary;  /* ids of the tokens that lm_head scores; NULL: all, in order */
    const void *embeddings;     /* [tokens][D] */
    int64_t embeddings_in_half; /* bfloat16, or float32? */
} Heads;

/* Heads first, first + 1, … guess what follows in each row. */
typedef struct {
    int64_t first, count, rows, ranks;
    int64_t rows_each;    /* rows of one hidden state */
    const float *hidden;  /* [rows / rows_each][D] */
    const int64_t *path;  /* [rows][num_read] token ids, for a head that reads them */
    const float *temperatures; /* [count]; NULL: 1 */
    int64_t *tokens;      /* [count][rows][ranks], out, best first */
    float *log_probs;     /* the same, or NULL where nobody asks */
} Guess;

/* The `ranks` largest of x [size], best first, of equals the first: their places and values. */
static void best_of(const float *x, int64_t size, int64_t ranks, int64_t *places, float *values)
{
    enum { SOME = 4 * LANES };
    for (int64_t from = 0; from < size; from += SOME) {
        const int64_t end = from + SOME < size ? from + SOME : size;
        if (from >= ranks && !(largest_of(x + from, end - from) > values[ranks - 1])) continue;
        for (int64_t i = from; i < end; i++) {
            if (i >= ranks && !(x[i] > values[ranks - 1])) continue;
            int64_t r = i < ranks ? i : ranks - 1;
            for (; r > 0 && x[i] > values[r - 1]; r--) places[r] = places[r - 1], values[r] = values[r - 1];
            places[r] = i, values[r] = x[i];
        }
    }
}

/* The logarithm of the sum of e^((x - most) / temperature) over x [size]. */
static float log_sum(const float *x, int64_t size, float most, float temperature)
{
    const float slope = 1.0f / temperature;
    Floats sum = {0};
    float tail = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += exponential((load(x + i) - most) * slope);
    for (; i < size; i++) tail += expf((x[i] - most) * slope);
    return logf(sum_of(sum) + tail);
}

/* The nearest bfloat16, of two equally near ones the even one. */
INLINE float rounded_to_half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

/* What a head reads for a row: the hidden state, then the path's embeddings, scaled to unit mean square and, of embeddings in
   bfloat16, rounded to it as PyTorch has it. */
static void read_row(const Heads *h, const Guess *g, int64_t num_read, int64_t row, float *to)
{
    const int64_t size = h->hidden;
    memcpy(to, g->hidden + row / g->rows_each * size, (size_t)size * sizeof(float));
    for (int64_t j = 0; j < num_read; j++) {
        const int64_t at = g->path[row * num_read + j] * size;
        to += size;
        if (h->embeddings_in_half)
            for (int64_t i = 0; i < size; i++) {
                const uint32_t bits = (uint32_t)((const uint16_t *)h->embeddings)[at + i] << 16;
                memcpy(to + i, &bits, sizeof bits);
            }
        else
            memcpy(to, (const float *)h->embeddings + at, (size_t)size * sizeof(float));
        const float scale = inverse_rms(to, 1.1920929e-7f, size);
        for (int64_t i = 0; i < size; i++) to[i] = h->embeddings_in_half ? rounded_to_half(to[i] * scale) : to[i] * scale;
    }
}

/* y [rows][D] = x + SiLU(bump + bias), x the hidden states before the first block and y after it; this thread's rows. */
static void bumps(const Heads *h, const Guess *g, int64_t layer, const float *bias, const float *bump, float *y, Team team)
{
    const int64_t size = h->hidden;
    int64_t row, last;
    share(g->rows, team, &row, &last);
    for (; row < last; row++) {
        const float *x = layer ? y + row * size : g->hidden + row / g->rows_each * size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Floats b = load(bump + row * size + i) + load(bias + i);
            store(y + row * size + i, load(x + i) + b / (1.0f + exponential(-b)));
        }
        for (; i < size; i++) {
            const float b = bump[row * size + i] + bias[i];
            y[row * size + i] = x[i] + b / (1.0f + expf(-b));
        }
    }
}

/* Where things lie in the work of guesses, in bytes from its start. */
typedef struct {
    int64_t read, bump, features, logits, values, bands, end;
} GuessPlan;

static GuessPlan guess_plan(const Heads *h, const Guess *g)
{
    const int64_t all = g->count * g->rows;
    int64_t wide = 0, bands = bands_bytes(&h->lm_head, all, h->hidden);
    for (int64_t k = g->first; k < g->first + g->count; k++)
        for (int64_t layer = 0; layer < h->num_layers; layer++) {
            const Weight *block = h->heads[k].blocks + layer;
            const int64_t need = bands_bytes(block, g->rows, block->inputs);
            wide = block->inputs > wide ? block->inputs : wide;
            bands = need > bands ? need : bands;
        }
    GuessPlan p = {.read = 0, .bump = upward(g->rows * wide * 4, LINE)};
    p.features = p.bump + upward(g->rows * h->hidden * 4, LINE);
    p.logits = p.features + upward(all * h->hidden * 4, LINE);
    p.values = p.logits + upward(all * h->lm_head.outputs * 4, LINE);
    p.bands = p.values + upward(all * g->ranks * 4, LINE);
    p.end = p.bands + bands;
    return p;
}

/* All threads together. */
static void guess(const Heads *h, const Guess *g, char *work, Team team)
{
    const int64_t rows = g->rows, all = g->count * rows, size = h->hidden, choices = h->lm_head.outputs;
    const GuessPlan p = guess_plan(h, g);
    float *read = (float *)(work + p.read), *bump = (float *)(work + p.bump), *features = (float *)(work + p.features);
    float *logits = (float *)(work + p.logits), *values = (float *)(work + p.values);
    char *bands = work + p.bands;
    int64_t row, last;
    for (int64_t k = 0; k < g->count; k++) {
        const Head *head = h->heads + g->first + k;
        float *own = features + k * rows * size;
        share(rows, team, &row, &last);
        for (; row < last; row++) read_row(h, g, head->num_read, row, read + row * (1 + head->num_read) * size);
        for (int64_t layer = 0; layer < h->num_layers; layer++) {
            meet(team);
            product(head->blocks + layer, layer ? own : read, rows, bump, 0, bands, team);
            meet(team);
            bumps(h, g, layer, head->biases + layer * size, bump, own, team);
        }
        meet(team);
    }
    product(&h->lm_head, features, all, logits, 0, bands, team);
    meet(team);
    share(all, team, &row, &last);
    for (; row < last; row++) {
        const float *x = logits + row * choices, heat = g->temperatures ? g->temperatures[row / rows] : 1.0f;
        int64_t *places = g->tokens + row * g->ranks;
        float *best = values + row * g->ranks;
        best_of(x, choices, g->ranks, places, best);
        if (g->log_probs) {
            const float most = best[0], total = log_sum(x, choices, most, heat);
            for (int64_t r = 0; r < g->ranks; r++) g->log_probs[row * g->ranks + r] = fminf((best[r] - most) / heat - total, 0);
        }
        if (h->vocabulary)
            for (int64_t r = 0; r < g->ranks; r++) places[r] = h->vocabulary[places[r]];
    }
    meet(team);
}
