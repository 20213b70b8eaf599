/* values <- values + sum over terms of step * z, with z the Rademacher directions of protocol/README.md.
 *
 * One pass over the weights whatever the number of terms: a block of 256 entries is made and added while it is in
 * registers and the nearest cache. Each term is added to the value by itself, in their order: so the bits are those of
 * numpy, and of terms that come in several calls.
 */

#include <stdint.h>
#include <string.h>

#define MAX_TERMS 64 /* perturbation.TERMS_PER_PASS */
#define BLOCK 256    /* entries of one Philox block */
#define LANE 32      /* entries summed in registers at a time */

typedef struct {
    uint64_t key[2];    /* seed; round << 16 | direction */
    uint64_t index;     /* tensor */
    float step;
    uint32_t padding;
} hosl_term;

/* Philox4x64-10, Salmon et al., SC 2011: the block at counter (block + 1, index, stream 0, 0). */
static inline void philox(const hosl_term *term, uint64_t block, uint64_t out[4]) {
    uint64_t c0 = block + 1, c1 = term->index, c2 = 0, c3 = 0, k0 = term->key[0], k1 = term->key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 p0 = (unsigned __int128)0xD2E7470EE14C6C93ULL * c0;
        unsigned __int128 p1 = (unsigned __int128)0xCA5A826395121157ULL * c2;
        uint64_t n0 = (uint64_t)(p1 >> 64) ^ c1 ^ k0, n2 = (uint64_t)(p0 >> 64) ^ c3 ^ k1;
        c1 = (uint64_t)p1;
        c3 = (uint64_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B97F4A7C15ULL;
        k1 += 0xBB67AE8584CAA73BULL;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* A vector of eight lanes; the compiler maps it to what the processor has (AVX2, two of NEON or SSE). */
typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));

/* Entry j of a lane is +1 where bit j of its word is set: the bit goes to the sign's place, inverted. It is compiled
 * for each kind of processor below. */
static inline __attribute__((always_inline)) void add_block(float *values, int64_t count,
                                                            const uint32_t (*bits)[BLOCK / LANE],
                                                            const float *steps, int64_t terms) {
    static const words shift[4] = {
        {31, 30, 29, 28, 27, 26, 25, 24},
        {23, 22, 21, 20, 19, 18, 17, 16},
        {15, 14, 13, 12, 11, 10, 9, 8},
        {7, 6, 5, 4, 3, 2, 1, 0},
    };
    const words sign = {1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31};
    for (int64_t lane = 0; lane * LANE < count; lane++) {
        float tail[LANE], *place = values + lane * LANE;
        int64_t left = count - lane * LANE;
        if (left < LANE) {
            memcpy(tail, place, (size_t)left * sizeof(float));
            memset(tail + left, 0, (size_t)(LANE - left) * sizeof(float));
            place = tail;
        }
        floats sum[4], value;
        for (int part = 0; part < 4; part++) {
            memcpy(&value, place + 8 * part, sizeof value);
            sum[part] = value;
        }
        for (int64_t term = 0; term < terms; term++) {
            float negative = -steps[term];
            uint32_t pattern;
            memcpy(&pattern, &negative, sizeof pattern);
            words word = (words){0} + bits[term][lane], step = (words){0} + pattern;
            for (int part = 0; part < 4; part++) {
                words signed_step = step ^ ((word << shift[part]) & sign);
                sum[part] += (floats)signed_step;
            }
        }
        for (int part = 0; part < 4; part++) {
            value = sum[part];
            memcpy(place + 8 * part, &value, sizeof value);
        }
        if (left < LANE) {
            memcpy(values + lane * LANE, tail, (size_t)left * sizeof(float));
        }
    }
}

/* Sums and differences of entries 1 apart, then 2, 4 and so on, of each row: the order of hadamard in rotation.py. */
static inline __attribute__((always_inline)) void transform_rows(float *values, int64_t rows, int64_t length) {
    for (float *row = values; row < values + rows * length; row += length) {
        int64_t distance = 1;
        for (; distance < 8 && distance < length; distance *= 2) {
            for (int64_t start = 0; start < length; start += 2 * distance) {
                for (int64_t i = start; i < start + distance; i++) {
                    float a = row[i], b = row[i + distance];
                    row[i] = a + b;
                    row[i + distance] = a - b;
                }
            }
        }
        for (; distance < length; distance *= 2) {
            for (int64_t start = 0; start < length; start += 2 * distance) {
                for (int64_t i = start; i < start + distance; i += 8) {
                    floats a, b, sum, difference;
                    memcpy(&a, row + i, sizeof a);
                    memcpy(&b, row + i + distance, sizeof b);
                    sum = a + b;
                    difference = a - b;
                    memcpy(row + i, &sum, sizeof sum);
                    memcpy(row + i + distance, &difference, sizeof difference);
                }
            }
        }
    }
}

typedef void adder(float *values, int64_t count, const uint32_t (*bits)[BLOCK / LANE], const float *steps,
                   int64_t terms);

static void add_anywhere(float *values, int64_t count, const uint32_t (*bits)[BLOCK / LANE], const float *steps,
                         int64_t terms) {
    add_block(values, count, bits, steps, terms);
}

static adder *add = add_anywhere;

typedef void transformer(float *values, int64_t rows, int64_t length);

static void transform_anywhere(float *values, int64_t rows, int64_t length) {
    transform_rows(values, rows, length);
}

static transformer *transform = transform_anywhere;

#if defined(__x86_64__)
#include <cpuid.h>

__attribute__((target("avx2"))) static void add_with_avx2(float *values, int64_t count,
                                                          const uint32_t (*bits)[BLOCK / LANE], const float *steps,
                                                          int64_t terms) {
    add_block(values, count, bits, steps, terms);
}

__attribute__((target("avx2"))) static void transform_with_avx2(float *values, int64_t rows, int64_t length) {
    transform_rows(values, rows, length);
}

/* By hand, since target_clones and __builtin_cpu_supports need a C library and a compiler's runtime that know of it. */
__attribute__((constructor)) static void choose(void) {
    unsigned a, b, c, d, state;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) {
        return;
    }
    __asm__("xgetbv" : "=a"(state), "=d"(d) : "c"(0));
    int saves_registers = (state & 6) == 6;
    if (saves_registers && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2)) {
        add = add_with_avx2;
        transform = transform_with_avx2;
    }
}
#endif

/* `start` is a multiple of 256, `terms` at most 64. */
void hosl_add_terms(float *values, int64_t start, int64_t count, const hosl_term *all, int64_t terms) {
    uint32_t bits[MAX_TERMS][BLOCK / LANE];
    float steps[MAX_TERMS];
    for (int64_t term = 0; term < terms; term++) {
        steps[term] = all[term].step;
    }
    for (int64_t done = 0; done < count; done += BLOCK) {
        for (int64_t term = 0; term < terms; term++) {
            uint64_t block[4];
            philox(&all[term], (uint64_t)((start + done) / BLOCK), block);
            for (int word = 0; word < 4; word++) {
                bits[term][2 * word] = (uint32_t)block[word];
                bits[term][2 * word + 1] = (uint32_t)(block[word] >> 32);
            }
        }
        int64_t left = count - done;
        add(values + done, left < BLOCK ? left : BLOCK, (const uint32_t(*)[BLOCK / LANE]) bits, steps, terms);
    }
}

/* Multiplies each row by the Hadamard matrix of `length`, a power of two of at least 8. */
void hosl_hadamard(float *values, int64_t rows, int64_t length) {
    transform(values, rows, length);
}
