/* A step through all layers: norms, rotary embedding, cache, attention, products. */

#pragma once

#include "attention.h"

static void norm(const float *x, const float *weight, float eps, int64_t size, float *y)
{
    const float scale = inverse_rms(x, eps, size);
    for (int64_t j = 0; j < size; j++) y[j] = x[j] * scale * weight[j];
}

static void norms(const float *x, const float *weight, const Model *m, int64_t rows, float *y, Team team)
{
    int64_t row, last;
    share(rows, team, &row, &last);
    for (; row < last; row++) norm(x + row * m->hidden, weight, m->eps, m->hidden, y + row * m->hidden);
}

static void rotate(float *x, const float *cos, const float *sin, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* Finish queries and keys of this thread's rows and put keys and values where they belong. */
static void place(const Model *m, const Layer *layer, const Step *s, uint16_t *cache, float *qkv, Team team)
{
    const int64_t size = m->head_dim, heads = m->num_kv_heads, width = (m->groups + 2) * heads * size;
    int64_t row, last;
    share(s->batch * s->num_new, team, &row, &last);
    for (; row < last; row++) {
        const int64_t b = row / s->num_new, slot = s->offsets[b] + row % s->num_new, at = s->positions[row] * (size / 2);
        float *query = qkv + row * width, *key = query + m->groups * heads * size, *value = key + heads * size;
        if (layer->bias)
            for (int64_t i = 0; i < width; i++) query[i] += layer->bias[i];
        for (int64_t h = 0; h < (m->groups + 1) * heads; h++) {
            float *head = query + h * size;
            if (layer->gains) norm(head, layer->gains + (head < key ? 0 : size), m->eps, size, head);
            rotate(head, m->cos + at, m->sin + at, size / 2);
        }
        for (int64_t h = 0; h < heads; h++) {
            uint16_t *to = cache + b * s->slot_stride + h * s->head_stride + slot * size;
            for (int64_t i = 0; i < size; i += LANES) {
                store_half(to + i, load(key + h * size + i));
                store_half(to + s->plane_stride + i, load(value + h * size + i));
            }
        }
    }
}

static int64_t longest(const Step *s)
{
    int64_t most = 0;
    for (int64_t b = 0; b < s->batch; b++) most = s->offsets[b] > most ? s->offsets[b] : most;
    return upward(most + s->num_new, SIDE);
}

static int64_t widest(const Model *m)
{
    const int64_t seen = m->groups * m->num_kv_heads * m->head_dim, inner = m->layers->gate.outputs;
    const int64_t most = seen > inner ? seen : inner;
    return m->hidden > most ? m->hidden : most;
}

/* Where things lie in a step's work, in bytes from its start. */
typedef struct {
    int64_t normed, qkv, seen, inner, weights, bands, seen_by, end;
    int64_t per_thread; /* floats of `weights` */
} Plan;

static Plan plan(const Model *m, const Step *s)
{
    const int64_t rows = s->batch * s->num_new, heads = m->num_kv_heads * m->head_dim, tiled = in_tiles(&m->layers->out);
    const int64_t masks = s->visible_stride ? s->batch : 1;
    Plan p = {.per_thread = longest(s) * queries_of(m)};
    p.qkv = p.normed + upward(rows * m->hidden * 4, LINE);
    p.seen = p.qkv + upward(rows * (m->groups + 2) * heads * 4, LINE);
    p.inner = p.seen + upward(rows * m->groups * heads * 4, LINE);
    p.weights = p.inner + upward(rows * m->layers->gate.outputs * 4, LINE);
    p.bands = p.weights + s->threads * p.per_thread * 4;
    p.seen_by = p.bands + bands_bytes(&m->layers->out, rows, widest(m));
    p.end = p.seen_by + (tiled ? upward(masks * s->num_new * mask_stride(s), LINE) : 0);
    return p;
}

/* All threads together. The last hidden states lie at `normed`. */
static void layers(const Model *m, const Step *s, const Plan *p, Team team)
{
    const int64_t rows = s->batch * s->num_new;
    char *work = s->work, *bands = work + p->bands;
    float *normed = (float *)(work + p->normed), *qkv = (float *)(work + p->qkv), *seen = (float *)(work + p->seen);
    float *inner = (float *)(work + p->inner), *weights = (float *)(work + p->weights) + team.thread * p->per_thread;
    uint8_t *seen_by = (uint8_t *)(work + p->seen_by);
    if (in_tiles(&m->layers->out)) transpose_masks(s, seen_by, team);
    for (int64_t i = 0; i < m->num_layers; i++) {
        const Layer *layer = m->layers + i;
        uint16_t *cache = s->cache + 2 * i * s->plane_stride;
        norms(s->hidden, layer->norm_attention, m, rows, normed, team);
        meet(team);
        product(&layer->query_key_value, normed, rows, qkv, 0, bands, team);
        meet(team);
        place(m, layer, s, cache, qkv, team);
        meet(team);
        attention(m, s, cache, seen_by, qkv, seen, weights, team);
        meet(team);
        product(&layer->out, seen, rows, s->hidden, 1, bands, team);
        meet(team);
        norms(s->hidden, layer->norm_mlp, m, rows, normed, team);
        meet(team);
        gated(&layer->gate, &layer->up, normed, rows, inner, bands, team);
        meet(team);
        product(&layer->down, inner, rows, s->hidden, 1, bands, team);
        meet(team);
    }
    norms(s->hidden, m->norm, m, rows, normed, team);
    meet(team);
}
