// Products of numbers rounded to bytes with codes of few bits, as they lie in memory.
//
// Codes lie in cells of 16 x 16: of keys, 16 tokens (columns) by 16 channels, and of values, 16
// channels (columns) by 16 tokens, a page's cells next to each other. A cell's inner dimension has
// four steps of four; a byte holds the codes of 8 / bits consecutive steps, so that a shift and a
// mask give a tile row of bytes, which is what the products of 8-bit integers take.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

constexpr int64_t CHUNK = 16;  // units of 64 rounded numbers
#if defined(__AVX512BW__)
constexpr int ACCUMULATORS = 16;
#else
constexpr int ACCUMULATORS = LANES / 2;
#endif

// Where unit `step` of each 16 numbers `run` lies: as the packing instructions leave them, or in
// order.
#if defined(__AVX512BW__)
constexpr int64_t STEP = 4;
QUIRE_INLINE int64_t unit_of(int64_t run) { return (run >> 2) * CHUNK + (run & 3); }
#else
constexpr int64_t STEP = 1;
QUIRE_INLINE int64_t unit_of(int64_t run) { return 4 * run; }
#endif

// Rounded numbers -128 to 127 (SIGNED) or 0 to 255 as bytes.
template <bool SIGNED> QUIRE_INLINE void store_chunk(uint32_t* to, const I (&x)[4]) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_packs_epi32((__m512i)x[0].part[0], (__m512i)x[1].part[0]);
    const __m512i high = _mm512_packs_epi32((__m512i)x[2].part[0], (__m512i)x[3].part[0]);
    _mm512_storeu_si512(
        to, SIGNED ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high));
#else
    uint8_t bytes[4 * WIDTH];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) QUIRE_EACH {
        NativeB part = __builtin_convertvector((NativeU)x[k].part[p] & 0xffu, NativeB);
        std::memcpy(bytes + k * WIDTH + p * LANES, &part, sizeof part);
    }
    std::memcpy(to, bytes, sizeof bytes);
#endif
}

QUIRE_INLINE I shifted(I x, int bits) {
    QUIRE_EACH x.part[p] >>= bits;
    return x;
}

// Numbers rounded for products with codes of BITS: planes of bytes, the higher first.
template <int BITS> struct Rounding {
    static constexpr int PLANES = BITS == 8 ? 2 : 1;
    static constexpr float SIGNED_MOST = PLANES == 2 ? 127 * 256 : 127;
    static constexpr float MOST = PLANES == 2 ? 65535 : 255;

    template <bool SIGNED>
    static QUIRE_INLINE void put(uint32_t* to, int64_t plane, const I (&x)[4]) {
        if constexpr (PLANES == 1) {
            store_chunk<SIGNED>(to, x);
        } else {
            I high[4], low[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                high[k] = shifted(SIGNED ? x[k] + splat_int(128) : x[k], 8);
                QUIRE_EACH low[k].part[p] = x[k].part[p] - (high[k].part[p] << 8);
            }
            store_chunk<SIGNED>(to, high);
            store_chunk<SIGNED>(to + plane, low);
        }
    }
};

// The codes of `step` in a row of a cell; of values (CENTRED) as signed bytes.
template <int BITS, bool CENTRED> QUIRE_INLINE U codes_of(U x, int step) {
    constexpr uint32_t ones = 0x01010101u, mask = ones * ((1u << BITS) - 1);
    QUIRE_EACH {
        if constexpr (BITS < 8) x.part[p] = x.part[p] >> (BITS * step) & mask;
        if constexpr (CENTRED && BITS == 8) x.part[p] ^= ones << 7;
        if constexpr (CENTRED && BITS < 8) {  // code - half, byte by byte
#if defined(__AVX512BW__)
            x.part[p] = (NativeU)_mm512_sub_epi8((__m512i)x.part[p],
                                                 _mm512_set1_epi8(1 << (BITS - 1)));
#else
            constexpr uint32_t half = ones << (BITS - 1), sign = ones << 7;
            x.part[p] = ((x.part[p] | sign) - half) ^ sign;
#endif
        }
    }
    return x;
}

// What is multiplied: column tile c's cell of 16 inner numbers, run o, is at `cells + c * tile + o *
// run`.
struct Cells {
    const uint8_t* cells;
    int64_t tile, run, first, runs;  // runs [first, first + runs) of the inner dimension
    const uint32_t* a;               // [rows, STRIDE] units; codes of keys are u8, `a` of them s8,
                                     // and of values the other way round
    int64_t plane;                   // units from there to the second plane's
    int64_t ahead;  // bytes to what is asked for while these cells are multiplied
};

template <int BITS, bool VALUES, int R, int C, int64_t STRIDE, class Use>
__attribute__((noinline)) void cells_block(const Cells& m, int64_t row, int64_t tile,
                                           const Use& use) {
    I acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = splat_int(0);
    const uint32_t* a = m.a + row * STRIDE;
    for (int plane = 0; plane < Rounding<BITS>::PLANES; ++plane, a += m.plane) {
        if (plane > 0)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) QUIRE_EACH acc[r][c].part[p] <<= 8;
        const uint8_t* at = m.cells + tile * m.tile + m.first * m.run;
        for (int64_t run = m.first; run < m.first + m.runs; ++run, at += m.run) {
            const uint32_t* units = a + unit_of(run);
#pragma GCC unroll 4
            for (int h = 0; h < BITS / 2; ++h) {
                U raw[C];
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    raw[c] = load_units(at + c * m.tile + 64 * h);
                    if (row == 0) __builtin_prefetch(at + c * m.tile + 64 * h + m.ahead, 0, 2);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 8 / BITS; ++j) {
                    U codes[C];
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) codes[c] = codes_of<BITS, VALUES>(raw[c], j);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const U unit = splat_unit(units[r * STRIDE + STEP * (h * 8 / BITS + j)]);
#pragma GCC unroll 4
                        for (int c = 0; c < C; ++c)
                            acc[r][c] = VALUES ? dot_bytes<(BITS < 8)>(acc[r][c], unit, codes[c])
                                               : dot_bytes<(BITS < 8)>(acc[r][c], codes[c], unit);
                    }
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) use(row + r, tile + c, acc[r][c]);
}

template <int BITS, bool VALUES, int R, int C, int64_t STRIDE, class Use>
QUIRE_INLINE void cells_tiles(const Cells& m, int64_t row, int64_t tile, int64_t tiles,
                              const Use& use) {
    for (; tiles >= C; tile += C, tiles -= C)
        cells_block<BITS, VALUES, R, C, STRIDE>(m, row, tile, use);
    if constexpr (C > 1)
        if (tiles > 0) cells_tiles<BITS, VALUES, R, C / 2, STRIDE>(m, row, tile, tiles, use);
}

template <int BITS, bool VALUES, int64_t STRIDE, int R, class Use>
QUIRE_INLINE void cells_rows(const Cells& m, int64_t row, int64_t rows, int64_t tile, int64_t tiles,
                             const Use& use) {
    constexpr int C = ACCUMULATORS / R < 4 ? ACCUMULATORS / R : 4;
    for (; rows >= R; row += R, rows -= R)
        cells_tiles<BITS, VALUES, R, C, STRIDE>(m, row, tile, tiles, use);
    if constexpr (R > 1)
        if (rows > 0) cells_rows<BITS, VALUES, STRIDE, R / 2>(m, row, rows, tile, tiles, use);
}

// Calls use(row, column tile, sums) for rows [0, rows) and column tiles [tile, tile + tiles).
template <int BITS, bool VALUES, int64_t STRIDE, class Use>
QUIRE_INLINE void multiply_cells(const Cells& m, int64_t rows, int64_t tile, int64_t tiles,
                                 const Use& use) {
    constexpr int R = ACCUMULATORS < 8 ? ACCUMULATORS : 8;
    cells_rows<BITS, VALUES, STRIDE, R>(m, 0, rows, tile, tiles, use);
}

}  // namespace quire::QUIRE_ISA
