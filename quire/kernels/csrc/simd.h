// Sixteen-lane vectors over whatever the target has, and the three products that all kernels use.
//
// Compiled once for each instruction set (see CMakeLists.txt): `QUIRE_ISA` names the namespace and
// the compiler's flags decide how many registers a vector takes. A *unit* is 32 bits of a matrix:
// one float, a pair of bfloat16 or four int8, which lie next to each other along the inner
// dimension. Sixteen units make a *tile row* of 64 bytes: one unit for each of 16 columns.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QUIRE_INLINE inline __attribute__((always_inline))

namespace quire::QUIRE_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;   // floats in a register
constexpr int MAX_ROWS = 6, MAX_TILES = 4;  // of a register block of `product`
constexpr int GROUP_ROWS = 4;               // of one for the query heads of a KV head
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int MAX_ROWS = 3, MAX_TILES = 2;
constexpr int GROUP_ROWS = MAX_ROWS;
#else
constexpr int LANES = 4;
constexpr int MAX_ROWS = 2, MAX_TILES = 1;
constexpr int GROUP_ROWS = MAX_ROWS;
#endif
constexpr int WIDTH = 16;
constexpr int PARTS = WIDTH / LANES;

typedef float NativeF __attribute__((vector_size(LANES * 4)));
typedef int32_t NativeI __attribute__((vector_size(LANES * 4)));
typedef uint32_t NativeU __attribute__((vector_size(LANES * 4)));
typedef uint16_t NativeH __attribute__((vector_size(LANES * 2)));
typedef uint8_t NativeB __attribute__((vector_size(LANES)));
typedef int8_t NativeS __attribute__((vector_size(LANES)));

struct F { NativeF part[PARTS]; };
struct I { NativeI part[PARTS]; };
struct U { NativeU part[PARTS]; };

#define QUIRE_EACH _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; ++p)

QUIRE_INLINE F splat(float x) { F r; QUIRE_EACH r.part[p] = x - NativeF{}; return r; }
QUIRE_INLINE I splat_int(int32_t x) { I r; QUIRE_EACH r.part[p] = x - NativeI{}; return r; }
QUIRE_INLINE U splat_unit(uint32_t x) { U r; QUIRE_EACH r.part[p] = x - NativeU{}; return r; }
QUIRE_INLINE F load(const float* at) { F r; std::memcpy(&r, at, sizeof r); return r; }
QUIRE_INLINE U load_units(const void* at) { U r; std::memcpy(&r, at, sizeof r); return r; }
QUIRE_INLINE void store(float* at, F x) { std::memcpy(at, &x, sizeof x); }
QUIRE_INLINE void store(int32_t* at, I x) { std::memcpy(at, &x, sizeof x); }
QUIRE_INLINE I load(const int32_t* at) { I r; std::memcpy(&r, at, sizeof r); return r; }

QUIRE_INLINE F operator+(F a, F b) { F r; QUIRE_EACH r.part[p] = a.part[p] + b.part[p]; return r; }
QUIRE_INLINE F operator-(F a, F b) { F r; QUIRE_EACH r.part[p] = a.part[p] - b.part[p]; return r; }
QUIRE_INLINE F operator*(F a, F b) { F r; QUIRE_EACH r.part[p] = a.part[p] * b.part[p]; return r; }
QUIRE_INLINE F operator/(F a, F b) { F r; QUIRE_EACH r.part[p] = a.part[p] / b.part[p]; return r; }
QUIRE_INLINE F fma(F a, F b, F c) {
    F r; QUIRE_EACH r.part[p] = a.part[p] * b.part[p] + c.part[p]; return r;
}
QUIRE_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
    return {{(NativeF)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0])}};
#else
    F r; QUIRE_EACH r.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p]; return r;
#endif
}
QUIRE_INLINE F min(F a, F b) {
    F r; QUIRE_EACH r.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p]; return r;
}
QUIRE_INLINE F abs(F a) {
    F r; QUIRE_EACH r.part[p] = (NativeF)((NativeU)a.part[p] & 0x7fffffffu); return r;
}
QUIRE_INLINE F to_float(I a) {
    F r; QUIRE_EACH r.part[p] = __builtin_convertvector(a.part[p], NativeF); return r;
}
QUIRE_INLINE I to_int(F a) {  // to the nearest, for numbers below 2^22
    I r;
#if defined(__AVX512F__)
    r.part[0] = (NativeI)_mm512_cvtps_epi32((__m512)a.part[0]);
#else
    // Adding 1.5 * 2^23 rounds to an integer in the low bits.
    QUIRE_EACH r.part[p] = (NativeI)(a.part[p] + 12582912.0f) - 0x4b400000;
#endif
    return r;
}
QUIRE_INLINE I operator+(I a, I b) { I r; QUIRE_EACH r.part[p] = a.part[p] + b.part[p]; return r; }
QUIRE_INLINE I operator-(I a, I b) { I r; QUIRE_EACH r.part[p] = a.part[p] - b.part[p]; return r; }

// Folds the lanes by halves: `both(x, x shifted)` four times.
template <class Both> QUIRE_INLINE float fold(F a, const Both& both) {
#if defined(__AVX512F__)
    __m512 x = (__m512)a.part[0];
    const auto step = [&](__m512 v) { x = (__m512)both((NativeF)x, (NativeF)v); };
    step(_mm512_shuffle_f32x4(x, x, 0x4e));
    step(_mm512_shuffle_f32x4(x, x, 0xb1));
    step(_mm512_permute_ps(x, 0x4e));
    step(_mm512_permute_ps(x, 0xb1));
    return _mm512_cvtss_f32(x);
#else
    NativeF x = a.part[0];
    for (int p = 1; p < PARTS; ++p) x = both(x, a.part[p]);
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) {
            NativeF low = NativeF{} + lanes[i], high = NativeF{} + lanes[i + half];
            lanes[i] = both(low, high)[0];
        }
    return lanes[0];
#endif
}
QUIRE_INLINE float sum(F a) {
    return fold(a, [](NativeF x, NativeF y) { return x + y; });
}
QUIRE_INLINE float max_lane(F a) {
    return fold(a, [](NativeF x, NativeF y) { return x > y ? x : y; });
}

// Folds the lanes of each of eight vectors.
template <class Both> QUIRE_INLINE void fold_rows(const F* x, float* to, const Both& both) {
#if defined(__AVX512F__)
    // Each round halves the vectors, and the lanes that belong to a row.
    const auto fold = [&](__m512 a, __m512 b) { return (__m512)both((NativeF)a, (NativeF)b); };
    __m512 a[4], b[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 u = (__m512)x[i].part[0], v = (__m512)x[i + 4].part[0];
        a[i] = fold(_mm512_shuffle_f32x4(u, v, 0x44), _mm512_shuffle_f32x4(u, v, 0xee));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        b[i] = fold(_mm512_shuffle_f32x4(a[i], a[i + 2], 0x88),
                    _mm512_shuffle_f32x4(a[i], a[i + 2], 0xdd));
    const __m512 c = fold(_mm512_shuffle_ps(b[0], b[1], 0x44), _mm512_shuffle_ps(b[0], b[1], 0xee));
    const __m512 d = fold(c, _mm512_permute_ps(c, 0xb1));
    const __m512i order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, d)));
#else
    for (int r = 0; r < 8; ++r) to[r] = fold(x[r], both);
#endif
}

// `other` in every lane whose bit in `lanes` is 0.
QUIRE_INLINE F only(uint32_t lanes, F x, float other) {
    F r;
#if defined(__AVX512F__)
    r.part[0] = (NativeF)_mm512_mask_mov_ps(_mm512_set1_ps(other), __mmask16(lanes),
                                            (__m512)x.part[0]);
#else
    NativeI bit;
    for (int i = 0; i < LANES; ++i) bit[i] = 1 << i;
    QUIRE_EACH r.part[p] =
        (bit & int32_t(lanes >> p * LANES)) != 0 ? x.part[p] : NativeF{} + other;
#endif
    return r;
}

// bfloat16 is the upper half of a float.
struct bf16 { uint16_t bits; };

QUIRE_INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
}
QUIRE_INLINE float to_float(float x) { return x; }

QUIRE_INLINE bf16 to_bf16(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T> T from_float(float x);
template <> QUIRE_INLINE float from_float<float>(float x) { return x; }
template <> QUIRE_INLINE bf16 from_float<bf16>(float x) { return to_bf16(x); }

QUIRE_INLINE F load(const bf16* at) {
    F r;
#if defined(__AVX512F__)
    __m256i half;
    std::memcpy(&half, at, sizeof half);
    r.part[0] = (NativeF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    QUIRE_EACH {
        NativeH half;
        std::memcpy(&half, at + p * LANES, sizeof half);
        r.part[p] = (NativeF)(__builtin_convertvector(half, NativeU) << 16);
    }
#endif
    return r;
}
QUIRE_INLINE void store(bf16* at, F x) {
#if defined(__AVX512BF16__)
    __m256bh r = _mm512_cvtneps_pbh((__m512)x.part[0]);
    std::memcpy(at, &r, sizeof r);
#else
    QUIRE_EACH {
        NativeU bits = (NativeU)x.part[p];
        NativeU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        NativeU quiet = (bits >> 16) | 0x40;
        NativeH half = __builtin_convertvector(
            (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, NativeH);
        std::memcpy(at + p * LANES, &half, sizeof half);
    }
#endif
}

// One after the other: in bfloat16 one instruction rounds both.
template <class T> QUIRE_INLINE void store(T* at, F low, F high) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high.part[0], (__m512)low.part[0]);
        std::memcpy(at, &both, sizeof both);
        return;
    }
#endif
    store(at, low);
    store(at + WIDTH, high);
}

// The first `count` (1 to 16) lanes only; the others read as zero and are not written.
template <class T> QUIRE_INLINE F load_some(const T* at, int64_t count) {
    if (count >= WIDTH) return load(at);
    T padded[WIDTH] = {};
    std::memcpy(padded, at, count * sizeof(T));
    return load(padded);
}
template <class T> QUIRE_INLINE void store_some(T* at, F x, int64_t count) {
    if (count >= WIDTH) return store(at, x);
    T padded[WIDTH];
    store(padded, x);
    std::memcpy(at, padded, count * sizeof(T));
}

// 2^f for f in [-1/2, 1/2].
template <bool SHORT> QUIRE_INLINE NativeF power_of_fraction(NativeF f) {
    if constexpr (SHORT) {
        NativeF y = 5.500893295e-2f * f + 2.422109693e-1f;
        y = y * f + 6.932829022e-1f;
        return y * f + 1.0f;
    }
    NativeF y = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    return y * f + 1.0f;
}

// 2^x; 0 below 2^-126. Relative error below 2e-7, SHORT: 1.1e-4, a twentieth of a bfloat16's.
template <bool SHORT = false> QUIRE_INLINE F exp2(F x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m512 v = (__m512)x.part[0];
    const __m512 whole = _mm512_roundscale_ps(v, 8);  // to the nearest integer
    const NativeF y = power_of_fraction<SHORT>((NativeF)_mm512_sub_ps(v, whole));
    // The mask keeps -inf, whose fraction is no number, at 0.
    const __mmask16 seen = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return {(NativeF)_mm512_maskz_scalef_ps(seen, (__m512)y, whole)};
#else
    F r;
    QUIRE_EACH {
        NativeF v = x.part[p];
        auto tiny = v < -126.0f;
        v = tiny ? NativeF{} : v;
        v = v > 127.0f ? NativeF{} + 127.0f : v;
        NativeF shifted = v + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
        NativeF y = power_of_fraction<SHORT>(v - (shifted - 12582912.0f));
        y = (NativeF)((NativeU)y + ((NativeU)shifted << 23));
        r.part[p] = tiny ? NativeF{} : y;
    }
    return r;
#endif
}
constexpr float LOG2E = 1.4426950408889634f;

QUIRE_INLINE F exp(F x) { return exp2(x * splat(LOG2E)); }
QUIRE_INLINE F sigmoid(F x) { return splat(1) / (splat(1) + exp(splat(0) - x)); }
QUIRE_INLINE F tanh(F x) {  // 2 sigmoid(2x) - 1, odd, exact enough near 0 for scores and gates
    F a = abs(x);
    F e = exp(splat(-2) * a);
    F t = (splat(1) - e) / (splat(1) + e);
    F r;
    QUIRE_EACH r.part[p] =
        (NativeF)((NativeU)t.part[p] | ((NativeU)x.part[p] & 0x80000000u));
    return r;
}

// Element types of matrices: how a unit is multiplied into a 32-bit accumulator.
struct Float {
    using Chain = Float;
    using Element = float;
    using Acc = F;
    using Out = float;
    static constexpr int PACK = 1;
    static QUIRE_INLINE Acc zero() { return splat(0); }
    static QUIRE_INLINE Acc dot(Acc acc, uint32_t a, U b) {
        float x;
        std::memcpy(&x, &a, 4);
        QUIRE_EACH acc.part[p] = x * (NativeF)b.part[p] + acc.part[p];
        return acc;
    }
};

struct Bf16Chain {  // one rounding for each of the pair's two products, in order
    using Element = bf16;
    using Acc = F;
    using Out = float;
    static constexpr int PACK = 2;
    static QUIRE_INLINE Acc zero() { return splat(0); }
    static QUIRE_INLINE Acc dot(Acc acc, uint32_t a, U b) {
        float low, high;
        uint32_t bits = a << 16;
        std::memcpy(&low, &bits, 4);
        bits = a & 0xffff0000u;
        std::memcpy(&high, &bits, 4);
        QUIRE_EACH {
            acc.part[p] = low * (NativeF)(b.part[p] << 16) + acc.part[p];
            acc.part[p] = high * (NativeF)(b.part[p] & 0xffff0000u) + acc.part[p];
        }
        return acc;
    }
};

struct Bf16 : Bf16Chain {
    using Chain = Bf16Chain;
#if defined(__AVX512BF16__)
    static QUIRE_INLINE Acc dot(Acc acc, uint32_t a, U b) {
        acc.part[0] = (NativeF)_mm512_dpbf16_ps(
            (__m512)acc.part[0], (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b.part[0]);
        return acc;
    }
#endif
};

// acc += the sums of four products of bytes, unsigned times signed, in each lane. SMALL: no sum of two
// neighbouring products exceeds 16 bits.
template <bool SMALL = false> QUIRE_INLINE I dot_bytes(I acc, U a, U b) {
#if defined(__AVX512VNNI__)
    acc.part[0] = (NativeI)_mm512_dpbusd_epi32((__m512i)acc.part[0], (__m512i)a.part[0],
                                               (__m512i)b.part[0]);
#elif defined(__AVX512BW__)
    const __m512i x = (__m512i)a.part[0], y = (__m512i)b.part[0];
    if constexpr (SMALL) {
        acc.part[0] += (NativeI)_mm512_madd_epi16(_mm512_maddubs_epi16(x, y), _mm512_set1_epi16(1));
    } else {  // even and odd bytes apart, so that no 16-bit sum can saturate
        const __m512i even = _mm512_and_si512(x, _mm512_set1_epi16(255));
        const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8);
        acc.part[0] += (NativeI)_mm512_madd_epi16(even, low) +
                       (NativeI)_mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(y, 8));
    }
#elif defined(__AVX2__)
    QUIRE_EACH {
        const __m256i x = (__m256i)a.part[p], y = (__m256i)b.part[p];
        if constexpr (SMALL) {
            acc.part[p] +=
                (NativeI)_mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1));
        } else {
            const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(255));
            const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8);
            acc.part[p] +=
                (NativeI)_mm256_madd_epi16(even, low) +
                (NativeI)_mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
        }
    }
#elif defined(__SSE2__)
    QUIRE_EACH {
        const __m128i x = (__m128i)a.part[p], y = (__m128i)b.part[p];
        const __m128i even = _mm_and_si128(x, _mm_set1_epi16(255));
        const __m128i low = _mm_srai_epi16(_mm_slli_epi16(y, 8), 8);
        acc.part[p] += (NativeI)_mm_madd_epi16(even, low) +
                       (NativeI)_mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(y, 8));
    }
#else
    QUIRE_EACH {
        const NativeI x = (NativeI)a.part[p], y = (NativeI)b.part[p];
        acc.part[p] += (x & 255) * ((y << 24) >> 24) + (x >> 8 & 255) * ((y << 16) >> 24) +
                       (x >> 16 & 255) * ((y << 8) >> 24) + (x >> 24 & 255) * (y >> 24);
    }
#endif
    return acc;
}

struct Int8 {  // unsigned rows times signed columns
    using Element = int8_t;
    using Acc = I;
    using Out = int32_t;
    static constexpr int PACK = 4;
    static QUIRE_INLINE Acc zero() { return splat_int(0); }
    static QUIRE_INLINE Acc dot(Acc acc, uint32_t a, U b) {
        return dot_bytes(acc, splat_unit(a), b);
    }
};

// Columns of a tile that lie in two places, eight in each.
struct HalfRows {
    const uint32_t *low, *high;
};
// Rows that ask for the memory of others, which are multiplied later: a line for each that is read,
// so that no more are under way than the processor can wait for.
struct AskingRows {
    const uint32_t *at, *next;
};
struct AskingHalfRows {
    HalfRows at, next;
};
QUIRE_INLINE U tile_row(const uint32_t* at, int64_t offset) { return load_units(at + offset); }
QUIRE_INLINE U tile_row(HalfRows at, int64_t offset) {
    U r;
#if defined(__AVX512F__)
    __m256i low, high;
    std::memcpy(&low, at.low + offset, sizeof low);
    std::memcpy(&high, at.high + offset, sizeof high);
    r.part[0] = (NativeU)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    std::memcpy(&r, at.low + offset, sizeof r / 2);
    std::memcpy(reinterpret_cast<char*>(&r) + sizeof r / 2, at.high + offset, sizeof r / 2);
#endif
    return r;
}
QUIRE_INLINE U tile_row(AskingRows rows, int64_t offset) {
    __builtin_prefetch(rows.next + offset, 0, 2);
    return tile_row(rows.at, offset);
}
QUIRE_INLINE U tile_row(AskingHalfRows rows, int64_t offset) {
    __builtin_prefetch(rows.next.low + offset, 0, 2);
    __builtin_prefetch(rows.next.high + offset, 0, 2);
    return tile_row(rows.at, offset);
}

// out[rows, tiles * 16] (+)= a[rows, runs * steps units] * b, for any number of rows and tiles.
//
// `a` has `a_stride` units between rows. The inner dimension consists of runs of `steps` units; step
// s of run o of column tile c lies at `b(c, o) + s * step_stride`. It runs from first to last in one
// chain for each result, so a row's numbers do not depend on which rows are computed beside it.
template <class E, int R, int C, class B>
__attribute__((noinline)) void product_block(
    typename E::Out* out, int64_t out_stride, const uint32_t* a, int64_t a_stride, int64_t tile,
    const B& b, int64_t runs, int64_t steps, int64_t step_stride, bool accumulate) {
    typename E::Acc acc[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
            acc[r][c] = accumulate ? load(out + r * out_stride + c * WIDTH) : E::zero();
    for (int64_t run = 0; run < runs; ++run, a += steps) {
        decltype(b(tile, run)) at[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) at[c] = b(tile + c, run);
        for (int64_t s = 0; s < steps; ++s) {
            U units[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) units[c] = tile_row(at[c], s * step_stride);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const uint32_t unit = a[r * a_stride + s];
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) acc[r][c] = E::dot(acc[r][c], unit, units[c]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(out + r * out_stride + c * WIDTH, acc[r][c]);
}

template <class E, int C, int R, class... Args>
QUIRE_INLINE void product_rows(int64_t rows, const Args&... args) {
    if constexpr (R > 1) {
        if (rows < R) return product_rows<E, C, R - 1>(rows, args...);
    }
    product_block<E, R, C>(args...);
}

template <class E, int C, int R, class... Args>
QUIRE_INLINE void product_tiles(int64_t tiles, int64_t rows, typename E::Out* out,
                                int64_t out_stride, const uint32_t* a, int64_t a_stride,
                                const Args&... args) {
    if constexpr (C > 1) {
        if (tiles < C)
            return product_tiles<E, C - 1, R>(tiles, rows, out, out_stride, a, a_stride, args...);
    }
    for (int64_t r = 0; r < rows; r += R)
        product_rows<E, C, R>(rows - r, out + r * out_stride, out_stride, a + r * a_stride,
                              a_stride, args...);
}

// At most `R` rows are multiplied at once.
template <class E, int R = MAX_ROWS, class B>
void product(typename E::Out* out, int64_t out_stride, const void* a, int64_t a_stride, const B& b,
             int64_t rows, int64_t tiles, int64_t runs, int64_t steps, int64_t step_stride,
             bool accumulate) {
    for (int64_t c = 0; c < tiles; c += MAX_TILES)
        product_tiles<E, MAX_TILES, R>(tiles - c, rows, out + c * WIDTH, out_stride,
                                       static_cast<const uint32_t*>(a), a_stride, c, b, runs,
                                       steps, step_stride, accumulate);
}

// The same for the query heads of one KV head, of which there are often 4 or 8. Two passes of 4 rows
// over `b` wait less for memory than one of 6 and one of 2.
template <class E, class... Args>
void product_of_group(typename E::Out* out, int64_t out_stride, const void* a, int64_t a_stride,
                      const Args&... args) {
    product<E, GROUP_ROWS>(out, out_stride, a, a_stride, args...);
}

}  // namespace quire::QUIRE_ISA
