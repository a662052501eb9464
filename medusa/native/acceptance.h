/* Which tokens of a verified tree are accepted, and what follows them. */

#pragma once

#include "vectors.h"

/* The exponentials of x / temperature beside their largest, to `weights` [size]; their sum, and that of each times its exponent. */
typedef struct {
    float most; /* the largest of x / temperature */
    double sum, moment;
} Mass;

enum { MOST_SUMMED = 64 * LANES }; /* numbers that floats sum before doubles do */

static Mass mass_of(const float *x, int64_t size, float temperature, float *weights)
{
    Mass m = {largest_of(x, size) / temperature, 0, 0};
    for (int64_t from = 0; from < size; from += MOST_SUMMED) {
        const int64_t end = from + MOST_SUMMED < size ? from + MOST_SUMMED : size;
        Floats sum = {0}, moment = {0};
        int64_t i = from;
        for (; i + LANES <= end; i += LANES) {
            Floats power = load(x + i) / temperature - m.most, weight = exponential(power);
            store(weights + i, weight);
            sum += weight;
            moment += weight * choose(power < -87.0f, spread(-87.0f), power); /* of -inf too nothing, not NaN */
        }
        m.sum += sum_of(sum), m.moment += sum_of(moment);
        for (; i < end; i++) {
            const float power = x[i] / temperature - m.most;
            weights[i] = power < -87.0f ? 0 : expf(power);
            m.sum += weights[i], m.moment += weights[i] ? weights[i] * power : 0;
        }
    }
    return m;
}

/* A token and its logit. One is better than another by its logit, of equals by the lower id. */
typedef struct {
    float logit;
    int32_t id;
} Token;

static int better(Token a, Token b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

/* Let the token at `i` of a heap sink to its place: the best on top, or with `worst` the worst. */
static void sink(Token *heap, int64_t size, int64_t i, int worst)
{
    const Token token = heap[i];
    for (int64_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && better(heap[child + 1], heap[child]) != worst) child++;
        if (better(token, heap[child]) != worst) break;
        heap[i] = heap[child];
    }
    heap[i] = token;
}

static void make_heap(Token *heap, int64_t size, int worst)
{
    for (int64_t i = size / 2; i-- > 0;) sink(heap, size, i, worst);
}

/* The best `count` of x [size], in any order. */
static void best_tokens(const float *x, int64_t size, int64_t count, Token *best)
{
    enum { SOME = 4 * LANES };
    for (int64_t i = 0; i < count; i++) best[i] = (Token){x[i], (int32_t)i};
    make_heap(best, count, 1);
    for (int64_t from = count; from < size; from += SOME) {
        const int64_t end = from + SOME < size ? from + SOME : size;
        if (!(largest_of(x + from, end - from) > best[0].logit)) continue;
        for (int64_t i = from; i < end; i++)
            if (x[i] > best[0].logit) best[0] = (Token){x[i], (int32_t)i}, sink(best, count, 0, 1);
    }
}

/* How a request chooses its tokens: as medusa/sampling.py names it, a column each. */
typedef struct {
    const int64_t *scheme, *top_k, *seed, *choice, *sample_root, *max_nodes;
    const double *temperature, *top_p, *epsilon, *delta;
} Rows;

enum { GREEDY, TYPICAL, REJECTION };

static int64_t places_kept(const Rows *r, int64_t b, int64_t size)
{
    return r->top_k[b] > 0 && r->top_k[b] < size ? r->top_k[b] : size;
}

static double sum_of_weights(const Token *tokens, int64_t count, const float *weights)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += weights[tokens[i].id];
    return sum;
}

/* The tokens of x [size] inside top-k and then top-p, in any order: how many, at `*kept` within `tokens` [size]. */
static int64_t nucleus(const Rows *r, int64_t b, const float *x, int64_t size, const Mass *m, const float *weights, Token *tokens,
                       Token **kept)
{
    const int64_t places = places_kept(r, b, size);
    int64_t count = 0;
    double sum = m->sum;
    *kept = tokens;
    if (places < size) {
        best_tokens(x, size, places, tokens);
        if (r->top_p[b] >= 1) return places;
        sum = sum_of_weights(tokens, places, weights);
        count = places;
    } else { /* whatever is lighter than this weighs less than 1 - top-p in all */
        const float least = (float)(0.99 * (1 - r->top_p[b]) * sum / (double)size);
        for (int64_t i = 0; i < size; i++)
            if (weights[i] >= least) tokens[count++] = (Token){x[i], (int32_t)i};
    }
    make_heap(tokens, count, 0);
    int64_t left = count;
    for (double before = 0; left > 0 && (left == count || before < r->top_p[b] * sum);) {
        const Token best = tokens[0];
        before += weights[best.id];
        tokens[0] = tokens[--left];
        if (left) sink(tokens, left, 0, 0);
        tokens[left] = best;
    }
    *kept = tokens + left;
    return count - left;
}

/* Is this token inside top-k and top-p? The best always is. */
static int inside(const Rows *r, int64_t b, const float *x, int64_t size, const Mass *m, const float *weights, int64_t token,
                  Token *tokens)
{
    const int64_t places = places_kept(r, b, size);
    const Token own = {x[token], (int32_t)token};
    double before = 0, sum = m->sum;
    int64_t rank = 0;
    for (int64_t from = 0; from < size; from += MOST_SUMMED) {
        const int64_t end = from + MOST_SUMMED < size ? from + MOST_SUMMED : size;
        Floats heavier = {0};
        Ints minus = {0};
        int64_t i = from;
        for (; i + LANES <= end; i += LANES) {
            Ints ahead = (load(x + i) > own.logit) | ((load(x + i) == own.logit) & (consecutive(i) < own.id));
            heavier += (Floats)((Ints)load(weights + i) & ahead);
            minus += ahead;
        }
        before += sum_of(heavier);
        for (int j = 0; j < LANES; j++) rank -= minus[j];
        for (; i < end; i++)
            if (better((Token){x[i], (int32_t)i}, own)) before += weights[i], rank++;
    }
    if (rank == 0 || rank >= places || r->top_p[b] >= 1) return rank < places;
    if (places < size) {
        best_tokens(x, size, places, tokens);
        sum = sum_of_weights(tokens, places, weights);
    }
    return before < r->top_p[b] * sum;
}

#define GOLDEN 0x9E3779B97F4A7C15u /* SplitMix64's increment and factors */
#define MIX_1 0xBF58476D1CE4E5B9u
#define MIX_2 0x94D049BB133111EBu
#define MIX(x) ((x) = ((x) ^ ((x) >> 30)) * MIX_1, (x) = ((x) ^ ((x) >> 27)) * MIX_2, (x) ^= (x) >> 31) /* of numbers or vectors */
#define MOST_NOISE 22.9f /* no token gets more */

typedef uint64_t Longs __attribute__((vector_size(8 * LANES)));

INLINE uint64_t mixed(uint64_t x) { return MIX(x); }

/* The natural logarithm of positive x to a few units in the last place. */
INLINE Floats logarithm(Floats x)
{
    const Ints bits = (Ints)x;
    /* a fraction between the roots of 1/2 and of 2 */
    const Ints exponent = (bits - 0x3f3504f3) >> 23;
    const Floats f = (Floats)(bits - (exponent << 23)) - 1.0f, e = __builtin_convertvector(exponent, Floats), square = f * f;
    Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return f + (p * f * square + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
}

/* Standard Gumbel noise of some tokens: `gumbel_noise` of medusa/sampling.py. */
INLINE Floats noise(uint64_t key, Ints ids)
{
    Longs x = key + (__builtin_convertvector(ids, Longs) + 1) * GOLDEN;
    MIX(x);
    Floats u = (__builtin_convertvector(__builtin_convertvector(x >> 32, Words), Floats) + 0.5f) * 0x1p-32f;
    u = choose(u > 1 - 0x1p-24f, spread(1 - 0x1p-24f), u);
    /* log(1 - u), whose rounding of 1 - u is taken back; where nothing is left of u, it is -u */
    const Floats rest = 1.0f - u;
    const Floats taken = choose(rest == 1.0f, -u, logarithm(rest) * u / (1.0f - rest));
    return -logarithm(-taken);
}

typedef struct {
    float score;
    int64_t id;
} Drawn;

/* Of the tokens whose logits and ids these are, those that beat the best so far by logit and noise. */
INLINE void contend(Drawn *best, Floats scaled, Ints ids, uint64_t key)
{
    Floats scores = scaled + noise(key, ids);
    if (!any(scores >= best->score)) return;
    for (int j = 0; j < LANES; j++)
        if (scores[j] > best->score || (scores[j] == best->score && ids[j] < best->id)) *best = (Drawn){scores[j], ids[j]};
}

/* Where the largest of x [size] first stands; of a row with NaN the first of them, as PyTorch has it. */
static int64_t place_of_largest(const float *x, int64_t size)
{
    Floats most[4];
    Ints broken = {0};
    for (int v = 0; v < 4; v++) most[v] = spread(-INFINITY);
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int v = 0; v < 4; v++) {
            Floats some = load(x + i + v * LANES);
            most[v] = choose(some > most[v], some, most[v]);
            broken |= some != some;
        }
    float largest = -INFINITY;
    int has_nan = 0;
    for (int v = 0; v < 4; v++)
        for (int j = 0; j < LANES; j++) {
            largest = most[v][j] > largest ? most[v][j] : largest;
            has_nan |= broken[j] != 0;
        }
    for (; i < size; i++) {
        largest = x[i] > largest ? x[i] : largest;
        has_nan |= x[i] != x[i];
    }
    for (i = 0; has_nan ? x[i] == x[i] : x[i] != largest;) i++;
    return i;
}

/* A token to stand at `position`: the likeliest, or a draw by Gumbel-max from what the request's filters leave. */
static int64_t chosen(const Rows *r, int64_t b, const float *x, int64_t size, int64_t position, float *weights, Token *tokens)
{
    const int64_t top = place_of_largest(x, size);
    if (!r->sample_root[b]) return top;
    const float temperature = (float)r->temperature[b];
    const uint64_t key = mixed(mixed(mixed((uint64_t)r->seed[b] + GOLDEN) + (uint64_t)r->choice[b] * GOLDEN) +
                               (uint64_t)position * GOLDEN);
    Drawn best = {-INFINITY, top};
    contend(&best, spread(x[top] / temperature), (Ints){0} + (int32_t)top, key);
    if (places_kept(r, b, size) == size && r->top_p[b] >= 1) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            Floats scaled = load(x + i) / temperature;
            if (any(scaled >= best.score - MOST_NOISE)) contend(&best, scaled, consecutive(i), key);
        }
        if (i < size) {
            Floats scaled = spread(-INFINITY);
            for (int64_t j = i; j < size; j++) scaled[j - i] = x[j] / temperature;
            contend(&best, scaled, consecutive(i), key);
        }
        return best.id;
    }
    const Mass m = mass_of(x, size, temperature, weights);
    Token *kept;
    const int64_t count = nucleus(r, b, x, size, &m, weights, tokens, &kept);
    for (int64_t i = 0; i < count; i += LANES) {
        Floats scaled = spread(-INFINITY);
        Ints ids = {0};
        for (int64_t j = i; j < count && j < i + LANES; j++) scaled[j - i] = kept[j].logit / temperature, ids[j - i] = kept[j].id;
        contend(&best, scaled, ids, key);
    }
    return best.id;
}

/* One row's verified tree. */
typedef struct {
    const void *logits; /* [nodes][vocabulary] */
    int64_t in_half;    /* bfloat16, or float32? */
    float *widened;     /* [vocabulary] to read a node's bfloat16 into */
    int64_t vocabulary, root_position;
    const int64_t *tokens, *parents;
    int64_t end; /* of the nodes that may be accepted */
} Verified;

/* The logits at a node, until another's are asked for. */
static const float *logits_at(const Verified *v, int64_t node)
{
    if (!v->in_half) return (const float *)v->logits + node * v->vocabulary;
    const uint16_t *from = (const uint16_t *)v->logits + node * v->vocabulary;
    int64_t i = 0;
    for (; i + LANES <= v->vocabulary; i += LANES) store(v->widened + i, load_half(from + i));
    for (; i < v->vocabulary; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(v->widened + i, &bits, sizeof bits);
    }
    return v->widened;
}

/* Greedy and rejection acceptance: go on to the child that carries what is chosen, as long as there is one. */
static int64_t walk(const Rows *r, int64_t b, const Verified *v, float *weights, Token *tokens, int64_t *next_root)
{
    int64_t node = 0, child = 0;
    for (int64_t depth = 1;; depth++) {
        node = child;
        *next_root = chosen(r, b, logits_at(v, node), v->vocabulary, v->root_position + depth, weights, tokens);
        for (child = node + 1; child < v->end && !(v->parents[child] == node && v->tokens[child] == *next_root);) child++;
        if (child == v->end) return node;
    }
}

typedef struct {
    double score; /* log p of the path */
    int64_t depth; /* -1: not accepted */
} Path;

/* Typical acceptance: of the paths whose every token is plausible where it stands, the longest, then the likeliest. */
static int64_t typical(const Rows *r, int64_t b, const Verified *v, float *weights, Token *tokens, Path *paths, int64_t *next_root)
{
    const int64_t size = v->vocabulary;
    const float temperature = (float)r->temperature[b];
    const int filtered = r->top_p[b] < 1 || places_kept(r, b, size) < size;
    int64_t last = 0;
    paths[0] = (Path){0, 0};
    for (int64_t i = 1; i < v->end; i++) paths[i].depth = -1;
    for (int64_t node = 0; node < v->end; node++) {
        const float *x = NULL;
        Mass m;
        if (paths[node].depth < 0) continue;
        for (int64_t child = node + 1; child < v->end; child++) {
            if (v->parents[child] != node) continue;
            if (!x) x = logits_at(v, node), m = mass_of(x, size, temperature, weights);
            const double log_sum = log(m.sum), entropy = log_sum - m.moment / m.sum;
            const double log_p = x[v->tokens[child]] / temperature - m.most - log_sum;
            const double least = fmin(r->epsilon[b], r->delta[b] * exp(-entropy));
            if (!(exp(log_p) > least)) continue;
            if (filtered && !inside(r, b, x, size, &m, weights, v->tokens[child], tokens)) continue;
            paths[child] = (Path){paths[node].score + log_p, paths[node].depth + 1};
        }
        const Path *here = paths + node, *best = paths + last;
        if (here->depth > best->depth || (here->depth == best->depth && here->score > best->score)) last = node;
    }
    *next_root = chosen(r, b, logits_at(v, last), size, v->root_position + paths[last].depth + 1, weights, tokens);
    return last;
}

typedef struct {
    int64_t widened, weights, tokens, paths, end;
} AcceptPlan;

/* Where things lie in the work of one thread, in bytes from its start. */
static AcceptPlan accept_plan(int64_t nodes, int64_t vocabulary)
{
    AcceptPlan p = {.widened = 0, .weights = vocabulary * (int64_t)sizeof(float)};
    p.tokens = p.weights + vocabulary * (int64_t)sizeof(float);
    p.paths = p.tokens + vocabulary * (int64_t)sizeof(Token);
    p.paths = (p.paths + LINE - 1) / LINE * LINE;
    p.end = (p.paths + nodes * (int64_t)sizeof(Path) + LINE - 1) / LINE * LINE;
    return p;
}
