/* Loops over bytes and floats that take one pass here and several in NumPy. NumPy has the same results, bit for bit:
 * no contraction, no other order of sums. Nothing of Python is used, so that one library serves all versions of it.
 *
 * The second half of this file is compiled once for each level of processors, by including the file in itself. Floats
 * are widened and rounded by integer arithmetic that any compiler makes vectors of; only float16 has instructions of its
 * own there (`halves`), which take a quarter of the time. */

#ifndef LEVEL

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* Σ word and Σ index · word (mod 2^64) of `count` 8-byte little-endian words. */
EXPORT void fossil_word_sums(const uint8_t *data, size_t count, uint64_t *sums)
{
    uint64_t sum = 0, weighted = 0;
    for (size_t index = 0; index < count; index++) {
        uint64_t word;
        memcpy(&word, data + 8 * index, 8);
        sum += word;
        weighted += index * word;
    }
    sums[0] = sum;
    sums[1] = weighted;
}

enum { BF16, F16, F32, DTYPES };
static const size_t SIZES[DTYPES] = {2, 2, 4};

/* Bits of the smallest float32 that is rounded to infinity in each. */
static const uint32_t LEAST_TOO_LARGE[DTYPES] = {0x7F7F8000, 0x477FF000, 0x7F800000};

/* Of tensors in a file, which may lie at odd addresses. */
typedef uint16_t __attribute__((aligned(1), may_alias)) stored16;
typedef uint32_t __attribute__((aligned(1), may_alias)) stored32;

#define SPAN 512 /* columns of an update that are laid out at a time: a small rank alone is too short a loop */
#define GROUP 8  /* rows for which that is done together: a column of theirs is one line of the cache */

typedef uint32_t Line(const void *restrict in, void *restrict out, const float *restrict update, size_t count);
typedef void Measure(const float *before, const float *update, const void *after, int dtype, size_t count, double *sums);

#define JOIN2(name, level) name##_##level
#define JOIN(name, level) JOIN2(name, level)
#define NAME(name) JOIN(name, LEVEL)

#define LEVEL 0
#include "kernels.c"
#undef LEVEL

#if defined(__x86_64__) && defined(__GNUC__)
#define LEVELS 3
#include <cpuid.h>
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define LEVEL 1
#include "kernels.c"
#undef LEVEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define LEVEL 2
#include "kernels.c"
#undef LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static Line *const *const LINES[LEVELS] = {lines_0, lines_1, lines_2};
static Measure *const MEASURES[LEVELS] = {measure_0, measure_1, measure_2};

static int best_level(void)
{
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    /* Not every compiler knows the name of F16C. */
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !__builtin_cpu_supports("avx2"))
        return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    return 1;
}

#else
#define LEVELS 1
static Line *const *const LINES[LEVELS] = {lines_0};
static Measure *const MEASURES[LEVELS] = {measure_0};

static int best_level(void)
{
    return 0;
}
#endif

static volatile int chosen = -1;

static int level(void)
{
    if (chosen < 0)
        chosen = best_level();
    return chosen;
}

/* The level of processors whose loops are used: 0 any, 1 x86-64 with AVX2, 2 with AVX-512. A level from 0 up to the
 * best one here is set before; for tests. */
EXPORT int fossil_level(int wanted)
{
    if (wanted >= 0 && wanted <= best_level())
        chosen = wanted;
    return level();
}

/* out (count, width) = rows (count, width) + update, in float32, rounded once to nearest, ties to even. Rows of `from`
 * begin `row_bytes` bytes apart, those of `to` follow each other. Without a period nothing is added. Returns whether
 * a result is infinite or NaN; one that is NaN is then not kept as such, so that the caller makes it anew.
 *
 * The update (count, period) is repeated along the columns; its steps are in elements. */
EXPORT int fossil_merge(const char *rows, ptrdiff_t row_bytes, int from, char *out, int to, size_t count, size_t width,
                        const float *values, size_t period, ptrdiff_t row_step, ptrdiff_t column_step)
{
    const size_t in_size = SIZES[from], out_size = SIZES[to];
    Line *const line = LINES[level()][(from * DTYPES + to) * 2 + (period != 0)];
    uint32_t bad = 0;

    if (period == 0 || (column_step == 1 && period >= SPAN)) { /* as it lies there */
        const size_t step = period ? period : width;
        for (size_t row = 0; row < count; row++) {
            const char *source = rows + (ptrdiff_t)row * row_bytes;
            char *target = out + row * width * out_size;
            const float *own = period ? values + (ptrdiff_t)row * row_step : NULL;
            for (size_t at = 0; at < width; at += step)
                bad |= line(source + at * in_size, target + at * out_size, own, width - at < step ? width - at : step);
        }
        return bad >> 31;
    }
    /* Columns [first, first + length) of the update, and as often again as they fit. */
    const size_t length = period < SPAN ? period : SPAN;
    const size_t times = period < SPAN ? SPAN / period : 1;
    for (size_t start = 0; start < count; start += GROUP) {
        const size_t group = count - start < GROUP ? count - start : GROUP;
        for (size_t first = 0; first < period && first < width; first += length) {
            float laid[GROUP][SPAN];
            const size_t own = period - first < length ? period - first : length;
            for (size_t column = 0; column < own; column++) {
                const float *value = values + (ptrdiff_t)start * row_step + (ptrdiff_t)(first + column) * column_step;
                for (size_t row = 0; row < group; row++)
                    laid[row][column] = value[(ptrdiff_t)row * row_step];
            }
            for (size_t row = 0; row < group; row++) {
                for (size_t there = own; there < times * own; there *= 2) /* twice as much each time */
                    memcpy(laid[row] + there, laid[row], (there < SPAN / 2 ? there : SPAN - there) * sizeof(float));
                const char *source = rows + (ptrdiff_t)(start + row) * row_bytes;
                char *target = out + (start + row) * width * out_size;
                for (size_t at = first; at < width; at += times * period) {
                    const size_t left = width - at, most = times * own;
                    bad |= line(source + at * in_size, target + at * out_size, laid[row], left < most ? left : most);
                }
            }
        }
    }
    return bad >> 31;
}

/* <W' - W, ΔW>, |ΔW|² and |W' - W|² in float64, added up in NumPy's order (pairwise). */
EXPORT void fossil_measure(const float *before, const float *update, const void *after, int dtype, size_t count,
                           double *sums)
{
    MEASURES[level()](before, update, after, dtype, count, sums);
}

#else /* LEVEL: what follows is compiled for each */

INLINE float NAME(as_float)(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t NAME(as_bits)(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* One of two, without a branch, which would keep a loop from being made vectors of. */
INLINE uint32_t NAME(either)(int first, uint32_t one, uint32_t other)
{
    const uint32_t mask = 0u - (uint32_t)first;
    return (one & mask) | (other & ~mask);
}

INLINE float NAME(from_half)(uint32_t half)
{
    const uint32_t magnitude = half & 0x7FFF, bits = (magnitude << 13) + (112u << 23);
    /* A subnormal number is its mantissa's place above 2^-14, less 2^-14. */
    const uint32_t small = NAME(as_bits)(NAME(as_float)(bits + (1u << 23)) - NAME(as_float)(113u << 23));
    const uint32_t large = bits + NAME(either)(magnitude < 0x7C00, 0, 112u << 23);
    return NAME(as_float)(NAME(either)(magnitude < 0x400, small, large) | (half & 0x8000) << 16);
}

INLINE uint32_t NAME(to_half)(uint32_t bits)
{
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t normal = (magnitude + 0x0FFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    /* Added to 0.5, a number below the normal ones is rounded to what float16 has of it, in the lowest bits. */
    const int below = magnitude < 0x38800000;
    const uint32_t small = NAME(as_bits)(NAME(as_float)(NAME(either)(below, magnitude, 0)) + 0.5f) - 0x3F000000;
    const uint32_t large = NAME(either)(magnitude < LEAST_TOO_LARGE[F16], normal, 0x7C00);
    return NAME(either)(below, small, large) | (bits >> 16 & 0x8000);
}

INLINE uint32_t NAME(to_bfloat16)(uint32_t bits)
{
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

INLINE float NAME(wide)(const void *in, size_t index, int dtype)
{
    if (dtype == BF16)
        return NAME(as_float)((uint32_t)((const stored16 *)in)[index] << 16);
    if (dtype == F16)
        return NAME(from_half)(((const stored16 *)in)[index]);
    return NAME(as_float)(((const stored32 *)in)[index]);
}

#if LEVEL
/* As many elements of a line as there are instructions for, if it is from or to float16 and neither to nor from
 * bfloat16; returns how many. */
INLINE size_t NAME(halves)(const void *restrict in, void *restrict out, const float *restrict update, size_t count,
                           int from, int to, int adds, uint32_t *bad)
{
    const int limit = (int)(0x80000000 - LEAST_TOO_LARGE[to]);
    size_t done = 0;
    __m256i over = _mm256_setzero_si256();
    if (from == BF16 || to == BF16 || (from == F32 && to == F32))
        return 0;
    for (; done + 8 <= count; done += 8) {
        const char *source = (const char *)in + done * SIZES[from];
        char *target = (char *)out + done * SIZES[to];
        __m256 value = from == F16 ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)source))
                                   : _mm256_loadu_ps((const float *)source);
        if (adds)
            value = _mm256_add_ps(value, _mm256_loadu_ps(update + done));
        if (to == F16)
            _mm_storeu_si128((__m128i *)target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        else
            _mm256_storeu_ps((float *)target, value);
        const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7FFFFFFF));
        over = _mm256_or_si256(over, _mm256_add_epi32(magnitude, _mm256_set1_epi32(limit)));
    }
    *bad |= _mm256_movemask_ps(_mm256_castsi256_ps(over)) ? 1u << 31 : 0;
    return done;
}
#endif

/* The highest bit of what is returned is set if a result is too large, infinite or NaN. A NaN is not kept. */
INLINE uint32_t NAME(line)(const void *restrict in, void *restrict out, const float *restrict update, size_t count,
                           int from, int to, int adds)
{
    uint32_t bad = 0;
    size_t index = 0;
#if LEVEL
    index = NAME(halves)(in, out, update, count, from, to, adds, &bad);
#endif
    for (; index < count; index++) {
        float value = NAME(wide)(in, index, from);
        if (adds)
            value += update[index];
        const uint32_t bits = NAME(as_bits)(value);
        bad |= (bits & 0x7FFFFFFF) + (0x80000000 - LEAST_TOO_LARGE[to]);
        if (to == F32)
            ((stored32 *)out)[index] = bits;
        else
            ((stored16 *)out)[index] = (uint16_t)(to == BF16 ? NAME(to_bfloat16)(bits) : NAME(to_half)(bits));
    }
    return bad;
}

#define LINE(from, to, adds)                                                                                           \
    static uint32_t NAME(line_##from##_##to##_##adds)(const void *restrict in, void *restrict out,                     \
                                                      const float *restrict update, size_t count)                      \
    {                                                                                                                  \
        return NAME(line)(in, out, update, count, from, to, adds);                                                     \
    }
#define LINES_TO(from, to) LINE(from, to, 0) LINE(from, to, 1)
#define LINES_FROM(from) LINES_TO(from, BF16) LINES_TO(from, F16) LINES_TO(from, F32)
LINES_FROM(BF16)
LINES_FROM(F16)
LINES_FROM(F32)
#define NAMES_TO(from, to) NAME(line_##from##_##to##_0), NAME(line_##from##_##to##_1)
#define NAMES_FROM(from) NAMES_TO(from, BF16), NAMES_TO(from, F16), NAMES_TO(from, F32)
static Line *const NAME(lines)[DTYPES * DTYPES * 2] = {NAMES_FROM(BF16), NAMES_FROM(F16), NAMES_FROM(F32)};

typedef struct {
    double kept, update, moved;
} NAME(Sums);

INLINE NAME(Sums) NAME(both)(NAME(Sums) one, NAME(Sums) other)
{
    return (NAME(Sums)){one.kept + other.kept, one.update + other.update, one.moved + other.moved};
}

INLINE NAME(Sums) NAME(products)(const float *before, const float *update, const void *after, size_t at, int dtype)
{
    const double moved = (double)NAME(wide)(after, at, dtype) - before[at], wanted = update[at];
    return (NAME(Sums)){moved * wanted, wanted * wanted, moved * moved};
}

/* Of at most 128 elements: eight sums side by side, and what is left one by one. */
INLINE NAME(Sums) NAME(block)(const float *before, const float *update, const void *after, size_t at, size_t count,
                              int dtype)
{
    NAME(Sums) total = {0, 0, 0};
    size_t done = 0;
    if (count >= 8) {
        double kept[8] = {0}, squares[8] = {0}, moves[8] = {0};
        for (; done < count - count % 8; done += 8)
            for (int lane = 0; lane < 8; lane++) {
                const NAME(Sums) one = NAME(products)(before, update, after, at + done + lane, dtype);
                kept[lane] += one.kept;
                squares[lane] += one.update;
                moves[lane] += one.moved;
            }
#define TREE(r) (((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7])))
        total = (NAME(Sums)){TREE(kept), TREE(squares), TREE(moves)};
#undef TREE
    }
    for (; done < count; done++)
        total = NAME(both)(total, NAME(products)(before, update, after, at + done, dtype));
    return total;
}

#define BLOCKS(dtype)                                                                                                  \
    static NAME(Sums)                                                                                                  \
        NAME(sums_##dtype)(const float *before, const float *update, const void *after, size_t at, size_t count)       \
    {                                                                                                                  \
        if (count <= 128)                                                                                              \
            return NAME(block)(before, update, after, at, count, dtype);                                               \
        const size_t half = count / 2 - count / 2 % 8;                                                                 \
        return NAME(both)(NAME(sums_##dtype)(before, update, after, at, half),                                         \
                          NAME(sums_##dtype)(before, update, after, at + half, count - half));                         \
    }
BLOCKS(BF16)
BLOCKS(F16)
BLOCKS(F32)

static void NAME(measure)(const float *before, const float *update, const void *after, int dtype, size_t count,
                          double *sums)
{
    NAME(Sums) found;
    if (dtype == BF16)
        found = NAME(sums_BF16)(before, update, after, 0, count);
    else if (dtype == F16)
        found = NAME(sums_F16)(before, update, after, 0, count);
    else
        found = NAME(sums_F32)(before, update, after, 0, count);
    sums[0] = found.kept;
    sums[1] = found.update;
    sums[2] = found.moved;
}

#undef BLOCKS
#undef LINE
#undef LINES_TO
#undef LINES_FROM
#undef NAMES_TO
#undef NAMES_FROM

#endif
