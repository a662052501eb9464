/* Attention of new rows to their prefix and, by a mask, to one another. */

#pragma once

#include "model.h"

#define QUERIES 4 /* queries of a narrow block */
#define VECTORS (LANES == 16 ? 4 : 2) /* of a value, in one pass for QUERIES queries */
#define MOST_TILED 256 /* the largest head size whose keys are multiplied as tiles */

/* A mask with queries innermost has room behind each row to read SIDE of them from any on. */
static int64_t mask_stride(const Step *s) { return s->num_new + SIDE; }

static void transpose_masks(const Step *s, uint8_t *seen_by, Team team)
{
    const int64_t num_new = s->num_new, stride = mask_stride(s);
    int64_t column, last;
    share((s->visible_stride ? s->batch : 1) * num_new, team, &column, &last);
    for (; column < last; column++)
        for (int64_t row = 0; row < num_new; row++) {
            const uint8_t *mask = s->visible + column / num_new * s->visible_stride;
            seen_by[column * stride + row] = mask[row * num_new + column % num_new];
        }
}

/* A block of queries of one key/value head. Where keys are multiplied as tiles it has SIDE queries, else QUERIES.
   Positions count from the first that any of them sees. */
typedef struct {
    int64_t prefix, num_new, size; /* positions before the new ones, new ones, head size */
    int64_t span;                  /* positions that are looked at: no query sees a later one */
    int64_t all_see;               /* from here to the prefix's end nothing lies outside a query's window */
    int32_t begins[SIDE];          /* where each query's window does */
    const uint16_t *keys, *values;
    const float *query[SIDE];    /* a short block repeats its last query */
    float *out[SIDE];
    int64_t node[SIDE];
    int count, width;            /* queries, and columns of the weights */
} Block;

/* Positions up to the last that a query sees. */
static int64_t seen_span(const Block *b, const uint8_t *visible)
{
    int64_t most = 0;
    for (int q = 0; q < b->count; q++) {
        int64_t end = b->num_new;
        while (end > most && !visible[b->node[q] * b->num_new + end - 1]) end--;
        most = end;
    }
    return b->prefix + most;
}

/* Begin the block where the first of its queries' windows does; `positions` are those of its sequence's new rows. */
static void open_window(Block *b, int64_t window, const int64_t *positions)
{
    int64_t first = b->prefix, last = 0, begins[SIDE];
    for (int q = 0; q < b->width; q++) {
        const int64_t begin = positions[b->node[q]] - window + 1;
        begins[q] = begin < 0 ? 0 : begin > b->prefix ? b->prefix : begin;
        first = begins[q] < first ? begins[q] : first;
        last = begins[q] > last ? begins[q] : last;
    }
    for (int q = 0; q < b->width; q++) b->begins[q] = (int32_t)(begins[q] - first);
    b->all_see = last - first;
    b->prefix -= first, b->span -= first;
    b->keys += first * b->size, b->values += first * b->size;
}

/* One or two vectors of a key, for QUERIES queries; `vectors` is constant. */
INLINE void add_dots(const uint16_t *key, const float *queries, int64_t size, int vectors, Floats dot[QUERIES])
{
    Floats part[2];
    if (vectors == 2) load_halves(key, part);
    else part[0] = load_half(key);
    for (int v = 0; v < vectors; v++)
        for (int q = 0; q < QUERIES; q++) dot[q] += load(queries + q * size + v * LANES) * part[v];
}

/* Dot products of keys and queries into weights [span][QUERIES], which have room for one key more. */
static void dots(const Block *b, float *weights)
{
    const int64_t size = b->size, paired = size / (2 * LANES) * 2 * LANES;
    float queries[QUERIES * size]; /* even and odd places apart, as pairs of vectors of keys are read */
    for (int q = 0; q < QUERIES; q++) {
        const float *from = b->query[q];
        float *to = queries + q * size;
        for (int64_t i = 0; i < paired; i += 2 * LANES)
            for (int j = 0; j < LANES; j++) to[i + j] = from[i + 2 * j], to[i + LANES + j] = from[i + 2 * j + 1];
        for (int64_t i = paired; i < size; i++) to[i] = from[i];
    }
    for (int64_t t = 0; t < b->span; t += 2) {
        const uint16_t *key = b->keys + t * size, *next = t + 1 < b->span ? key + size : key;
        Floats dot[2 * QUERIES] = {{0}};
        int64_t i = 0;
        for (; i < paired; i += 2 * LANES) {
            add_dots(key + i, queries + i, size, 2, dot);
            add_dots(next + i, queries + i, size, 2, dot + QUERIES);
        }
        if (i < size) {
            add_dots(key + i, queries + i, size, 1, dot);
            add_dots(next + i, queries + i, size, 1, dot + QUERIES);
        }
        *(AnyEight *)(weights + t * QUERIES) = sums_of(dot);
    }
}

#ifdef HAS_TILES
/* The same, of queries rounded to bfloat16, SIDE keys and SIDE queries at a time, into weights [span][width]. Keys behind
   the last are read too (values lie there) and their products dropped. */
static void dots_in_tiles(const Block *b, float *weights)
{
    uint16_t rounded[SIDE][MOST_TILED];
    uint32_t pairs[MOST_TILED / 2][SIDE];
    float found[SIDE][SIDE];
    for (int q = 0; q < b->width; q++)
        for (int64_t i = 0; i < b->size; i += LANES) store_half(rounded[q] + i, load(b->query[q] + i));
    for (int64_t i = 0; i < b->size / 2; i++)
        for (int q = 0; q < b->width; q++) memcpy(&pairs[i][q], rounded[q] + 2 * i, sizeof(uint32_t));
    for (int64_t t = 0; t < b->span; t += SIDE) {
        _tile_zero(0);
        for (int64_t i = 0; i < b->size; i += DEEP) {
            _tile_loadd(4, b->keys + t * b->size + i, b->size * 2);
            _tile_loadd(6, pairs + i / 2, SIDE * 4);
            _tile_dpbf16ps(0, 4, 6);
        }
        if (b->width == SIDE) {
            _tile_stored(0, weights + t * SIDE, SIDE * 4);
        } else {
            _tile_stored(0, found, SIDE * 4);
            for (int k = 0; k < SIDE; k++) memcpy(weights + (t + k) * QUERIES, found[k], QUERIES * sizeof(float));
        }
    }
}

/* Which of SIDE queries see new position `column`: all ones or zeros each. `seen_by` [num_new][num_new, padded] is the
   mask with queries innermost; the node of query q is first + place[q]. */
INLINE Ints visible_to(const uint8_t *seen_by, int64_t stride, int64_t column, int64_t first, Bytes place)
{
    const Bytes nodes = *(const AnyBytes *)(seen_by + column * stride + first);
    const Bytes seen = (Bytes)_mm_shuffle_epi8((__m128i)nodes, (__m128i)place);
    return __builtin_convertvector((SignedBytes)(seen != 0), Ints);
}

/* Dot products [span][SIDE] to the softmax's numerators; their sums into total [SIDE]. */
static void soften_wide(const Block *b, const uint8_t *seen_by, int64_t stride, float *weights, float *total)
{
    const Floats scale = spread(1.0f / sqrtf((float)b->size)), never = spread(-INFINITY);
    Floats most = never, sum = {0};
    Bytes place;
    Ints begins;
    memcpy(&begins, b->begins, sizeof begins);
    for (int q = 0; q < SIDE; q++) place[q] = (uint8_t)(b->node[q] - b->node[0]);
    for (int64_t t = 0; t < b->span; t++) {
        Floats score = load(weights + t * SIDE) * scale;
        if (t < b->all_see) score = choose(begins <= (int32_t)t, score, never);
        if (t >= b->prefix) score = choose(visible_to(seen_by, stride, t - b->prefix, b->node[0], place), score, never);
        store(weights + t * SIDE, score);
        most = choose(score > most, score, most);
    }
    for (int64_t t = 0; t < b->span; t++) {
        Floats weight = exponential(load(weights + t * SIDE) - most);
        store(weights + t * SIDE, weight);
        sum += weight;
    }
    store(total, sum);
}

#else

static void dots_in_tiles(const Block *b, float *weights) { (void)b, (void)weights; }
static void soften_wide(const Block *b, const uint8_t *seen_by, int64_t stride, float *weights, float *total)
{
    (void)b, (void)seen_by, (void)stride, (void)weights, (void)total;
}

#endif

/* The same of [span][QUERIES]; `visible` [num_new][num_new]. The weights have room for whole vectors. */
static void soften(const Block *b, const uint8_t *visible, float *weights, float *total)
{
    const Floats scale = spread(1.0f / sqrtf((float)b->size));
    const int64_t end = b->span * QUERIES;
    for (int64_t i = end; i % LANES; i++) weights[i] = -INFINITY;
    for (int64_t i = 0; i < b->all_see * QUERIES; i++)
        if (i / QUERIES < b->begins[i % QUERIES]) weights[i] = -INFINITY;
    for (int64_t i = b->prefix * QUERIES; i < end; i++)
        if (!visible[b->node[i % QUERIES] * b->num_new + i / QUERIES - b->prefix]) weights[i] = -INFINITY;
    Floats most = spread(-INFINITY);
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats score = load(weights + i) * scale;
        store(weights + i, score);
        most = choose(score > most, score, most);
    }
    Floats top = most;
    for (int i = 0; i < LANES; i++)
        for (int j = i % QUERIES; j < LANES; j += QUERIES) top[i] = most[j] > top[i] ? most[j] : top[i];
    Four sum = {0}; /* by position: what lies behind the last weighs nothing */
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats weight = exponential(load(weights + i) - top);
        store(weights + i, weight);
        for (int j = 0; j < LANES / QUERIES; j++) sum += ((const AnyFour *)&weight)[j];
    }
    *(AnyFour *)total = sum;
}

/* Outputs of some queries from number `first` on, `vectors` vectors of them from number `from` on: weighted means of values.
   `queries` and `vectors` are constants. */
INLINE void means(const Block *b, const float *weights, const float *total, int first, int queries, int64_t from, int vectors)
{
    Floats sum[2 * QUERIES][VECTORS] = {{{0}}};
    for (int64_t t = 0; t < b->span; t++) {
        const uint16_t *at = b->values + t * b->size + from * LANES;
        Floats value[VECTORS];
        if (vectors == 1) value[0] = load_half(at);
        else
            for (int v = 0; v < vectors; v += 2) load_halves(at + v * LANES, value + v);
        for (int q = 0; q < queries; q++) {
            Floats weight = spread(weights[t * b->width + first + q]);
            for (int v = 0; v < vectors; v++) sum[q][v] += weight * value[v];
        }
    }
    for (int q = 0; q < queries && first + q < b->count; q++) {
        float *to = b->out[first + q] + from * LANES;
        for (int v = 0; v < vectors; v++) sum[q][v] /= total[first + q];
        if (vectors == 1) store(to, sum[q][0]);
        for (int v = 0; v + 1 < vectors; v += 2)
            for (int j = 0; j < LANES; j++) to[v * LANES + 2 * j] = sum[q][v][j], to[v * LANES + 2 * j + 1] = sum[q][v + 1][j];
    }
}

/* All outputs of a block. As many sums as registers hold: values are widened once for all queries that share them. */
static void all_means(const Block *b, const float *weights, const float *total)
{
    const int64_t vectors = b->size / LANES;
    for (int q = 0; q < b->count;) {
        const int two = b->count - q > QUERIES && vectors % 2 == 0 && LANES == 16;
        if (two)
            for (int64_t v = 0; v < vectors; v += 2) means(b, weights, total, q, 2 * QUERIES, v, 2);
        else {
            int64_t v = 0;
            for (; v + VECTORS <= vectors; v += VECTORS) means(b, weights, total, q, QUERIES, v, VECTORS);
            for (; v < vectors; v++) means(b, weights, total, q, QUERIES, v, 1);
        }
        q += two ? 2 * QUERIES : QUERIES;
    }
}

/* How many queries attention takes at a time. */
static int64_t queries_of(const Model *m)
{
    return in_tiles(&m->layers->out) && m->head_dim % DEEP == 0 && m->head_dim <= MOST_TILED ? SIDE : QUERIES;
}

/* qkv [M][(H + 2 H/G) E] -> seen [M][H E]. Queries of one key/value head are taken a block at a time. */
static void attention(const Model *m, const Step *s, const uint16_t *cache, const uint8_t *seen_by, const float *qkv, float *seen,
                      float *weights, Team team)
{
    const int64_t size = m->head_dim, heads = m->num_kv_heads, width = (m->groups + 2) * heads * size;
    const int64_t queries = m->groups * s->num_new, side = queries_of(m), blocks = (queries + side - 1) / side;
    float total[SIDE];
    if (side == SIDE) tiles_on();
    for (int64_t task = team.thread; task < s->batch * heads * blocks; task += team.threads) { /* later blocks of a prompt see more */
        const int64_t b = task / (heads * blocks), head = task / blocks % heads, first = task % blocks * side;
        const int count = (int)(queries - first < side ? queries - first : side);
        Block block = {.prefix = s->offsets[b], .num_new = s->num_new, .size = size, .count = count};
        block.keys = cache + b * s->slot_stride + head * s->head_stride;
        block.values = block.keys + s->plane_stride;
        block.width = count > QUERIES ? SIDE : QUERIES; /* without tiles a block has no more */
        for (int q = 0; q < block.width; q++) {
            const int64_t which = first + (q < count ? q : count - 1), row = b * s->num_new + which / m->groups;
            const int64_t at = (head * m->groups + which % m->groups) * size;
            block.node[q] = which / m->groups;
            block.query[q] = qkv + row * width + at;
            block.out[q] = seen + row * m->groups * heads * size + at;
        }
        const uint8_t *visible = s->visible + b * s->visible_stride;
        block.span = seen_span(&block, visible);
        if (m->window) open_window(&block, m->window, s->positions + b * s->num_new);
        const uint8_t *own_mask = seen_by + (s->visible_stride ? b * s->num_new * mask_stride(s) : 0);
        if (side == SIDE) dots_in_tiles(&block, weights);
        else dots(&block, weights);
        if (block.width == SIDE) soften_wide(&block, own_mask, mask_stride(s), weights, total);
        else soften(&block, visible, weights, total);
        all_means(&block, weights, total);
    }
    if (side == SIDE) tiles_off();
}
