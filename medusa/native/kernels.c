/* A decoding step of Llama, Mistral, Qwen 2 or 3 on a CPU: products, norms, rotary embedding, cache and tree attention; and
   what Medusa heads guess for it and which of that is accepted.

   M rows (sequences x new positions), D hidden, F inner, H query heads, G query heads per key/value head, E head size

   Weights keep their own type and are widened in registers; arithmetic is float32. But int8 weights are multiplied by
   inputs rounded to 16 bits of each row's largest, as integers; and where the processor multiplies tiles (AMX), bfloat16
   weights by inputs rounded to bfloat16. What a row gets does not depend on the rows beside it, on masked
   positions or on the number of threads: every sum runs in one fixed order. So a tree of any shape and a batch of any size
   give, bit for bit, what plain decoding of the sequence alone gives.

   Plain C with GCC's vector types; compiled for the machine at hand by medusa/native/build.py. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#if __has_include(<linux/futex.h>) /* not everywhere a part of what comes with a compiler */
#define HAS_FUTEX
#include <limits.h>
#include <linux/futex.h>
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512F__) && LANES == 16
#define HAS_TILES /* a virtual machine may show AMX alone */
#endif
#define PANEL (2 * LANES) /* outputs whose weights lie side by side: one load gives two vectors of them */
#define TILE 6    /* rows that share one pass over a panel */
#define SIDE 16   /* rows and columns of a tile of AMX */
#define DEEP 32   /* inputs that one product of tiles of bfloat16 takes */
#define DEEPER 64 /* and of bytes */
#define STEPS 32512.0f /* of a row's largest, at most: a signed byte times 256 and an unsigned one */
#define TINY 1e-30f /* a row whose largest is less counts as zeros */
#define RUN 512   /* inputs of which no sum of steps times bytes overflows 32 bits */
#define LINE 64   /* bytes of a cache line */
#define PATIENCE 20000 /* nanoseconds that a thread waits for others awake */
#define QUERIES 4 /* queries of a narrow block */
#define VECTORS (LANES == 16 ? 4 : 2) /* of a value, in one pass for QUERIES queries */
#define MOST_TILED 256 /* the largest head size whose keys are multiplied as tiles */
#define ROOM (2 * SIDE * PANEL) /* floats that hold the outputs of a block */
#define INLINE static inline __attribute__((always_inline))

_Static_assert(SIDE >= TILE, "ROOM holds TILE rows of two panels");
#ifdef HAS_TILES
_Static_assert(PANEL == 2 * SIDE, "a panel is two tiles wide");
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int16_t Pairs __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef float AnyFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float AnyFour __attribute__((vector_size(16), aligned(4), may_alias));
typedef float AnyEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t AnyWords __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t AnyHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t AnyShorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t AnyPairs __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t AnyBytes __attribute__((vector_size(16), aligned(1), may_alias));

enum { FLOAT32, BFLOAT16, INT8, TILES, INT8_TILES };
#define WORD(type) (1 << (type)) /* weights in a word */

/* In words of 32 bits, lane j of a panel holds
     FLOAT32   [inputs][2]: output j, output j + LANES
     BFLOAT16  [inputs]: both, the first in the low half
     INT8      [inputs / 2]: both of one input in the low half, both of the next in the high half
   TILES, bfloat16 for AMX, has panels of 2 SIDE outputs, [inputs / DEEP][2][DEEP / 2][SIDE]: two inputs of an output in a
   word, inputs padded with zeros. INT8_TILES: the same, [inputs / DEEPER][2][DEEPER / 4][SIDE], four inputs in a word. */
typedef struct {
    const uint32_t *panels;
    const float *scales; /* of int8: one for each output, padded like the panels */
    int64_t outputs, inputs, type;
} Weight;

typedef struct {
    const float *norm_attention, *norm_mlp;
    const float *bias, *gains; /* NULL where there is none: [(G + 2) H E] of queries, keys, values; [2][E] of head norms */
    Weight query_key_value, out, gate, up, down;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t num_layers, hidden, num_kv_heads, groups, head_dim;
    int64_t window; /* positions that a query sees, its own the last; 0: all before it */
    float eps;
    const float *norm, *cos, *sin; /* cos and sin [positions][E / 2] */
} Model;

typedef struct {
    int64_t batch, num_new;
    const int64_t *offsets, *positions; /* [batch], [batch][num_new] */
    const uint8_t *visible;             /* [num_new][num_new] of the first sequence: may that row see that column? */
    int64_t visible_stride;             /* to the next sequence's; 0 where all share one */
    uint16_t *cache; /* bfloat16: keys of the first layer, first row's slot; values lie one plane behind */
    int64_t plane_stride, slot_stride, head_stride;
    float *hidden; /* [M][D], embeddings in, last hidden states out */
    char *work;    /* medusa_work_bytes of it */
    int64_t threads;
} Step;

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

/* --- vectors ------------------------------------------------------------------------------------------------------ */

INLINE Floats load(const float *from) { return *(const AnyFloats *)from; }
INLINE void store(float *to, Floats x) { *(AnyFloats *)to = x; }
/* bfloat16, widened, and rounded to the nearest, of two equally near ones to the even one. */
INLINE Floats load_half(const uint16_t *from)
{
    return (Floats)(__builtin_convertvector(*(const AnyHalves *)from, Words) << 16);
}
/* Two vectors of them with less work: those of even places, and those of odd ones. */
INLINE void load_halves(const uint16_t *from, Floats even_odd[2])
{
    const Words words = *(const AnyWords *)from;
    even_odd[0] = (Floats)(words << 16);
    even_odd[1] = (Floats)(words & 0xffff0000u);
}
INLINE void store_half(uint16_t *to, Floats x)
{
    const Words bits = (Words)x;
    *(AnyHalves *)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}
INLINE Floats spread(float x) { return x - (Floats){0}; }

INLINE Floats choose(Ints which, Floats a, Floats b) { return (Floats)((which & (Ints)a) | (~which & (Ints)b)); }
INLINE int any(Ints which)
{
    int32_t some = 0;
    for (int j = 0; j < LANES; j++) some |= which[j];
    return some != 0;
}
INLINE Ints consecutive(int64_t first)
{
    Ints numbers;
    for (int j = 0; j < LANES; j++) numbers[j] = (int32_t)first + j;
    return numbers;
}

/* e^x to a few units in the last place; exactly 0 from -87 down, so that -inf weighs nothing. */
INLINE Floats exponential(Floats x)
{
    const Floats magic = spread(12582912.0f); /* adding it rounds to an integer */
    Ints vanishes = x < -87.0f;
    x = choose(vanishes, spread(-87.0f), x);
    x = choose(x > 88.0f, spread(88.0f), x);
    Floats n = (x * 1.44269504f + magic) - magic;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return (Floats)((Ints)(p * (Floats)power) & ~vanishes);
}

/* A vector's halves summed until eight numbers are left. */
INLINE Eight eight_of(Floats x)
{
#if LANES == 16
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return x;
#endif
}

INLINE float sum_of(Floats x)
{
    const Eight y = eight_of(x);
    return ((y[0] + y[4]) + (y[2] + y[6])) + ((y[1] + y[5]) + (y[3] + y[7]));
}

/* The sums of eight vectors, each in that order. */
INLINE Eight sums_of(const Floats x[8])
{
    Eight fours[4], twos[2];
    for (int i = 0; i < 4; i++) {
        const Eight a = eight_of(x[i]), b = eight_of(x[4 + i]);
        fours[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 2; i++) {
        const Eight a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    return __builtin_shufflevector(twos[0], twos[1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(twos[0], twos[1], 2, 3, 10, 11, 6, 7, 14, 15);
}

/* --- threads that work together ----------------------------------------------------------------------------------- */

/* Where the threads of a call wait for one another. */
typedef struct {
    _Alignas(LINE) atomic_int arrived;
    _Alignas(LINE) atomic_int round;
    atomic_int asleep;
} Meeting;

/* One of `threads` threads, and where it meets the others. */
typedef struct {
    int64_t thread, threads;
    Meeting *meeting;
} Team;

#define TEAM(meeting) ((Team){THREAD, THREADS, &(meeting)}) /* within a parallel region */

INLINE void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void sleep_through(Meeting *m, int round)
{
    while (atomic_load(&m->round) == round) {
#ifdef HAS_FUTEX
        atomic_fetch_add(&m->asleep, 1);
        syscall(SYS_futex, &m->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
        atomic_fetch_sub(&m->asleep, 1);
#else
        sched_yield();
#endif
    }
}

/* Go on when all are here. Who waits looks for a moment, since the others are near if they run, and then gives its core away:
   another program may have theirs. Calls end so too, since OpenMP's own end of a region keeps the core much longer. */
static void meet(Team team)
{
    Meeting *m = team.meeting;
    const int round = atomic_load_explicit(&m->round, memory_order_relaxed);
    if (team.threads == 1) return;
    if (atomic_fetch_add(&m->arrived, 1) == team.threads - 1) {
        atomic_store(&m->arrived, 0);
        atomic_store(&m->round, round + 1);
#ifdef HAS_FUTEX
        if (atomic_load(&m->asleep)) syscall(SYS_futex, &m->round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
        return;
    }
    for (const int64_t end = nanoseconds() + PATIENCE; nanoseconds() < end;)
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&m->round, memory_order_acquire) != round) return;
            relax();
        }
    sleep_through(m, round);
}

INLINE void share(int64_t all, Team team, int64_t *first, int64_t *last)
{
    *first = all * team.thread / team.threads;
    *last = all * (team.thread + 1) / team.threads;
}

/* --- products ----------------------------------------------------------------------------------------------------- */

/* Both halves of a panel at input k. */
INLINE void widen(const Weight *w, int type, int64_t panel, int64_t k, Floats both[2])
{
    const uint32_t *at = w->panels + (panel * w->inputs + k) * PANEL / WORD(type);
    const Words words = *(const AnyWords *)at;
    if (type == FLOAT32) {
        both[0] = (Floats)words;
        both[1] = load((const float *)at + LANES);
    } else {
        both[0] = (Floats)(words << 16);
        both[1] = (Floats)(words & 0xffff0000u);
    }
}

/* What a tile fetches meanwhile: so many bytes an input, from an address on that may lie behind the last weights. */
typedef struct {
    uintptr_t from;
    int64_t pace;
} Ahead;

/* With its input k; as many lines as the panels take that it reads from k to k + step, a constant like the rest. */
INLINE void fetch(Ahead ahead, int type, int panels, int64_t k, int step)
{
    const int bytes = panels * PANEL * 4 / WORD(type) * step;
    for (int i = 0; i < bytes; i += LINE) __builtin_prefetch((const void *)(ahead.from + (uintptr_t)(k * ahead.pace + i)), 0, 2);
}

/* Rows of x [.][inputs] times some panels, into out [rows][panels * PANEL]. `type`, `panels` and `rows` are constants. */
INLINE void tile(const Weight *w, int type, int64_t panel, int panels, const float *x, int rows, Ahead ahead, float *out)
{
    Floats sum[TILE][4] = {{{0}}};
    for (int64_t k = 0; k < w->inputs; k++) {
        Floats weights[4];
        fetch(ahead, type, panels, k, 1);
        for (int p = 0; p < panels; p++) widen(w, type, panel + p, k, weights + 2 * p);
        for (int r = 0; r < rows; r++) {
            const Floats input = spread(x[r * w->inputs + k]);
            for (int v = 0; v < panels * 2; v++) sum[r][v] += input * weights[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < panels * 2; v++) store(out + (r * panels * 2 + v) * LANES, sum[r][v]);
}

/* sum + a b: of each lane, both products of 16 bits. */
INLINE Ints add_products(Ints sum, Ints a, Ints b)
{
#if defined(__AVX512VNNI__) && LANES == 16
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && LANES == 16
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && LANES == 8
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && LANES == 8
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

INLINE int64_t upward(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

/* Bytes of a row that products with INT8 read: its steps of 16 bits, then what one is worth. */
INLINE int64_t row_bytes(int64_t inputs) { return upward(inputs, 2 * LANES) * 2 + LINE; }
INLINE float *step_of(const char *row, int64_t inputs) { return (float *)(row + row_bytes(inputs) - LINE); }

/* The same of INT8, whose rows `x` stand in steps. */
INLINE void byte_tile(const Weight *w, int64_t panel, int panels, const char *x, int rows, Ahead ahead, float *out)
{
    const int64_t inputs = w->inputs, stride = row_bytes(inputs);
    for (int64_t from = 0; from < inputs; from += RUN) {
        const int64_t end = from + RUN < inputs ? from + RUN : inputs;
        Ints sum[TILE][4] = {{{0}}};
        for (int64_t k = from; k < end; k += 2) {
            Ints weights[4];
            fetch(ahead, INT8, panels, k, 2);
            for (int p = 0; p < panels; p++) {
                const Pairs both = *(const AnyPairs *)(w->panels + ((panel + p) * inputs + k) * PANEL / WORD(INT8));
                weights[2 * p] = (Ints)(both << 8 >> 8);
                weights[2 * p + 1] = (Ints)(both >> 8);
            }
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, x + r * stride + k * 2, sizeof pair);
                const Ints input = pair - (Ints){0};
                for (int v = 0; v < panels * 2; v++) sum[r][v] = add_products(sum[r][v], input, weights[v]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < panels * 2; v++) {
                float *to = out + (r * panels * 2 + v) * LANES;
                const Floats here = __builtin_convertvector(sum[r][v], Floats);
                store(to, from ? load(to) + here : here);
            }
    }
    for (int r = 0; r < rows; r++) {
        const float step = *step_of(x + r * stride, inputs);
        for (int v = 0; v < panels * 2; v++) {
            float *to = out + (r * panels * 2 + v) * LANES;
            store(to, load(to) * step * load(w->scales + panel * PANEL + v * LANES));
        }
    }
}

/* The same of whichever type. */
INLINE void any_tile(const Weight *w, int type, int64_t panel, int panels, const void *x, int rows, Ahead ahead, float *out)
{
    if (type == INT8) byte_tile(w, panel, panels, x, rows, ahead, out);
    else tile(w, type, panel, panels, x, rows, ahead, out);
}

INLINE void tile_of(const Weight *w, int type, int64_t panel, int panels, const void *x, int rows, Ahead ahead, float *out)
{
    switch (rows) {
    case 1: any_tile(w, type, panel, panels, x, 1, ahead, out); break;
    case 2: any_tile(w, type, panel, panels, x, 2, ahead, out); break;
    case 3: any_tile(w, type, panel, panels, x, 3, ahead, out); break;
    case 4: any_tile(w, type, panel, panels, x, 4, ahead, out); break;
    case 5: any_tile(w, type, panel, panels, x, 5, ahead, out); break;
    default: any_tile(w, type, panel, panels, x, TILE, ahead, out);
    }
}

INLINE int in_tiles(const Weight *w) { return w->type == TILES || w->type == INT8_TILES; }

/* Bytes that SIDE rows of so many inputs take as products with w read them; 0 where they read them as they are. Tiles are
   whole; of INT8_TILES: what a row's steps are worth, then the tiles of high bytes and of low ones in turn. */
INLINE int64_t band_bytes(const Weight *w, int64_t inputs)
{
    switch (w->type) {
    case INT8: return SIDE * row_bytes(inputs);
    case TILES: return upward(inputs, DEEP) * SIDE * 2;
    case INT8_TILES: return SIDE * 4 + upward(inputs, DEEPER) * SIDE * 2;
    default: return 0;
    }
}

/* A vector of x [inputs] from i on, zeros behind the last. */
INLINE Floats load_padded(const float *x, int64_t i, int64_t inputs)
{
    if (i + LANES <= inputs) return load(x + i);
    float last_ones[LANES] = {0};
    if (i < inputs) memcpy(last_ones, x + i, (size_t)(inputs - i) * sizeof(float));
    return load(last_ones);
}

/* The largest size in x; NaN where there is one. */
static float largest_size(const float *x, int64_t inputs)
{
    Floats most = {0};
    Ints broken = {0};
    for (int64_t i = 0; i < inputs; i += LANES) {
        Floats some = load_padded(x, i, inputs);
        some = choose(some < 0, -some, some);
        most = choose(some > most, some, most);
        broken |= some != some;
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) {
        if (broken[i]) return NAN;
        largest = most[i] > largest ? most[i] : largest;
    }
    return largest;
}

/* A vector of x [inputs] from i on in steps, `steps` of them to one. */
INLINE Ints in_steps(const float *x, int64_t i, int64_t inputs, float steps)
{
    const Floats magic = spread(12582912.0f); /* adding it rounds to an integer */
    return __builtin_convertvector((load_padded(x, i, inputs) * steps + magic) - magic, Ints);
}

/* A row as products with INT8 read it. */
static void narrow_to_shorts(const float *x, int64_t inputs, char *row)
{
    const float largest = largest_size(x, inputs), steps = largest > TINY ? STEPS / largest : 0;
    for (int64_t i = 0; i < inputs; i += LANES)
        *(AnyShorts *)(row + i * 2) = __builtin_convertvector(in_steps(x, i, inputs, steps), Shorts);
    *step_of(row, inputs) = largest / STEPS;
}

#ifdef HAS_TILES

/* All eight tiles 16 rows of 64 bytes. Constant, since GCC does not see that loading it reads all of it. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} SHAPE __attribute__((aligned(LINE))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void tiles_on(void) { _tile_loadconfig(&SHAPE); }
static void tiles_off(void) { _tile_release(); }

/* A row to its place in tiles of bfloat16 [inputs / DEEP][SIDE][DEEP]. */
static void narrow(const float *x, int64_t inputs, uint16_t *y)
{
    for (int64_t i = 0; i < upward(inputs, DEEP); i += LANES)
        store_half(y + i / DEEP * SIDE * DEEP + i % DEEP, load_padded(x, i, inputs));
}

/* A row to its place in tiles of bytes [inputs / DEEPER][high, low][SIDE][DEEPER]; what one step is worth. */
static float narrow_to_bytes(const float *x, int64_t inputs, uint8_t *y)
{
    const float largest = largest_size(x, inputs), steps = largest > TINY ? STEPS / largest : 0;
    for (int64_t i = 0; i < upward(inputs, DEEPER); i += LANES) {
        const Ints whole = in_steps(x, i, inputs, steps);
        uint8_t *to = y + i / DEEPER * 2 * SIDE * DEEPER + i % DEEPER;
        *(AnyBytes *)to = __builtin_convertvector(whole >> 8, Bytes);
        *(AnyBytes *)(to + SIDE * DEEPER) = __builtin_convertvector(whole & 255, Bytes);
    }
    return largest / STEPS;
}

/* A band times a panel of int8, into out [rows][2 SIDE]. */
static void byte_tiles(const Weight *w, int64_t panel, const char *band, int64_t rows, float *out)
{
    const int64_t width = upward(w->inputs, DEEPER);
    const char *x = band + SIDE * 4, *end = band + band_bytes(w, w->inputs);
    const uint32_t *at = w->panels + panel * width * 2 * SIDE / 4;
    int32_t high[SIDE * 2 * SIDE], low[SIDE * 2 * SIDE];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; x < end; x += 2 * SIDE * DEEPER, at += 2 * SIDE * SIDE) {
        _tile_loadd(4, x, DEEPER);
        _tile_loadd(5, x + SIDE * DEEPER, DEEPER);
        _tile_loadd(6, at, SIDE * 4);
        _tile_loadd(7, at + SIDE * SIDE, SIDE * 4);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, high, 2 * SIDE * 4);
    _tile_stored(1, high + SIDE, 2 * SIDE * 4);
    _tile_stored(2, low, 2 * SIDE * 4);
    _tile_stored(3, low + SIDE, 2 * SIDE * 4);
    for (int64_t i = 0; i < rows * 2 * SIDE; i += LANES) {
        const Floats more = __builtin_convertvector((Ints)*(const AnyWords *)(high + i), Floats);
        const Floats less = __builtin_convertvector((Ints)*(const AnyWords *)(low + i), Floats);
        const float step = ((const float *)band)[i / (2 * SIDE)];
        store(out + i, (more * 256.0f + less) * step * load(w->scales + panel * PANEL + i % (2 * SIDE)));
    }
}

/* One or two bands, of up to SIDE rows each, times a panel of bfloat16, into out [SIDE or 2 SIDE][2 SIDE]. */
static void tiles(const Weight *w, int64_t panel, const uint16_t *x, int64_t rows, float *out)
{
    const int64_t width = upward(w->inputs, DEEP);
    const uint16_t *end = x + SIDE * width;
    const uint32_t *at = w->panels + panel * width * SIDE;
    _tile_zero(0);
    _tile_zero(1);
    if (rows > SIDE) {
        _tile_zero(2);
        _tile_zero(3);
        for (; x < end; x += SIDE * DEEP, at += SIDE * DEEP) {
            _tile_loadd(4, x, DEEP * 2);
            _tile_loadd(5, x + SIDE * width, DEEP * 2);
            _tile_loadd(6, at, SIDE * 4);
            _tile_loadd(7, at + SIDE * SIDE, SIDE * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, out + SIDE * 2 * SIDE, 2 * SIDE * 4);
        _tile_stored(3, out + SIDE * 2 * SIDE + SIDE, 2 * SIDE * 4);
    } else {
        for (; x < end; x += SIDE * DEEP, at += SIDE * DEEP) {
            _tile_loadd(4, x, DEEP * 2);
            _tile_loadd(6, at, SIDE * 4);
            _tile_loadd(7, at + SIDE * SIDE, SIDE * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, out, 2 * SIDE * 4);
    _tile_stored(1, out + SIDE, 2 * SIDE * 4);
}

#else

static void tiles_on(void) {}
static void tiles_off(void) {}
static void narrow(const float *x, int64_t inputs, uint16_t *y) { (void)x, (void)inputs, (void)y; }
static float narrow_to_bytes(const float *x, int64_t inputs, uint8_t *y) { return (void)x, (void)inputs, (void)y, 0; }
static void byte_tiles(const Weight *w, int64_t panel, const char *band, int64_t rows, float *out)
{
    (void)w, (void)panel, (void)band, (void)rows, (void)out;
}
static void tiles(const Weight *w, int64_t panel, const uint16_t *x, int64_t rows, float *out)
{
    (void)w, (void)panel, (void)x, (void)rows, (void)out;
}

#endif

/* x [rows][inputs] to bands of SIDE rows as products with w read them; this thread's share. */
static void to_bands(const Weight *w, const float *x, int64_t rows, char *bands, Team team)
{
    int64_t row, last;
    share(rows, team, &row, &last);
    for (; row < last; row++) {
        const float *from = x + row * w->inputs;
        const int64_t place = row % SIDE;
        char *band = bands + row / SIDE * band_bytes(w, w->inputs);
        if (w->type == INT8) narrow_to_shorts(from, w->inputs, band + place * row_bytes(w->inputs));
        else if (w->type == TILES) narrow(from, w->inputs, (uint16_t *)band + place * DEEP);
        else ((float *)band)[place] = narrow_to_bytes(from, w->inputs, (uint8_t *)band + SIDE * 4 + place * DEEPER);
    }
}

/* Few rows leave registers for a second panel, whose sums then hide the latency of the first's. */
static void bfloat16_tile(const Weight *w, int64_t panel, int panels, const void *x, int rows, Ahead ahead, float *out)
{
    if (panels == 2) tile_of(w, BFLOAT16, panel, 2, x, rows, ahead, out);
    else tile_of(w, BFLOAT16, panel, 1, x, rows, ahead, out);
}

static void int8_tile(const Weight *w, int64_t panel, int panels, const void *x, int rows, Ahead ahead, float *out)
{
    if (panels == 2) tile_of(w, INT8, panel, 2, x, rows, ahead, out);
    else tile_of(w, INT8, panel, 1, x, rows, ahead, out);
}

static void float32_tile(const Weight *w, int64_t panel, int panels, const void *x, int rows, Ahead ahead, float *out)
{
    if (panels == 2) tile_of(w, FLOAT32, panel, 2, x, rows, ahead, out);
    else tile_of(w, FLOAT32, panel, 1, x, rows, ahead, out);
}

INLINE int64_t panels_of(const Weight *w) { return (w->outputs + PANEL - 1) / PANEL; }
INLINE int64_t height_of(const Weight *w) { return w->type == TILES ? 2 * SIDE : w->type == INT8_TILES ? SIDE : TILE; }

/* While some panels are multiplied the next are fetched from memory, a part of them with each tile of rows. */
static Ahead next_panels(const Weight *w, int64_t panel, int panels, int64_t row, int64_t rows)
{
    const int64_t each = PANEL * 4 / WORD(w->type), times = (rows + TILE - 1) / TILE, pace = (panels * each + times - 1) / times;
    return (Ahead){(uintptr_t)w->panels + (uintptr_t)(((panel + panels) * each + row / TILE * pace) * w->inputs), pace};
}

/* As many of x's rows from `row` on as are taken at once times some panels, into out [that many][panels * PANEL]. */
static int block(const Weight *w, int64_t panel, int panels, const void *x, int64_t row, int64_t rows, float *out)
{
    const int64_t height = height_of(w), here = rows - row < height ? rows - row : height;
    const float *floats = (const float *)x + row * w->inputs;
    const char *shorts = (const char *)x + row * row_bytes(w->inputs);
    const char *band = (const char *)x + row / SIDE * band_bytes(w, w->inputs);
    const Ahead ahead = next_panels(w, panel, panels, row, rows);
    switch (w->type) {
    case FLOAT32: float32_tile(w, panel, panels, floats, (int)here, ahead, out); break;
    case BFLOAT16: bfloat16_tile(w, panel, panels, floats, (int)here, ahead, out); break;
    case INT8: int8_tile(w, panel, panels, shorts, (int)here, ahead, out); break;
    case TILES: tiles(w, panel, (const uint16_t *)band, here, out); break;
    default: byte_tiles(w, panel, band, here, out);
    }
    return (int)here;
}

/* x [rows][inputs] as products with w read it: itself or, rounded, as `bands` that all threads make together. */
static const void *readable(const Weight *w, const float *x, int64_t rows, char *bands, Team team)
{
    if (!band_bytes(w, w->inputs)) return x;
    to_bands(w, x, rows, bands, team);
    meet(team);
    if (in_tiles(w)) tiles_on();
    return bands;
}

/* y [rows][outputs] = x times weights, or += where `add`; this thread's share of the outputs. */
static void product(const Weight *w, const float *x, int64_t rows, float *y, int add, char *bands, Team team)
{
    const void *inputs = readable(w, x, rows, bands, team);
    const int64_t most = w->type == INT8 ? 2 : 3; /* rows that leave registers for a second panel */
    const int64_t height = height_of(w), wide = !in_tiles(w) && (rows <= most || LANES == 16) ? 2 : 1;
    float out[ROOM];
    int64_t panel, last;
    share(panels_of(w), team, &panel, &last);
    while (panel < last) {
        const int64_t panels = last - panel < wide ? 1 : wide, from = panel * PANEL;
        const int64_t width = (w->outputs - from < panels * PANEL ? w->outputs - from : panels * PANEL);
        for (int64_t row = 0; row < rows; row += height) {
            const int here = block(w, panel, (int)panels, inputs, row, rows, out);
            for (int r = 0; r < here; r++) {
                float *to = y + (row + r) * w->outputs + from;
                const float *got = out + r * panels * PANEL;
                if (add)
                    for (int64_t o = 0; o < width; o++) to[o] += got[o];
                else
                    memcpy(to, got, (size_t)width * sizeof(float));
            }
        }
        panel += panels;
    }
    if (in_tiles(w)) tiles_off();
}

/* y [rows][F] = SiLU(x gate) * (x up). */
static void gated(const Layer *layer, const float *x, int64_t rows, float *y, char *bands, Team team)
{
    const Weight *gate = &layer->gate, *up = &layer->up;
    const void *inputs = readable(gate, x, rows, bands, team);
    const int64_t height = height_of(gate);
    int64_t panel, last;
    share(panels_of(gate), team, &panel, &last);
    float gates[ROOM], ups[ROOM];
    for (; panel < last; panel++) {
        const int64_t from = panel * PANEL, left = gate->outputs - from;
        const size_t width = (size_t)(left < PANEL ? left : PANEL);
        for (int64_t row = 0; row < rows; row += height) {
            const int here = block(gate, panel, 1, inputs, row, rows, gates);
            block(up, panel, 1, inputs, row, rows, ups);
            for (int i = 0; i < here * PANEL; i += LANES) {
                Floats g = load(gates + i);
                store(gates + i, g / (1.0f + exponential(-g)) * load(ups + i));
            }
            for (int r = 0; r < here; r++) memcpy(y + (row + r) * gate->outputs + from, gates + r * PANEL, width * sizeof(float));
        }
    }
    if (in_tiles(gate)) tiles_off();
}

/* --- the rest of a layer ------------------------------------------------------------------------------------------ */

/* One over the root mean square of x. */
static float inverse_rms(const float *x, float eps, int64_t size)
{
    Floats squares = {0};
    float tail = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    for (int64_t j = i; j < size; j++) tail += x[j] * x[j];
    return 1.0f / sqrtf((sum_of(squares) + tail) / (float)size + eps);
}

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

/* --- what heads guess --------------------------------------------------------------------------------------------- */

static float largest_of(const float *x, int64_t size)
{
    float largest = x[0];
    int64_t i = 0;
    if (size >= LANES) {
        Floats most = load(x);
        for (i = LANES; i + LANES <= size; i += LANES) most = choose(load(x + i) > most, load(x + i), most);
        for (int j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
    }
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

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

/* --- what Python calls -------------------------------------------------------------------------------------------- */

static int64_t longest(const Step *s)
{
    int64_t most = 0;
    for (int64_t b = 0; b < s->batch; b++) most = s->offsets[b] > most ? s->offsets[b] : most;
    return upward(most + s->num_new, SIDE);
}

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

static int64_t bands_bytes(const Weight *w, int64_t rows, int64_t inputs)
{
    return upward(upward(rows, SIDE) / SIDE * band_bytes(w, inputs), LINE);
}

/* Bytes of work that `medusa_linear` needs; they begin on a cache line. */
int64_t medusa_linear_bytes(const Weight *w, int64_t rows) { return bands_bytes(w, rows, w->inputs); }

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

/* Bytes of work, which begins on a cache line. */
int64_t medusa_work_bytes(const Model *m, const Step *s) { return plan(m, s).end; }

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

/* Bytes of work, which begins on a cache line. */
int64_t medusa_guess_bytes(const Heads *h, const Guess *g) { return guess_plan(h, g).end; }

void medusa_guess(const Heads *h, const Guess *g, char *work, int64_t threads)
{
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)threads)
    guess(h, g, work, TEAM(meeting));
}

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

/* --- which tokens are accepted ------------------------------------------------------------------------------------ */

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

void medusa_layers(const Model *m, const Step *s)
{
    const int64_t rows = s->batch * s->num_new;
    const Plan p = plan(m, s);
    char *work = s->work;
    float *normed = (float *)(work + p.normed), *qkv = (float *)(work + p.qkv), *seen = (float *)(work + p.seen);
    float *inner = (float *)(work + p.inner), *weights = (float *)(work + p.weights);
    char *bands = work + p.bands;
    uint8_t *seen_by = (uint8_t *)(work + p.seen_by);
    Meeting meeting = {0};
#pragma omp parallel num_threads((int)s->threads)
    {
        const Team team = TEAM(meeting);
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
            attention(m, s, cache, seen_by, qkv, seen, weights + team.thread * p.per_thread, team);
            meet(team);
            product(&layer->out, seen, rows, s->hidden, 1, bands, team);
            meet(team);
            norms(s->hidden, layer->norm_mlp, m, rows, normed, team);
            meet(team);
            gated(layer, normed, rows, inner, bands, team);
            meet(team);
            product(&layer->down, inner, rows, s->hidden, 1, bands, team);
            meet(team);
        }
        norms(s->hidden, m->norm, m, rows, normed, team);
        meet(team);
    }
    memcpy(s->hidden, normed, (size_t)(rows * m->hidden) * sizeof(float));
}
