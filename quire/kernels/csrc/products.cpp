// Products with packed weights: dense, int8 with int8 activations, and grouped low-bit weights.
//
// A weight [outs, ins] is packed into tiles of 16 outputs: [outs / 16, steps, 16] units (simd.h).
// Work is cut into panels of columns and blocks of rows; a block's results collect in float (or
// int32) beside the caches and pass through one epilogue: scale, bias, residual, rounding.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t PANEL = 4;          // tiles
constexpr int64_t MOST_ROWS = 96;     // of a block; a multiple of every MAX_ROWS
constexpr int64_t INNER_BYTES = 2048;  // of a row, multiplied at once, so that a panel stays in L2
constexpr int64_t EXPANDED_ROWS = 2 * MOST_ROWS;  // that share an expanded slice of SLICE inputs
constexpr int64_t SLICE = 256;
constexpr int64_t FEW = 8;             // rows, at most, that wait for memory
constexpr int64_t ROUNDED_ROWS = 32;   // at most, that are rounded so that codes multiply
constexpr int64_t BLOCK = 32;          // inputs of a row that are rounded together

// out[row, 16 columns] = value + bias + add.
template <class T>
QUIRE_INLINE void finish_tile(const ProductArgs& args, int64_t row, int64_t column, F value) {
    const int64_t count = args.outs - column;
    if (args.bias) value = value + load_some(static_cast<const T*>(args.bias) + column, count);
    const int64_t at = row * args.outs + column;
    if (args.add) value = value + load_some(static_cast<const T*>(args.add) + at, count);
    store_some(static_cast<T*>(args.out) + at, value, count);
}

// Calls body(first row, rows, first tile, tiles) for blocks that cover the result.
template <class Body>
void each_block(const ProductArgs& args, int64_t most_rows, const Body& body) {
    if (args.rows == 0) return;
    const int64_t tiles = (args.outs + WIDTH - 1) / WIDTH;
    // Few rows wait for memory, which is faster where a thread reads one panel after the other.
    if (args.rows <= FEW)
        return parallel_ranges(tiles, 1, [&](int64_t tile, int64_t last) {
            for (; tile < last; tile += PANEL) body(0, args.rows, tile, std::min(PANEL, last - tile));
        });
    const int64_t panels = (tiles + PANEL - 1) / PANEL;
    const int64_t blocks = (args.rows + most_rows - 1) / most_rows;
    const int64_t rows = (args.rows + blocks - 1) / blocks;
    parallel_tasks(panels * blocks, [&](int64_t i) {
        const int64_t row = i % blocks * rows, tile = i / blocks * PANEL;
        if (row < args.rows)
            body(row, std::min(rows, args.rows - row), tile, std::min(PANEL, tiles - tile));
    });
}

template <class E>
void multiply(typename E::Out* out, const void* x, int64_t x_units, const uint32_t* weight,
              int64_t steps, int64_t rows, int64_t tiles) {
    constexpr int64_t inner = INNER_BYTES / 4;
    for (int64_t step = 0; step < steps; step += inner)
        product<E>(
            out, PANEL * WIDTH, static_cast<const uint32_t*>(x) + step, x_units,
            [=](int64_t tile, int64_t) { return weight + (tile * steps + step) * WIDTH; }, rows,
            tiles, 1, std::min(inner, steps - step), WIDTH, step > 0);
}

template <class E> void dense_with(const ProductArgs& args) {
    using T = typename E::Element;
    const int64_t steps = args.ins / E::PACK;
    each_block(args, MOST_ROWS, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        alignas(64) thread_local float sums[MOST_ROWS * PANEL * WIDTH];
        multiply<E>(sums, static_cast<const T*>(args.x) + row * args.x_stride,
                    args.x_stride / E::PACK,
                    static_cast<const uint32_t*>(args.weight) + tile * steps * WIDTH, steps, rows,
                    tiles);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < tiles; ++c)
                finish_tile<T>(args, row + r, (tile + c) * WIDTH,
                               load(sums + (r * PANEL + c) * WIDTH));
    });
}

// Rounds each row to 255 levels around 128: x = scale * (level - 128).
template <class T>
void quantise_rows(const ProductArgs& args, uint8_t* levels, float* scales) {
    parallel_ranges(args.rows, 1 + 16384 / args.ins, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
            F most = splat(0);
            for (int64_t i = 0; i < args.ins; i += WIDTH)
                most = max(most, abs(load_some(x + i, args.ins - i)));
            const float scale = max_lane(most) / 127;
            const F inverse = splat(scale > 0 ? 1 / scale : 0);
            scales[row] = scale;
            uint8_t* to = levels + row * args.ins;
            for (int64_t i = 0; i < args.ins; i += WIDTH) {
                // Adding 1.5 * 2^23 rounds to an integer, ties to even, in the low bits.
                F v = load_some(x + i, args.ins - i) * inverse + splat(12582912.0f + 128);
                uint8_t bytes[WIDTH];
                QUIRE_EACH {
                    NativeB part = __builtin_convertvector((NativeU)v.part[p] & 0xffu, NativeB);
                    std::memcpy(bytes + p * LANES, &part, sizeof part);
                }
                std::memcpy(to + i, bytes, std::min<int64_t>(WIDTH, args.ins - i));
            }
        }
    });
}

template <class T> void int8_with(const ProductArgs& args) {
    thread_local std::vector<uint8_t> levels_of;
    thread_local std::vector<float> scales_of;
    levels_of.resize(args.rows * args.ins);
    scales_of.resize(args.rows);
    uint8_t* levels = levels_of.data();
    float* scales = scales_of.data();
    quantise_rows<T>(args, levels, scales);
    const int64_t steps = args.ins / Int8::PACK;
    each_block(args, MOST_ROWS, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        alignas(64) thread_local int32_t sums[MOST_ROWS * PANEL * WIDTH];
        multiply<Int8>(sums, levels + row * args.ins, steps,
                       static_cast<const uint32_t*>(args.weight) + tile * steps * WIDTH, steps,
                       rows, tiles);
        for (int64_t c = 0; c < tiles; ++c) {
            const int64_t column = (tile + c) * WIDTH;
            const F scale = load(args.scales + column);
            I shift = load(args.sums + column);
            QUIRE_EACH shift.part[p] *= 128;
            for (int64_t r = 0; r < rows; ++r) {
                const F value = to_float(load(sums + (r * PANEL + c) * WIDTH) - shift);
                finish_tile<T>(args, row + r, column, value * scale * splat(scales[row + r]));
            }
        }
    });
}

// --- grouped ---------------------------------------------------------------------------------

// 4-bit codes: unit s of a column holds input 8s + j in the lower half of byte j and 8s + 4 + j in
// the upper one, so that a mask gives four codes. 8-bit codes: input 4s + j in byte j.
QUIRE_INLINE U shifted(U x, int bits) {
    QUIRE_EACH x.part[p] >>= bits;
    return x;
}
QUIRE_INLINE I masked(U x, uint32_t mask) {
    I r;
    QUIRE_EACH r.part[p] = (NativeI)(x.part[p] & mask);
    return r;
}
QUIRE_INLINE U nibbles(U x) {
    QUIRE_EACH x.part[p] &= 0x0f0f0f0fu;
    return x;
}
// Two floats of each lane as one bfloat16 unit, to the nearest, ties upwards.
QUIRE_INLINE U pair_of(F low, F high) {
    U r;
    QUIRE_EACH {
        NativeU a = ((NativeU)low.part[p] + 0x8000) >> 16;
        r.part[p] = (((NativeU)high.part[p] + 0x8000) & 0xffff0000u) | a;
    }
    return r;
}
// The weights of one tile for inputs [first, last) of the packed matrix, as units of E. Both ends
// are multiples of a unit's inputs.
template <class E, int BITS>
void expand_tile(const ProductArgs& args, int64_t tile, int64_t first, int64_t last, uint32_t* to) {
    constexpr int64_t per_unit = 32 / BITS;
    constexpr uint32_t mask = (1u << BITS) - 1;
    const int64_t groups = args.ins / args.group;
    const uint32_t* codes =
        static_cast<const uint32_t*>(args.weight) + tile * args.ins / per_unit * WIDTH;
    const F centre = splat(-float(1 << (BITS - 1)));
    for (int64_t in = first; in < last;) {
        const int64_t group = in / args.group, at = (tile * groups + group) * WIDTH;
        const int64_t end = std::min(last, (group + 1) * args.group);
        const F scale = load(args.scales + at);
        const F offset = fma(centre, scale, args.offsets ? load(args.offsets + at) : splat(0));
        for (; in < end; in += per_unit) {
            const U unit = load_units(codes + in / per_unit * WIDTH);
#pragma GCC unroll 4
            for (int j = 0; j < per_unit / 2; ++j, to += 2 / E::PACK * WIDTH) {
                const int place = 16 * (j % 2) + 4 * (j / 2);
                const U low_codes = shifted(unit, place), high_codes = shifted(unit, place + 8);
                const F low = fma(to_float(masked(low_codes, mask)), scale, offset);
                const F high = fma(to_float(masked(high_codes, mask)), scale, offset);
                if constexpr (E::PACK == 2) {
                    const U both = pair_of(low, high);
                    std::memcpy(to, &both, sizeof both);
                } else {
                    store(reinterpret_cast<float*>(to), low);
                    store(reinterpret_cast<float*>(to) + WIDTH, high);
                }
            }
        }
    }
}

// Many rows: a slice of the panel is expanded once and multiplied with all rows of the block.
template <class E> void grouped_many(const ProductArgs& args) {
    using T = typename E::Element;
    each_block(args, EXPANDED_ROWS, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        alignas(64) thread_local float sums[EXPANDED_ROWS * PANEL * WIDTH];
        alignas(64) thread_local uint32_t weights[PANEL * SLICE * WIDTH];
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        for (int64_t in = 0; in < args.ins; in += SLICE) {
            const int64_t last = std::min(in + SLICE, args.ins), steps = (last - in) / E::PACK;
            for (int64_t c = 0; c < tiles; ++c)
                args.bits == 4
                    ? expand_tile<E, 4>(args, tile + c, in, last, weights + c * SLICE * WIDTH)
                    : expand_tile<E, 8>(args, tile + c, in, last, weights + c * SLICE * WIDTH);
            const uint32_t* slice = weights;
            product<E>(
                sums, PANEL * WIDTH, x + in, args.x_stride / E::PACK,
                [=](int64_t c, int64_t) { return slice + c * SLICE * WIDTH; }, rows, tiles, 1, steps,
                WIDTH, in > 0);
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < tiles; ++c)
                finish_tile<T>(args, row + r, (tile + c) * WIDTH,
                               load(sums + (r * PANEL + c) * WIDTH));
    });
}

// Rows in blocks of BLOCK inputs: x = scale * level, with levels of -127 to 127.
struct Rounded {
    const uint32_t* levels;  // [rows, ins / 4] four signed bytes each
    const float* scales;     // [rows, ins / BLOCK]
    const int32_t* sums;     // of a block's levels
    const float* totals;     // of a block's inputs, unrounded
};

void round_blocks(const ProductArgs& args, int8_t* levels, float* scales, int32_t* sums,
                  float* totals) {
    const int64_t blocks = args.ins / BLOCK;
    parallel_ranges(args.rows * blocks, 512, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
            const bf16* x = static_cast<const bf16*>(args.x) + at / blocks * args.x_stride +
                            at % blocks * BLOCK;
            const F low = load(x), high = load(x + WIDTH);
            const float scale = max_lane(max(abs(low), abs(high))) / 127;
            const F inverse = splat(scale > 0 ? 1 / scale : 0);
            const I a = to_int(low * inverse), b = to_int(high * inverse);
            scales[at] = scale;
            sums[at] = int32_t(sum(to_float(a + b)));
            totals[at] = sum(low + high);
            QUIRE_EACH {
                const NativeS part[] = {__builtin_convertvector(a.part[p], NativeS),
                                        __builtin_convertvector(b.part[p], NativeS)};
                for (int64_t half = 0; half < 2; ++half)
                    std::memcpy(levels + at * BLOCK + half * WIDTH + p * LANES, &part[half], LANES);
            }
        }
    });
}

// R rows and C tiles. Codes multiply as integers; each block's sum is scaled once.
template <int R, int C, int BITS>
QUIRE_INLINE void coded_rows(const ProductArgs& args, const Rounded& x, int64_t row, int64_t tile) {
    constexpr int64_t steps = BLOCK * BITS / 32;
    constexpr int halves = 8 / BITS;  // codes in a byte
    const int64_t blocks = args.ins / BLOCK, groups = args.ins / args.group;
    const int64_t tile_units = args.ins * BITS / 32 * WIDTH;
    const uint32_t* codes = static_cast<const uint32_t*>(args.weight) + tile * tile_units;
    const uint32_t* levels = x.levels + row * args.ins / 4;
    F out[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) out[r][c] = splat(0);
    for (int64_t g = 0, block = 0; g < groups; ++g) {
        const int64_t end = block + args.group / BLOCK;
        for (; block < end; ++block) {
            I acc[R][C];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c)
                    acc[r][c] =
                        splat_int(-(1 << (BITS - 1)) * x.sums[(row + r) * blocks + block]);
#pragma GCC unroll 8
            for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    const U unit =
                        load_units(codes + c * tile_units + (block * steps + s) * WIDTH);
#pragma GCC unroll 2
                    for (int half = 0; half < halves; ++half) {
                        const U four = BITS == 4 ? nibbles(shifted(unit, 4 * half)) : unit;
                        const int64_t at = (block * steps + s) * halves + half;
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r)
                            acc[r][c] = dot_bytes<BITS == 4>(
                                acc[r][c], four, splat_unit(levels[r * args.ins / 4 + at]));
                    }
                }
            }
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                const int64_t at = ((tile + c) * groups + g) * WIDTH;
                const F scale = load(args.scales + at);
                const F offset = args.offsets ? load(args.offsets + at) : splat(0);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const int64_t of = (row + r) * blocks + block;
                    out[r][c] = fma(scale * splat(x.scales[of]), to_float(acc[r][c]), out[r][c]);
                    if (args.offsets) out[r][c] = fma(offset, splat(x.totals[of]), out[r][c]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            finish_tile<bf16>(args, row + r, (tile + c) * WIDTH, out[r][c]);
}

template <int C, int BITS>
void coded_tiles(const ProductArgs& args, const Rounded& x, int64_t tile) {
    for (int64_t row = 0; row < args.rows; row += 4) {
        switch (args.rows - row) {
            case 1: coded_rows<1, C, BITS>(args, x, row, tile); break;
            case 2: coded_rows<2, C, BITS>(args, x, row, tile); break;
            case 3: coded_rows<3, C, BITS>(args, x, row, tile); break;
            default: coded_rows<4, C, BITS>(args, x, row, tile);
        }
    }
}

// Few rows: they are rounded to bytes, so that codes multiply as they are. Every block of the result
// has all rows.
template <int BITS> void grouped_few(const ProductArgs& args) {
    thread_local std::vector<int8_t> levels;
    thread_local std::vector<float> scales, totals;
    thread_local std::vector<int32_t> sums;
    const int64_t blocks = args.rows * args.ins / BLOCK;
    levels.resize(blocks * BLOCK);
    scales.resize(blocks);
    totals.resize(blocks);
    sums.resize(blocks);
    round_blocks(args, levels.data(), scales.data(), sums.data(), totals.data());
    const Rounded x{reinterpret_cast<const uint32_t*>(levels.data()), scales.data(), sums.data(),
                    totals.data()};
    each_block(args, ROUNDED_ROWS, [&](int64_t, int64_t, int64_t tile, int64_t tiles) {
        switch (tiles) {
            case 1: return coded_tiles<1, BITS>(args, x, tile);
            case 2: return coded_tiles<2, BITS>(args, x, tile);
            case 3: return coded_tiles<3, BITS>(args, x, tile);
            default: return coded_tiles<4, BITS>(args, x, tile);
        }
    });
}

}  // namespace

void dense(const ProductArgs& args) {
    args.bf16 ? dense_with<Bf16>(args) : dense_with<Float>(args);
}
void int8(const ProductArgs& args) { args.bf16 ? int8_with<bf16>(args) : int8_with<float>(args); }
void grouped(const ProductArgs& args) {
    if (args.small && args.rows <= ROUNDED_ROWS && args.bf16)
        return args.bits == 4 ? grouped_few<4>(args) : grouped_few<8>(args);
    args.bf16 ? grouped_many<Bf16>(args) : grouped_many<Float>(args);
}

}  // namespace quire::QUIRE_ISA
