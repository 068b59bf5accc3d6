/* Loops over bytes and floats that take one pass here and several in NumPy. NumPy has the same results, bit for bit:
 * no contraction, no other order of sums. Nothing of Python is used, so that one library serves all versions of it. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

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
