/* What `verify` asks of stored rows, in one pass: how far each element is from the exact result, in steps of its dtype.
 *
 * Everything is float64, and NumPy has the same results, bit for bit, but for sums of products, which it takes in
 * another order. Nothing here is shared with kernels.c: what merged the weights must not be what checks them. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
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

INLINE int32_t float_bits(float value)
{
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Subnormal numbers too become what they are; infinities and NaN keep their bits. */
INLINE float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, size = bits & 0x7fff;
    uint32_t finite = (uint32_t)float_bits(as_float(size << 13) * 0x1p112f);
    return as_float(sign | (size >= 0x7c00 ? 0x7f800000 | size << 13 : finite));
}

typedef void Narrow(float *values, Rows rows, size_t row, size_t column, size_t count);
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
        for (size_t at = 0; at < count; at++)
            values[at] = half(own[at]);
    } else {
        const float *own = (const float *)data + column;
        for (size_t at = 0; at < count; at++)
            values[at] = own[at];
    }
}

/* The same in float32, which holds all three dtypes. */
INLINE void narrowed(float *values, Rows rows, size_t row, size_t column, size_t count)
{
    const uint8_t *data = rows.data + row * rows.stride;
    if (rows.dtype == BF16) {
        const uint16_t *own = (const uint16_t *)data + column;
        for (size_t at = 0; at < count; at++)
            values[at] = as_float((uint32_t)own[at] << 16);
    } else if (rows.dtype == F16) {
        const uint16_t *own = (const uint16_t *)data + column;
        for (size_t at = 0; at < count; at++)
            values[at] = half(own[at]);
    } else
        memcpy(values, data + 4 * column, 4 * count);
}

/* What a dtype's steps are measured with: its smallest normal number, and what an exponent is taken from for one over
 * the step. */
typedef struct {
    double least;
    int64_t top;
} Steps;

INLINE Steps steps_of(int64_t dtype)
{
    int64_t mantissa = dtype == BF16 ? 8 : dtype == F16 ? 11 : 24;
    Steps found = {dtype == F16 ? 0x1p-14 : 0x1p-126, (2046 + mantissa - 1) << 52};
    return found;
}

/* |difference| in steps at `exact`, on the side of it where `got` lies: below a power of two they are half as long. The
 * steps are powers of two: nothing is rounded. Not finite where one of the two is not. */
INLINE double in_steps(double difference, double exact, double got, Steps steps)
{
    double size = fabs(exact), other = fabs(got), smaller = other < size ? other : size, half = size * 0.5;
    double least = half > steps.least ? half : steps.least, at = smaller > least ? smaller : least;
    return fabs(difference) * as_double(steps.top - (bits_of(at) & 0x7ff0000000000000));
}

/* No less than |difference| in steps of 16 bits, but for rounding, at anything that float32 takes for `exact`: in
 * those of the smaller one of it and `got`. NaN where it cannot tell. `scale` is 2^(bits - 1). */
INLINE float about_in_steps(float difference, float exact, float got, int32_t least, float scale)
{
    const int32_t infinite = 0x7f800000, highest = 254 << 23;
    int32_t size = float_bits(exact) & 0x7fffffff, other = float_bits(got) & 0x7fffffff;
    int32_t smaller = size - 1 < other ? size - 1 : other, used = (smaller < least ? least : smaller) & infinite;
    float error = fabsf(difference) * scale * as_float((uint32_t)(highest - used));
    return size >= highest ? (float)NAN : error;
}

INLINE int32_t larger_of(int32_t one, int32_t other)
{
    return one > other ? one : other;
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

/* Tile: W[o, j] + D[o mod m, j mod r], and 0 for D if there is none (a cast).
 *
 * Where 16 bits are stored, float32 tells most elements to be nearer than the furthest one so far. */
INLINE void tiled(Rows stored, Rows got, const float *tile, size_t period, size_t rank, size_t offset, size_t rows,
                  size_t width, Found *found, Widen widen, Narrow narrow)
{
    float repeated[TILE], about[TILE], seen[TILE];
    double weight[TILE], there[TILE], exact[TILE];
    const Steps steps = steps_of(got.dtype);
    const int is_narrow = got.dtype != F32;
    const int32_t least = got.dtype == F16 ? (127 - 14) << 23 : 1 << 23;
    const float scale = got.dtype == F16 ? 0x1p10f : 0x1p7f;
    /* The sum is rounded, by half of the last of 24 bits, and so is the difference. */
    const double rounding = (double)scale * 0x1p-22;
    /* A short row of D lies here as often as it fits; a long one is taken in parts. */
    const int is_short = rank <= TILE;
    size_t step = is_short ? TILE / rank * rank : TILE;
    for (size_t row = 0; row < rows; row++) {
        const float *own = tile + (offset + row) % period * rank;
        const int is_sampled = (found->phase + row) % found->sampled == 0;
        for (size_t at = 0; is_short && at < step; at++)
            repeated[at] = at < rank ? own[at] : repeated[at - rank];
        size_t in_tile = 0;
        for (size_t column = 0, count; column < width; column += count) {
            count = width - column < step ? width - column : step;
            const float *added = repeated;
            if (!is_short) {
                count = count > rank - in_tile ? rank - in_tile : count;
                added = own + in_tile;
                in_tile = in_tile + count >= rank ? 0 : in_tile + count;
            }
            if (is_narrow && !is_sampled) {
                int32_t most = 0;
                narrow(about, stored, row, column, count);
                narrow(seen, got, row, column, count);
                for (size_t at = 0; at < count; at++) {
                    float sum = about[at] + added[at];
                    most = larger_of(most, float_bits(about_in_steps(seen[at] - sum, sum, seen[at], least, scale)));
                }
                if ((double)as_float((uint32_t)most) + rounding <= as_double(found->worst))
                    continue;
            }
            int64_t worst = 0;
            widen(weight, stored, row, column, count);
            widen(there, got, row, column, count);
            for (size_t at = 0; at < count; at++)
                exact[at] = weight[at] + added[at];
            for (size_t at = 0; at < count; at++)
                worst = larger(worst, bits_of(in_steps(there[at] - exact[at], exact[at], there[at], steps)));
            found->worst = larger(found->worst, worst);
            if (is_sampled)
                sum_up(found, column, weight, there, exact, count);
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
                    double error = in_steps(there[at] - wanted[at], wanted[at], there[at], steps);
                    double may = in_steps(bound[row * width + column + at], wanted[at], there[at], steps);
                    worst = larger(worst, bits_of(fabs(counted(error, may))));
                }
            else
                for (size_t at = 0; at < count; at++)
                    worst = larger(worst, bits_of(in_steps(there[at] - wanted[at], wanted[at], there[at], steps)));
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
    const float *left_sizes, *right_sizes; /* per row of left and block of columns; per row of right */
    const double *exact;
    int64_t rank, period, block, left_stride, left_blocks;
    int64_t first; /* the row's number in its block that these begin with */
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
        double more = product->plus[(product->first + row) % period * period + column % period];
        sum = weight + sum + more;
        sizes += fabs(weight) + fabs(more);
    } else
        sum += weight;
    *bound = sizes * ((double)(rank + 2) * 0x1p-24);
    return sum;
}

INLINE void multiplied(Rows stored, Rows got, const Product *product, size_t rows, size_t width, Found *found,
                       Widen widen, Narrow narrow)
{
    float about[TILE], seen[TILE];
    double weight[TILE], there[TILE], exact[TILE];
    int64_t upper[TILE];
    const int is_narrow = got.dtype != F32 && product->near;
    const int32_t least_bits = got.dtype == F16 ? (127 - 14) << 23 : 1 << 23;
    const float narrow_scale = got.dtype == F16 ? 0x1p10f : 0x1p7f, times = (float)product->scale;
    const Steps steps = steps_of(got.dtype);
    const int64_t nothing = bits_of(0x1p-10); /* an error that is not looked at: of a module that was not trained */
    const size_t period = product->period, rank = product->rank;
    const double scale = product->scale;
    const double unit = (double)(rank + 2) * (product->near ? 0x1p-24 : 0x1p-53) * (1 + 0x1p-6) * fabs(scale);
    /* Products that float32 cannot hold are lost whole. */
    const double lost = product->near ? (double)rank * 0x1p-148 * fabs(scale) : 0.0;
    for (size_t row = 0; row < rows; row++) {
        const float *plus = product->plus ? product->plus + (product->first + row) % period * period : 0;
        const int is_sampled = (found->phase + row) % found->sampled == 0;
        for (size_t column = 0; column < width;) {
            size_t inside = column % period, count = width - column < TILE ? width - column : TILE;
            if (count > period - inside)
                count = period - inside;
            const float *sizes = product->right_sizes + inside;
            const double size = product->left_sizes[row * product->left_blocks + column / period] * unit;
            const float *near = product->near + row * width + column;
            /* Of a row of zeros nothing is lost. */
            const double missing = size == 0.0 ? 0.0 : lost;
            if (is_narrow && !is_sampled) {
                const float length = (float)size * (1 + 0x1p-20f);
                const float far = size == 0.0 ? 0x1p-149f : (float)lost + 0x1p-126f;
                int32_t most = 0;
                narrow(about, stored, row, column, count);
                narrow(seen, got, row, column, count);
                for (size_t at = 0; at < count; at++) {
                    float change = times * near[at], more = plus ? plus[inside + at] : 0.0f;
                    float sum = about[at] + change + more;
                    /* All that is rounded here, each by half of the last of 24 bits or less. */
                    float terms = fabsf(about[at]) + fabsf(change) + fabsf(more) + fabsf(sum);
                    float bound = length * sizes[at] + terms * 0x1p-23f + far;
                    float least = as_float((uint32_t)larger_of(float_bits(fabsf(sum) - bound), 0));
                    float off = fabsf(seen[at] - sum) + bound;
                    float error = about_in_steps(off, least, seen[at], least_bits, narrow_scale);
                    most = larger_of(most, float_bits(sum - sum == 0 ? error : (float)NAN));
                }
                if ((double)as_float((uint32_t)most) * (1 + 0x1p-20) <= as_double(larger(found->worst, nothing))) {
                    column += count;
                    continue;
                }
            }
            int64_t most = 0;
            widen(weight, stored, row, column, count);
            widen(there, got, row, column, count);
            if (product->near) {
                for (size_t at = 0; at < count; at++)
                    exact[at] = weight[at] + scale * (double)near[at];
            } else {
                const double *product_at = product->exact + row * width + column;
                for (size_t at = 0; at < count; at++)
                    exact[at] = weight[at] + scale * product_at[at];
            }
            if (plus)
                for (size_t at = 0; at < count; at++)
                    exact[at] += plus[inside + at];
            for (size_t at = 0; at < count; at++) {
                double bound = size * sizes[at] + missing + (fabs(exact[at]) + fabs(weight[at])) * 0x1p-50;
                /* No more than 0 has no exponent. */
                double least = as_double(larger(bits_of(fabs(exact[at]) - bound), 0));
                upper[at] = bits_of(in_steps(fabs(there[at] - exact[at]) + bound, least, there[at], steps));
                most = larger(most, upper[at]);
            }
            if (most > larger(found->worst, nothing)) {
                size_t furthest = 0;
                while (upper[furthest] != most)
                    furthest++;
                for (size_t turn = 0; turn <= count; turn++) {
                    /* The one that may be furthest first: it tells which others can be left out. */
                    size_t at = turn ? turn - 1 : furthest;
                    if (upper[at] <= larger(found->worst, nothing) || (turn && at == furthest))
                        continue;
                    if (++found->asked > product->asks)
                        return;
                    double may, wanted = exactly(product, weight[at], row, column + at, &may);
                    double error = in_steps(there[at] - wanted, wanted, there[at], steps);
                    error = fabs(counted(error, in_steps(may, wanted, there[at], steps)));
                    found->worst = larger(found->worst, bits_of(error));
                }
            }
            if (is_sampled)
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
    TARGET static void narrow_##NAME(float *values, Rows rows, size_t row, size_t column, size_t count)                \
    {                                                                                                                  \
        narrowed(values, rows, row, column, count);                                                                    \
    }                                                                                                                  \
    TARGET static void tiled_##NAME(Rows stored, Rows got, const float *tile, size_t period, size_t rank,              \
                                    size_t offset, size_t rows, size_t width, Found *found)                            \
    {                                                                                                                  \
        tiled(stored, got, tile, period, rank, offset, rows, width, found, widen_##NAME, narrow_##NAME);               \
    }                                                                                                                  \
    TARGET static void rebuilt_##NAME(Rows stored, Rows got, const double *exact, const double *bound, size_t rows,    \
                                      size_t width, Found *found)                                                      \
    {                                                                                                                  \
        rebuilt(stored, got, exact, bound, rows, width, found, widen_##NAME);                                          \
    }                                                                                                                  \
    TARGET static void multiplied_##NAME(Rows stored, Rows got, const Product *product, size_t rows, size_t width,     \
                                         Found *found)                                                                 \
    {                                                                                                                  \
        multiplied(stored, got, product, rows, width, found, widen_##NAME, narrow_##NAME);                             \
    }

KIND(plain, )
#if defined(__x86_64__)
KIND(avx2, __attribute__((target("avx2"))))
#if defined(__clang__)
KIND(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#else
KIND(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

static int most = 2, known = -1;

/* Use no more than AVX2 (1), or nothing of the kind (0): for tests. */
EXPORT void fossil_compare_at_most(int32_t kind)
{
    most = kind;
    known = -1;
}

/* 2 for AVX-512, 1 for AVX2. */
static int kind(void)
{
    if (known < 0) {
        int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        int found = wide ? 2 : __builtin_cpu_supports("avx2") != 0;
        known = found < most ? found : most;
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

EXPORT void fossil_compare_at_most(int32_t kind)
{
    (void)kind;
}
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
