// Products with packed weights: dense, int8 with int8 activations, and grouped low-bit weights.
//
// A weight [outs, ins] is packed into tiles of 16 outputs: [outs / 16, steps, 16] units (simd.h).
// Work is cut into panels of columns and blocks of rows; a block's results collect in float (or
// int32) beside the caches and pass through one epilogue: scale, bias, residual, rounding.

#include <algorithm>
#include <cmath>
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
    const int64_t wide = args.rows <= 8 ? 2 : PANEL;
    const int64_t panels = (tiles + wide - 1) / wide;
    const int64_t blocks = (args.rows + most_rows - 1) / most_rows;
    const int64_t rows = (args.rows + blocks - 1) / blocks;
    parallel_tasks(panels * blocks, [&](int64_t i) {
        const int64_t row = i % blocks * rows, tile = i / blocks * wide;
        if (row < args.rows)
            body(row, std::min(rows, args.rows - row), tile, std::min(wide, tiles - tile));
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

// 4-bit codes: unit s of a column holds inputs 8s + 2j in nibble j and 8s + 2j + 1 in nibble 4 + j,
// so that one shift and one mask give a pair of codes in the places of two bfloat16. 8-bit codes:
// input 4s + j in byte j.
QUIRE_INLINE U shifted(U x, int bits) {
    QUIRE_EACH x.part[p] >>= bits;
    return x;
}
QUIRE_INLINE I masked(U x, uint32_t mask) {
    I r;
    QUIRE_EACH r.part[p] = (NativeI)(x.part[p] & mask);
    return r;
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
// (code pair) | the bits of 128.0 in both halves: the bfloat16 numbers 128 + code.
QUIRE_INLINE U raised_pair(U x) {
    QUIRE_EACH {
#if defined(__AVX512F__)
        x.part[p] = (NativeU)_mm512_ternarylogic_epi32(
            (__m512i)x.part[p], _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x43004300), 0xea);
#else
        x.part[p] = (x.part[p] & 0x000f000fu) | 0x43004300u;
#endif
    }
    return x;
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
                const U low_codes = shifted(unit, BITS == 4 ? 4 * j : 16 * j);
                const U high_codes = shifted(unit, BITS == 4 ? 4 * j + 16 : 16 * j + 8);
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

// Few rows: codes are multiplied as they are, and each group's sum is scaled once. `levels` is the
// rows' inputs, as bfloat16 pairs for 4 bits and as floats for 8; `totals` their sums by group.
template <int R, int C, int BITS>
QUIRE_INLINE void grouped_rows(const ProductArgs& args, const uint32_t* levels, int64_t stride,
                               const float* totals, int64_t row, int64_t tile) {
    const int64_t groups = args.ins / args.group, steps = args.group * BITS / 32;
    const int64_t tile_units = args.ins * BITS / 32 * WIDTH;
    const uint32_t* codes = static_cast<const uint32_t*>(args.weight) + tile * tile_units;
    constexpr float centre = BITS == 4 ? 128 + 8 : 128;
    F out[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r][c] = splat(0);
    for (int64_t g = 0; g < groups; ++g) {
        F acc[R][C];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) acc[r][c] = splat(-centre * totals[r * groups + g]);
        for (int64_t s = g * steps; s < (g + 1) * steps; ++s) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                const U unit = load_units(codes + c * tile_units + s * WIDTH);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    if constexpr (BITS == 4) {
                        const U pair = raised_pair(shifted(unit, 4 * j));
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r)
                            acc[r][c] = Bf16::dot(acc[r][c], levels[r * stride + s * 4 + j], pair);
                    } else {
                        const F code = to_float(masked(shifted(unit, 8 * j), 255));
                        U bits;
                        std::memcpy(&bits, &code, sizeof bits);
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r)
                            acc[r][c] = Float::dot(acc[r][c], levels[r * stride + s * 4 + j], bits);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const int64_t at = ((tile + c) * groups + g) * WIDTH;
            const F scale = load(args.scales + at);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) out[r][c] = fma(scale, acc[r][c], out[r][c]);
            if (args.offsets)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    out[r][c] = fma(load(args.offsets + at), splat(totals[r * groups + g]), out[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            args.bf16 ? finish_tile<bf16>(args, row + r, (tile + c) * WIDTH, out[r][c])
                      : finish_tile<float>(args, row + r, (tile + c) * WIDTH, out[r][c]);
}

template <int C, int BITS>
void grouped_block(const ProductArgs& args, const uint32_t* levels, int64_t stride,
                   const float* totals, int64_t row, int64_t rows, int64_t tile) {
    const int64_t groups = args.ins / args.group;
    while (rows > 0) {
        const int64_t now = std::min<int64_t>(rows, 4);
        if (now == 1) grouped_rows<1, C, BITS>(args, levels, stride, totals, row, tile);
        if (now == 2) grouped_rows<2, C, BITS>(args, levels, stride, totals, row, tile);
        if (now == 3) grouped_rows<3, C, BITS>(args, levels, stride, totals, row, tile);
        if (now == 4) grouped_rows<4, C, BITS>(args, levels, stride, totals, row, tile);
        levels += now * stride;
        totals += now * groups;
        row += now;
        rows -= now;
    }
}

template <class T, int BITS> void grouped_few(const ProductArgs& args) {
    const int64_t groups = args.ins / args.group;
    std::vector<float> totals(args.rows * groups);
    std::vector<float> wide;  // the rows as floats, for 8 bits
    if (BITS == 8) wide.resize(args.rows * args.ins);
    for (int64_t row = 0; row < args.rows; ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        for (int64_t g = 0; g < groups; ++g) {
            F total = splat(0);
            for (int64_t i = g * args.group; i < (g + 1) * args.group; i += WIDTH) {
                const F v = load(x + i);
                total = total + v;
                if (BITS == 8) store(wide.data() + row * args.ins + i, v);
            }
            totals[row * groups + g] = sum(total);
        }
    }
    const auto* levels = static_cast<const uint32_t*>(
        BITS == 8 ? static_cast<const void*>(wide.data()) : args.x);
    const int64_t stride = BITS == 8 ? args.ins : args.x_stride / 2;
    each_block(args, args.rows, [&](int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
        if (tiles == 2)
            grouped_block<2, BITS>(args, levels, stride, totals.data(), row, rows, tile);
        else
            grouped_block<1, BITS>(args, levels, stride, totals.data(), row, rows, tile);
    });
}

}  // namespace

void dense(const ProductArgs& args) {
    args.bf16 ? dense_with<Bf16>(args) : dense_with<Float>(args);
}
void int8(const ProductArgs& args) { args.bf16 ? int8_with<bf16>(args) : int8_with<float>(args); }
void grouped(const ProductArgs& args) {
    if (args.small && args.rows <= 8 && args.bits == 4 && args.bf16) return grouped_few<bf16, 4>(args);
    if (args.small && args.rows <= 8 && args.bits == 8)
        return args.bf16 ? grouped_few<bf16, 8>(args) : grouped_few<float, 8>(args);
    args.bf16 ? grouped_many<Bf16>(args) : grouped_many<Float>(args);
}

}  // namespace quire::QUIRE_ISA
