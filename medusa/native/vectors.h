/* Vectors of the width that this machine has: loads, bfloat16, exponentials, sums. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

#define LINE 64 /* bytes of a cache line */
#define INLINE static inline __attribute__((always_inline))

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

INLINE int64_t upward(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

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
