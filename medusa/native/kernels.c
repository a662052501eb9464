/* A decoding step of Llama, Mistral, Qwen 2 or 3 on a CPU: products, norms, rotary embedding, cache and tree attention; and
   what Medusa heads guess for it and which of that is accepted.

   M rows (sequences x new positions), D hidden, F inner, H query heads, G query heads per key/value head, E head size

   Weights keep their own type and are widened in registers; arithmetic is float32. But int8 weights are multiplied by
   inputs rounded to 16 bits of each row's largest, as integers; and where the processor multiplies tiles (AMX), bfloat16
   weights by inputs rounded to bfloat16. What a row gets does not depend on the rows beside it, on masked
   positions or on the number of threads: every sum runs in one fixed order. So a tree of any shape and a batch of any size
   give, bit for bit, what plain decoding of the sequence alone gives.

   Plain C with GCC's vector types; compiled for the machine at hand by medusa/native/build.py, as one piece, so that headers hold
   functions: vectors.h, threads.h, products.h, model.h, attention.h, layers.h; guesses.h, search.h; acceptance.h. Here stands what
   Python calls. */

#include "acceptance.h"
#include "layers.h"
#include "search.h"

int64_t medusa_lanes(void) { return LANES; }

/* May this process multiply tiles of bfloat16? Asks Linux for it (for good: threads inherit it). */
int64_t medusa_tiles(void)
{
#ifdef HAS_TILES
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

/* Bytes of work that `medusa_linear` needs; they begin on a cache line. */
int64_t medusa_linear_bytes(const Weight *w, int64_t rows) { return bands_bytes(w, rows, w->inputs); }

void medusa_linear(const Weight *w, const float *x, int64_t rows, float *y, char *work, int64_t threads)
{
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)threads)
    {
        const Team team = TEAM(meeting);
        product(w, x, rows, y, 0, work, team);
        meet(team);
    }
}

/* Bytes of work, which begins on a cache line. */
int64_t medusa_work_bytes(const Model *m, const Step *s) { return plan(m, s).end; }

void medusa_layers(const Model *m, const Step *s)
{
    const Plan p = plan(m, s);
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)s->threads)
    layers(m, s, &p, TEAM(meeting));
    memcpy(s->hidden, s->work + p.normed, (size_t)(s->batch * s->num_new * m->hidden) * sizeof(float));
}

/* Bytes of work, which begins on a cache line. */
int64_t medusa_guess_bytes(const Heads *h, const Guess *g) { return guess_plan(h, g).end; }

void medusa_guess(const Heads *h, const Guess *g, char *work, int64_t threads)
{
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)threads)
    guess(h, g, work, TEAM(meeting));
}

/* Bytes of work, which begins on a cache line. */
int64_t medusa_search_bytes(const Heads *h, const Search *s) { return search_plan(h, s).end; }

void medusa_search(const Heads *h, const Search *s, char *work, int64_t threads)
{
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)threads)
    {
        const Team team = TEAM(meeting);
        if (s->depths) beam(h, s, work, team);
        else fill(h, s, work, team);
        meet(team);
    }
}

int64_t medusa_accept_bytes(int64_t nodes, int64_t vocabulary) { return accept_plan(nodes, vocabulary).end; }

/* Which path of a verified tree each row of a batch accepts, by its own scheme: logits [batch][nodes][vocabulary] in bfloat16 or
   float32, tokens and parents a row each `stride` apart, the root's position in its sequence. To each row's last node and the root
   after it. */
void medusa_accept(const Rows *r, const void *logits, int64_t in_half, int64_t batch, int64_t nodes, int64_t vocabulary,
                   const int64_t *tokens, int64_t token_stride, const int64_t *parents, int64_t parent_stride,
                   const int64_t *positions, int64_t *last, int64_t *next_root, char *work, int64_t threads)
{
    const AcceptPlan p = accept_plan(nodes, vocabulary);
#pragma omp parallel for schedule(dynamic) num_threads((int)(threads < batch ? threads : batch)) if (batch > 1)
    for (int64_t b = 0; b < batch; b++) {
        char *mine = work + THREAD * p.end;
        float *weights = (float *)(mine + p.weights);
        Token *some = (Token *)(mine + p.tokens);
        const Verified v = {
            .logits = (const char *)logits + b * nodes * vocabulary * (in_half ? 2 : 4),
            .in_half = in_half,
            .widened = (float *)(mine + p.widened),
            .vocabulary = vocabulary,
            .root_position = positions[b],
            .tokens = tokens + b * token_stride,
            .parents = parents + b * parent_stride,
            .end = r->max_nodes[b] < nodes ? r->max_nodes[b] : nodes,
        };
        last[b] = r->scheme[b] == TYPICAL ? typical(r, b, &v, weights, some, (Path *)(mine + p.paths), next_root + b)
                                          : walk(r, b, &v, weights, some, next_root + b);
    }
}
