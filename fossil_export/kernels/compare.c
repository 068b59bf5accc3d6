/* What `verify` asks of stored rows, in one pass: how far each element is from the exact result, in steps of its dtype.
 *
 * Everything is float64, and NumPy has the same results, bit for bit, but for sums of products, which it takes in
 * another order. Nothing here is shared with kernels.c: what merged the weights must not be what checks them. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
#define LANES 8 /* sums that are kept side by side, so that they can be taken at once */
#define TILE 512 /* columns at a time: what stays in the first cache */

/* Rows of an array: the first element, its dtype and the bytes from a row to the next. */
typedef struct {
    const uint8_t *data;
    int64_t dtype;
    int64_t stride;
} Rows;

/* What was found. `worst` is the bits of a float64 that is not negative; NaN is the largest. The sums are of the rows
 * whose number, from `phase` on, is a multiple of `sampled`. */
typedef struct {
    int64_t worst;
    int64_t asked; /* elements that were computed by themselves */
    double kept[LANES];
    double update[LANES];
    int64_t phase, sampled;
} Found;

INLINE double as_double(int64_t bits)
{
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

INLINE int64_t bits_of(double value)
{
    int64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

typedef void Widen(double *values, Rows rows, size_t row, size_t column, size_t count);

/* Some elements of a row, in float64. */
INLINE void widened(double *values, Rows rows, size_t row, size_t column, size_t count)
{
    const uint8_t *data = rows.data + row * rows.stride;
    if (rows.dtype == BF16) {
        const uint16_t *own = (const uint16_t *)data + column;
        for (size_t at = 0; at < count; at++)
            values[at] = as_float((uint32_t)own[at] << 16);
    } else if (rows.dtype == F16) {
        const uint16_t *own = (const uint16_t *)data + column;
        for (size_t at = 0; at < count; at++) {
            uint32_t sign = (uint32_t)(own[at] & 0x8000) << 16, size = own[at] & 0x7fff;
            /* Subnormal numbers too become what they are; infinities and NaN keep their bits. */
            float small = as_float(size << 13) * 0x1p112f;
            uint32_t bits;
            memcpy(&bits, &small, 4);
            values[at] = as_float(sign | (size >= 0x7c00 ? 0x7f800000 | size << 13 : bits));
        }
    } else {
        const float *own = (const float *)data + column;
        for (size_t at = 0; at < count; at++)
            values[at] = own[at];
    }
}

/* Significant bits of a dtype, as what its steps are measured with: the exponent of its smallest normal number as
 * float64 has it, and what an exponent is taken from for one over the step. */
typedef struct {
    int64_t least, top;
} Steps;

INLINE Steps steps_of(int64_t dtype)
{
    int64_t mantissa = dtype == BF16 ? 8 : dtype == F16 ? 11 : 24, smallest = dtype == F16 ? -14 : -126;
    Steps found = {(smallest + 1023) << 52, (2046 + mantissa - 1) << 52};
    return found;
}

/* |difference| in steps at `exact`; NaN where that is not finite. The steps are powers of two: nothing is rounded. */
INLINE double in_steps(double difference, double exact, Steps steps)
{
    const int64_t infinite = 0x7ff0000000000000;
    int64_t exponent = bits_of(exact) & infinite, used = exponent < steps.least ? steps.least : exponent;
    double error = fabs(difference) * as_double(steps.top - used);
    return exponent == infinite ? NAN : error;
}

INLINE int64_t larger(int64_t one, int64_t other)
{
    return one > other ? one : other;
}

INLINE void sum_up(Found *found, size_t column, const double *weight, const double *got, const double *exact,
                   size_t count)
{
    size_t at = 0;
    for (; at < count && (column + at) % LANES; at++) {
        double change = exact[at] - weight[at];
        found->update[(column + at) % LANES] += change * change;
        found->kept[(column + at) % LANES] += (got[at] - weight[at]) * change;
    }
    for (; at + LANES <= count; at += LANES)
        for (size_t lane = 0; lane < LANES; lane++) {
            double change = exact[at + lane] - weight[at + lane];
            found->update[lane] += change * change;
            found->kept[lane] += (got[at + lane] - weight[at + lane]) * change;
        }
    for (size_t lane = 0; at < count; at++, lane++) {
        double change = exact[at] - weight[at];
        found->update[lane] += change * change;
        found->kept[lane] += (got[at] - weight[at]) * change;
    }
}

/* An error in steps as it counts: what the float32 products may cost (`bound`, in steps) excuses what is over half of
 * one. */
INLINE double counted(double error, double bound)
{
    double less = error - bound;
    return error <= 0.5 ? error : less > 0.5 || less != less ? less : 0.5;
}

/* Tile: W[o, j] + D[o mod m, j mod r], and 0 for D if there is none (a cast). */
INLINE void tiled(Rows stored, Rows got, const float *tile, size_t period, size_t rank, size_t offset, size_t rows,
                  size_t width, Found *found, Widen widen)
{
    double repeated[TILE], weight[TILE], there[TILE], exact[TILE];
    const Steps steps = steps_of(got.dtype);
    /* A short row of D lies here as often as it fits; a long one is taken in parts. */
    const int is_short = rank <= TILE;
    size_t step = is_short ? TILE / rank * rank : TILE;
    for (size_t row = 0; row < rows; row++) {
        const float *own = tile + (offset + row) % period * rank;
        for (size_t at = 0; is_short && at < step; at++)
            repeated[at] = at < rank ? own[at] : repeated[at - rank];
        size_t at_tile = 0;
        for (size_t column = 0; column < width;) {
            size_t count = width - column < step ? width - column : step;
            if (!is_short && count > rank - at_tile)
                count = rank - at_tile;
            if (!is_short)
                for (size_t at = 0; at < count; at++)
                    repeated[at] = own[at_tile + at];
            at_tile = at_tile + count >= rank ? 0 : at_tile + count;
            int64_t worst = 0;
            widen(weight, stored, row, column, count);
            widen(there, got, row, column, count);
            for (size_t at = 0; at < count; at++)
                exact[at] = weight[at] + repeated[at];
            for (size_t at = 0; at < count; at++) {
                int64_t error = bits_of(in_steps(there[at] - exact[at], exact[at], steps));
                worst = larger(worst, error);
            }
            found->worst = larger(found->worst, worst);
            if ((found->phase + row) % found->sampled == 0)
                sum_up(found, column, weight, there, exact, count);
            column += count;
        }
    }
}

/* W' as it was computed, with a bound on float32's error in it if it has one. */
INLINE void rebuilt(Rows stored, Rows got, const double *exact, const double *bound, size_t rows, size_t width,
                    Found *found, Widen widen)
{
    double weight[TILE], there[TILE];
    const Steps steps = steps_of(got.dtype);
    for (size_t row = 0; row < rows; row++) {
        for (size_t column = 0; column < width; column += TILE) {
            const double *wanted = exact + row * width + column;
            size_t count = width - column < TILE ? width - column : TILE;
            int64_t worst = 0;
            widen(there, got, row, column, count);
            if (bound)
                for (size_t at = 0; at < count; at++) {
                    double error = in_steps(there[at] - wanted[at], wanted[at], steps);
                    double may = in_steps(bound[row * width + column + at], wanted[at], steps);
                    worst = larger(worst, bits_of(fabs(counted(error, may))));
                }
            else
                for (size_t at = 0; at < count; at++)
                    worst = larger(worst, bits_of(in_steps(there[at] - wanted[at], wanted[at], steps)));
            found->worst = larger(found->worst, worst);
            if ((found->phase + row) % found->sampled == 0) {
                widen(weight, stored, row, column, count);
                sum_up(found, column, weight, there, wanted, count);
            }
        }
    }
}

/* W + s · left · right, where the product was taken in float32 (`near`) or in float64 (`exact`). Row o of `left` and
 * column j of the weight have the product Σ left[o, j div m · b + k] · right[j mod m, k] (k < r): b = 0 and m = width
 * for B A, b = m = r for W B. With `plus` (m, m) that of block [o mod m, j mod m] is added.
 *
 * How far the product may be from its exact value is known by the lengths of the factors' rows (Cauchy-Schwarz). Only
 * where that could matter, and for what float32 may have cost the merge, an element is computed by itself. */
typedef struct {
    const float *near, *left, *right, *plus;
    const double *exact, *left_sizes, *right_sizes; /* per row of left and block of columns; per row of right */
    int64_t rank, period, block, left_stride, left_blocks;
    int64_t asks; /* elements that are computed by themselves at most */
    double scale;
} Product;

INLINE double exactly(const Product *product, double weight, size_t row, size_t column, double *bound)
{
    size_t period = product->period, rank = product->rank;
    const float *left = product->left + row * product->left_stride + column / period * product->block;
    const float *right = product->right + column % period * rank;
    double sum = 0.0, sizes = 0.0;
    for (size_t at = 0; at < rank; at++) {
        double term = (double)left[at] * (double)right[at];
        sum += term;
        sizes += fabs(term);
    }
    sum *= product->scale;
    sizes *= fabs(product->scale);
    if (product->plus) {
        double more = product->plus[row % period * period + column % period];
        sum = weight + sum + more;
        sizes += fabs(weight) + fabs(more);
    } else
        sum += weight;
    *bound = sizes * ((double)(rank + 2) * 0x1p-24);
    return sum;
}

INLINE void multiplied(Rows stored, Rows got, const Product *product, size_t rows, size_t width, Found *found,
                       Widen widen)
{
    double weight[TILE], there[TILE], exact[TILE];
    int64_t upper[TILE];
    const Steps steps = steps_of(got.dtype);
    const size_t period = product->period, rank = product->rank;
    const double scale = product->scale;
    const double unit = (double)(rank + 2) * (product->near ? 0x1p-24 : 0x1p-53) * (1 + 0x1p-6) * fabs(scale);
    /* Products that float32 cannot hold are lost whole. */
    const double lost = product->near ? (double)rank * 0x1p-148 * fabs(scale) : 0.0;
    for (size_t row = 0; row < rows; row++) {
        const float *plus = product->plus ? product->plus + row % period * period : 0;
        for (size_t column = 0; column < width;) {
            size_t inside = column % period, count = width - column < TILE ? width - column : TILE;
            if (count > period - inside)
                count = period - inside;
            const double *sizes = product->right_sizes + inside;
            const double size = product->left_sizes[row * product->left_blocks + column / period] * unit;
            int64_t most = 0;
            widen(weight, stored, row, column, count);
            widen(there, got, row, column, count);
            if (product->near) {
                const float *near = product->near + row * width + column;
                for (size_t at = 0; at < count; at++)
                    exact[at] = weight[at] + scale * (double)near[at];
            } else {
                const double *near = product->exact + row * width + column;
                for (size_t at = 0; at < count; at++)
                    exact[at] = weight[at] + scale * near[at];
            }
            if (plus)
                for (size_t at = 0; at < count; at++)
                    exact[at] += plus[inside + at];
            for (size_t at = 0; at < count; at++) {
                double bound = size * sizes[at] + lost + (fabs(exact[at]) + fabs(weight[at])) * 0x1p-50;
                double least = fabs(exact[at]) - bound;
                double error = in_steps(fabs(there[at] - exact[at]) + bound, least > 0 ? least : 0, steps);
                upper[at] = exact[at] - exact[at] == 0 ? bits_of(error) : INT64_MAX;
                most = larger(most, upper[at]);
            }
            if (most > found->worst) {
                size_t furthest = 0;
                while (upper[furthest] != most)
                    furthest++;
                for (size_t turn = 0; turn <= count; turn++) {
                    /* The one that may be furthest first: it tells which others can be left out. */
                    size_t at = turn ? turn - 1 : furthest;
                    if (upper[at] <= found->worst || (turn && at == furthest))
                        continue;
                    if (++found->asked > product->asks)
                        return;
                    double may, wanted = exactly(product, weight[at], row, column + at, &may);
                    double error = in_steps(there[at] - wanted, wanted, steps);
                    error = fabs(counted(error, in_steps(may, wanted, steps)));
                    found->worst = larger(found->worst, bits_of(error));
                }
            }
            if ((found->phase + row) % found->sampled == 0)
                sum_up(found, column, weight, there, exact, count);
            column += count;
        }
    }
}

/* The same loops for each kind of processor; the compiler makes of them what the kind can do. */
#define KIND(NAME, TARGET)                                                                                             \
    TARGET static void widen_##NAME(double *values, Rows rows, size_t row, size_t column, size_t count)                \
    {                                                                                                                  \
        widened(values, rows, row, column, count);                                                                     \
    }                                                                                                                  \
    TARGET static void tiled_##NAME(Rows stored, Rows got, const float *tile, size_t period, size_t rank,              \
                                    size_t offset, size_t rows, size_t width, Found *found)                            \
    {                                                                                                                  \
        tiled(stored, got, tile, period, rank, offset, rows, width, found, widen_##NAME);                              \
    }                                                                                                                  \
    TARGET static void rebuilt_##NAME(Rows stored, Rows got, const double *exact, const double *bound, size_t rows,    \
                                      size_t width, Found *found)                                                      \
    {                                                                                                                  \
        rebuilt(stored, got, exact, bound, rows, width, found, widen_##NAME);                                          \
    }                                                                                                                  \
    TARGET static void multiplied_##NAME(Rows stored, Rows got, const Product *product, size_t rows, size_t width,     \
                                         Found *found)                                                                 \
    {                                                                                                                  \
        multiplied(stored, got, product, rows, width, found, widen_##NAME);                                            \
    }

KIND(plain, )
#if defined(__x86_64__)
KIND(avx2, __attribute__((target("avx2"))))
#if defined(__clang__)
KIND(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#else
KIND(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

/* 2 for AVX-512, 1 for AVX2; FOSSIL_EXPORT_KERNELS=plain or avx2 asks for less (for tests). */
static int kind(void)
{
    static int known = -1;
    if (known < 0) {
        const char *most = getenv("FOSSIL_EXPORT_KERNELS");
        int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        int found = wide ? 2 : __builtin_cpu_supports("avx2") != 0;
        if (most && !strcmp(most, "plain"))
            found = 0;
        if (most && !strcmp(most, "avx2") && found > 1)
            found = 1;
        known = found;
    }
    return known;
}

#define CALL(NAME, ...)                                                                                                \
    do {                                                                                                               \
        if (kind() == 2)                                                                                               \
            NAME##_avx512(__VA_ARGS__);                                                                                \
        else if (kind() == 1)                                                                                          \
            NAME##_avx2(__VA_ARGS__);                                                                                  \
        else                                                                                                           \
            NAME##_plain(__VA_ARGS__);                                                                                 \
    } while (0)
#else
#define CALL(NAME, ...) NAME##_plain(__VA_ARGS__)
#endif

/* Whether `count` bytes are equal. */
EXPORT int32_t fossil_same(const void *one, const void *other, size_t count)
{
    return memcmp(one, other, count) == 0;
}

EXPORT void fossil_compare_tiled(const Rows *stored, const Rows *got, const float *tile, int64_t period, int64_t rank,
                                 int64_t offset, int64_t rows, int64_t width, Found *found)
{
    CALL(tiled, *stored, *got, tile, period, rank, offset, rows, width, found);
}

EXPORT void fossil_compare_rebuilt(const Rows *stored, const Rows *got, const double *exact, const double *bound,
                                   int64_t rows, int64_t width, Found *found)
{
    CALL(rebuilt, *stored, *got, exact, bound, rows, width, found);
}

/* Stops early, with `asked` over `asks`, where too many elements would have to be computed by themselves. */
EXPORT void fossil_compare_multiplied(const Rows *stored, const Rows *got, const Product *product, int64_t rows,
                                      int64_t width, Found *found)
{
    CALL(multiplied, *stored, *got, product, rows, width, found);
}
