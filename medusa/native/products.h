/* Rows times weights: float32, bfloat16 and int8, in vectors or in tiles of AMX. */

#pragma once

#include "threads.h"

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
#define ROOM (2 * SIDE * PANEL) /* floats that hold the outputs of a block */

_Static_assert(SIDE >= TILE, "ROOM holds TILE rows of two panels");
#ifdef HAS_TILES
_Static_assert(PANEL == 2 * SIDE, "a panel is two tiles wide");
#endif

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
static void gated(const Weight *gate, const Weight *up, const float *x, int64_t rows, float *y, char *bands, Team team)
{
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

static int64_t bands_bytes(const Weight *w, int64_t rows, int64_t inputs)
{
    return upward(upward(rows, SIDE) / SIDE * band_bytes(w, inputs), LINE);
}
