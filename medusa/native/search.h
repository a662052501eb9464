/* Trees of guesses, level by level. */

#pragma once

#include "guesses.h"

/* Of one depth of a tree, how many nodes are gone on from and how many tokens a head guesses for each. */
typedef struct {
    int64_t parents, ranks;
    /* of a static tree: those nodes' paths [parents][depth + 1] and, child by child, its node, its parent's place, its rank */
    const int64_t *paths, *children, *places, *child_ranks;
    int64_t num_children;
} Level;

/* Trees of N nodes for B sequences, level by level: static ones, or the likeliest nodes that a beam sees. */
typedef struct {
    int64_t batch, num_nodes, num_levels;
    const Level *levels;
    const float *hidden; /* [B][D] */
    const int64_t *roots;
    const float *temperatures; /* [levels], or NULL */
    int64_t *tokens; /* [B][N] out; of a beam also what follows, NULL of a static tree */
    int64_t *depths, *parents, *node_paths; /* [B][N], [B][N], [B][N][levels + 1] */
    uint8_t *visible;                       /* [B][N][N] */
} Search;

/* Where things lie in a search's work: paths and guesses of a level; of a beam, all nodes that it saw. */
typedef struct {
    int64_t path, guessed, weighed, tokens, parents, depths, scores, front, values, guess, end;
    int64_t seen; /* nodes that a beam sees */
} SearchPlan;

static Guess level_guess(const Search *s, int64_t level)
{
    return (Guess){.first = level, .count = 1, .rows = s->batch * s->levels[level].parents, .ranks = s->levels[level].ranks,
                   .rows_each = s->levels[level].parents, .hidden = s->hidden,
                   .temperatures = s->temperatures ? s->temperatures + level : NULL};
}

static SearchPlan search_plan(const Heads *h, const Search *s)
{
    SearchPlan p = {.seen = 1};
    int64_t rows = 0, guesses = 0, work = 0;
    for (int64_t level = 0; level < s->num_levels; level++) {
        const Guess g = level_guess(s, level);
        const int64_t need = guess_plan(h, &g).end;
        p.seen += g.rows_each * g.ranks;
        rows = g.rows > rows ? g.rows : rows;
        guesses = g.rows * g.ranks > guesses ? g.rows * g.ranks : guesses;
        work = need > work ? need : work;
    }
    const int64_t all = s->depths ? s->batch * p.seen : 0;
    p.guessed = p.path + upward(rows * s->num_levels * 8, LINE);
    p.weighed = p.guessed + upward(guesses * 8, LINE);
    p.tokens = p.weighed + upward(guesses * 4, LINE);
    p.parents = p.tokens + upward(all * 8, LINE);
    p.depths = p.parents + upward(all * 8, LINE);
    p.front = p.depths + upward(all * 8, LINE);
    p.scores = p.front + upward(all * 8, LINE);
    p.values = p.scores + upward(all * 4, LINE);
    p.guess = p.values + upward(all * 4, LINE);
    p.end = p.guess + work;
    return p;
}

/* The nodes that a beam saw for one sequence. `front` are those gone on from and, at last, those kept, `values` theirs. */
typedef struct {
    int64_t *tokens, *parents, *depths, *front;
    float *scores, *values;
} Seen;

static Seen seen_by_beam(const SearchPlan *p, char *work, int64_t b)
{
    const int64_t at = b * p->seen;
    return (Seen){.tokens = (int64_t *)(work + p->tokens) + at, .parents = (int64_t *)(work + p->parents) + at,
                  .depths = (int64_t *)(work + p->depths) + at, .front = (int64_t *)(work + p->front) + at,
                  .scores = (float *)(work + p->scores) + at, .values = (float *)(work + p->values) + at};
}

/* The tree of the likeliest of all nodes seen. No score exceeds its parent's and parents come first, so it is one. */
static void keep_best(const Search *s, int64_t seen, const Seen *n, int64_t b)
{
    const int64_t kept = s->num_nodes, slots = s->num_levels + 1;
    int64_t *tokens = s->tokens + b * kept, *depths = s->depths + b * kept, *parents = s->parents + b * kept;
    uint8_t *visible = s->visible + b * kept * kept;
    best_of(n->scores, seen, kept, n->front, n->values);
    memset(visible, 0, (size_t)(kept * kept));
    for (int64_t i = 0; i < kept; i++) {
        const int64_t node = n->front[i];
        int64_t *path = s->node_paths + (b * kept + i) * slots, above = 0;
        tokens[i] = n->tokens[node], depths[i] = n->depths[node];
        parents[i] = -1;
        while (above < i && n->front[above] != n->parents[node]) above++; /* the root has none: above is 0 */
        for (int64_t slot = 0; slot < slots; slot++) path[slot] = -1;
        if (depths[i]) {
            parents[i] = above;
            memcpy(path, s->node_paths + (b * kept + above) * slots, (size_t)slots * sizeof(int64_t));
        }
        path[depths[i]] = i;
        for (int64_t slot = 0; slot <= depths[i]; slot++) visible[i * kept + path[slot]] = 1;
    }
}

static Guess next_guess(const Search *s, const SearchPlan *p, char *work, int64_t level)
{
    Guess g = level_guess(s, level);
    g.path = (int64_t *)(work + p->path), g.tokens = (int64_t *)(work + p->guessed);
    return g;
}

/* A static tree of each sequence. All threads together, each with its own sequences between guesses. */
static void fill(const Heads *h, const Search *s, char *work, Team team)
{
    const SearchPlan p = search_plan(h, s);
    int64_t *path = (int64_t *)(work + p.path), first, last;
    share(s->batch, team, &first, &last);
    for (int64_t b = first; b < last; b++) s->tokens[b * s->num_nodes] = s->roots[b];
    for (int64_t i = 0; i < s->num_levels; i++) {
        const Level *level = s->levels + i;
        const Guess g = next_guess(s, &p, work, i);
        const int64_t in_paths = level->parents * (i + 1), guesses = level->parents * level->ranks;
        for (int64_t b = first; b < last; b++)
            for (int64_t j = 0; j < in_paths; j++) path[b * in_paths + j] = s->tokens[b * s->num_nodes + level->paths[j]];
        meet(team);
        guess(h, &g, work + p.guess, team);
        for (int64_t b = first; b < last; b++)
            for (int64_t c = 0; c < level->num_children; c++)
                s->tokens[b * s->num_nodes + level->children[c]] =
                    g.tokens[b * guesses + level->places[c] * level->ranks + level->child_ranks[c]];
    }
}

/* The likeliest nodes that a beam sees. All threads together, each with its own sequences between guesses. */
static void beam(const Heads *h, const Search *s, char *work, Team team)
{
    const SearchPlan p = search_plan(h, s);
    int64_t *path = (int64_t *)(work + p.path), first, last, num_seen = 1, level_start = 0;
    share(s->batch, team, &first, &last);
    for (int64_t b = first; b < last; b++) {
        const Seen n = seen_by_beam(&p, work, b);
        n.tokens[0] = s->roots[b], n.parents[0] = -1, n.depths[0] = 0, n.scores[0] = 0;
    }
    for (int64_t i = 0; i < s->num_levels; i++) {
        const Level *level = s->levels + i;
        const int64_t guesses = level->parents * level->ranks;
        Guess g = next_guess(s, &p, work, i);
        g.log_probs = (float *)(work + p.weighed);
        for (int64_t b = first; b < last; b++) {
            const Seen n = seen_by_beam(&p, work, b);
            best_of(n.scores + level_start, num_seen - level_start, level->parents, n.front, n.values);
            for (int64_t f = 0; f < level->parents; f++) {
                int64_t node = n.front[f] += level_start, *own = path + (b * level->parents + f) * (i + 1);
                for (int64_t j = i; j >= 0; j--, node = n.parents[node]) own[j] = n.tokens[node];
            }
        }
        meet(team);
        guess(h, &g, work + p.guess, team);
        for (int64_t b = first; b < last; b++) {
            const Seen n = seen_by_beam(&p, work, b);
            for (int64_t c = 0; c < guesses; c++) {
                const int64_t node = num_seen + c, parent = n.front[c / level->ranks];
                n.tokens[node] = g.tokens[b * guesses + c], n.parents[node] = parent, n.depths[node] = i + 1;
                n.scores[node] = n.scores[parent] + g.log_probs[b * guesses + c];
            }
        }
        level_start = num_seen, num_seen += guesses;
    }
    for (int64_t b = first; b < last; b++) {
        const Seen n = seen_by_beam(&p, work, b);
        keep_best(s, num_seen, &n, b);
    }
}
