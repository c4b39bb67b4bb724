// Attention over packed entries: codes of few bits are multiplied where they lie.
//
// Codes lie in cells of 16 x 16: of keys, 16 tokens (columns) by 16 channels, and of values, 16
// channels (columns) by 16 tokens, a page's cells next to each other. A cell's inner dimension has
// four steps of four; a byte holds the codes of 8 / bits consecutive steps, so that a shift and a
// mask give a tile row of bytes, which is what the products of 8-bit integers take.
//
// Queries and softmax weights are rounded to 8 bits where they meet codes of up to 4 bits, and to
// 15 and 16 bits (two products) where they meet codes of 8. What is constant along the inner
// dimension leaves the products exactly: scales of tokens times weights, offsets times sums. Scales
// of channels go into the queries before these are rounded.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t PAGES = BLOCK / PAGE;    // of a block
constexpr int64_t STEPPED = 4 * PAGES;     // pages for which a query keeps one step of rounding
constexpr int64_t CHUNK = 16;              // units of 64 rounded numbers
constexpr int64_t QUERY_UNITS = LONGEST_HEAD / 4, WEIGHT_UNITS = BLOCK / 4;  // between rows
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

// Products of `a` with cells: column tile c's cell of run o is at `cells + c * tile + o * run`.
// Calls use(row, column tile, sums) for each.
struct Cells {
    const uint8_t* cells;
    int64_t tile, run, first, runs;  // runs [first, first + runs) of the inner dimension
    const uint32_t* a;               // [rows, QUERY_UNITS or WEIGHT_UNITS]
    int64_t plane;                   // from there to the second plane's
};

template <int BITS, bool VALUES, int R, int C, class Use>
__attribute__((noinline)) void cells_block(const Cells& m, int64_t row, int64_t tile,
                                           const Use& use) {
    I acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = splat_int(0);
    constexpr int64_t stride = VALUES ? WEIGHT_UNITS : QUERY_UNITS;
    const uint32_t* a = m.a + row * stride;
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
                for (int c = 0; c < C; ++c) raw[c] = load_units(at + c * m.tile + 64 * h);
#pragma GCC unroll 4
                for (int j = 0; j < 8 / BITS; ++j) {
                    U codes[C];
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) codes[c] = codes_of<BITS, VALUES>(raw[c], j);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const U unit = splat_unit(units[r * stride + STEP * (h * 8 / BITS + j)]);
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

template <int BITS, bool VALUES, int R, int C, class Use>
QUIRE_INLINE void cells_tiles(const Cells& m, int64_t row, int64_t tile, int64_t tiles,
                              const Use& use) {
    for (; tiles >= C; tile += C, tiles -= C) cells_block<BITS, VALUES, R, C>(m, row, tile, use);
    if constexpr (C > 1)
        if (tiles > 0) cells_tiles<BITS, VALUES, R, C / 2>(m, row, tile, tiles, use);
}

template <int BITS, bool VALUES, int R = (ACCUMULATORS < 8 ? ACCUMULATORS : 8), class Use>
QUIRE_INLINE void cells_rows(const Cells& m, int64_t row, int64_t rows, int64_t tile, int64_t tiles,
                             const Use& use) {
    constexpr int C = ACCUMULATORS / R < 4 ? ACCUMULATORS / R : 4;
    for (; rows >= R; row += R, rows -= R)
        cells_tiles<BITS, VALUES, R, C>(m, row, tile, tiles, use);
    if constexpr (R > 1)
        if (rows > 0) cells_rows<BITS, VALUES, R / 2>(m, row, rows, tile, tiles, use);
}

// Sixteen scales or offsets from number `i` on; `null` where there are none.
QUIRE_INLINE F numbers_at(const void* from, int64_t i, int64_t kind, float null = 0) {
    if (from == nullptr) return splat(null);
    if (kind == FLOAT) return load(static_cast<const float*>(from) + i);
    if (kind == BFLOAT) return load(static_cast<const bf16*>(from) + i);
    F r;
    const auto* exponents = static_cast<const uint8_t*>(from) + i;
    QUIRE_EACH {
        NativeB part;
        std::memcpy(&part, exponents + p * LANES, sizeof part);
        r.part[p] = (NativeF)(__builtin_convertvector(part, NativeU) << 23);
    }
    return r;
}

// The keys or values of a task's KV head.
struct Side {
    const CodedSide& data;
    int64_t head, pages, tiles;  // tiles: of channels
    float half;

    Side(const CodedSide& data, int64_t head, int64_t pages, int64_t dim)
        : data(data), head(head), pages(pages), tiles(dim / WIDTH),
          half(float(1 << (data.bits - 1))) {}

    int64_t cell() const { return 32 * data.bits; }
    const uint8_t* page(int64_t p) const {
        return data.codes + (head * pages + p) * tiles * cell();
    }
    int64_t sets() const { return data.along_tokens ? 1 : tiles * WIDTH / data.group; }
    int64_t set_tiles() const { return data.group / WIDTH; }

    // Place of the scales of 16 tokens of a page in `set` of their channels, or of a channel tile
    // in a group of tokens.
    int64_t of_tokens(int64_t set, int64_t p) const {
        return ((head * sets() + set) * pages + p) * PAGE;
    }
    int64_t of_channels(int64_t group, int64_t tile) const {
        return ((head * (pages * PAGE / data.group) + group) * tiles + tile) * WIDTH;
    }
    F scale(int64_t i) const { return numbers_at(data.scale, i, data.kind); }
    // The number half way between the least and the largest that codes can say.
    F middle(int64_t i) const {
        if (data.low == nullptr) return splat(0);
        return fma(scale(i), splat(half), numbers_at(data.low, i, data.kind));
    }
    // Calls use(group, first page, last page) for the groups of tokens in pages [first, last).
    template <class Use> void each_group(int64_t first, int64_t last, const Use& use) const {
        const int64_t size = data.group / PAGE;
        for (int64_t p = first; p < last;) {
            const int64_t group = p / size, end = std::min(last, (group + 1) * size);
            use(group, p, end);
            p = end;
        }
    }
};

struct PackedWorkspace {
    std::vector<float> q, step, inverse;  // scaled queries [rows, dim]; of a row
    std::vector<float> fixed;       // what of a row's scores is the same for a group, or a set
    std::vector<float> scores;      // [rows, BLOCK], in units of log2 unless there is a soft cap
    std::vector<float> out, top, best, fade, share;
    std::vector<F> mass, low;       // by lane: sums of weights, and of weights times middles
    std::vector<float> scale, middle;
    std::vector<float> page_mass;   // [rows, PAGES]
    std::vector<uint32_t> rounded, weights;  // units
};

struct PackedTask {
    const PackedArgs& args;
    const AttentionPlan& plan;
    const AttentionTask& task;
    const Read& read;
    const PackedSource& source;
    const int64_t head, rows, all_rows, dim, tiles;
    const Side keys, values;
    PackedWorkspace& work;
    const int64_t plane;  // units of all rows' rounded queries

    static int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

    PackedTask(const PackedArgs& args, const AttentionTask& task, int64_t head,
               PackedWorkspace& work)
        : args(args), plan(args.plan->cut), task(task), read(plan.reads[task.read]),
          source(args.plan->sources[task.read]), head(head), rows(task.rows * plan.group),
          all_rows(rounded_up(rows, WIDTH)), dim(plan.head_dim), tiles(dim / WIDTH),
          keys(source.layers[args.layer].keys, head, source.pages, dim),
          values(source.layers[args.layer].values, head, source.pages, dim), work(work),
          plane(rows * QUERY_UNITS) {
        work.q.resize(rows * dim);
        for (std::vector<float>* each : {&work.step, &work.inverse, &work.fade, &work.share})
            each->assign(all_rows, 0.0f);
        work.fixed.resize(rows * keys.sets());
        work.scores.resize(rows * BLOCK);
        work.out.assign(rows * dim, 0.0f);
        work.top.assign(all_rows, NOTHING);
        work.best.assign(all_rows, NOTHING);
        work.mass.assign(rows, splat(0));
        work.low.assign(rows * values.sets(), splat(0));
        work.scale.resize(std::max(dim, std::max(keys.sets(), values.sets()) * BLOCK));
        work.middle.resize(work.scale.size());
        work.page_mass.resize(rows * PAGES);
        work.rounded.assign(2 * plane, 0);
        work.weights.resize(2 * weights_plane());
        const float unit = args.softcap > 0 ? 1 : args.scale * LOG2E;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (task.row + r / plan.group) * args.q_stride +
                               (head * plan.group + r % plan.group) * dim;
            for (int64_t i = 0; i < dim; i += WIDTH) {
                const F x = args.bf16 ? load(static_cast<const bf16*>(args.q) + at + i)
                                      : load(static_cast<const float*>(args.q) + at + i);
                store(&work.q[r * dim + i], x * splat(unit));
            }
        }
    }

    // --- scores ----------------------------------------------------------------------------------

    // Sets each row's step of rounding: `most` [dim] bounds the scales of its channels.
    template <int BITS> void set_steps(const float* most) {
        for (int64_t r = 0; r < rows; ++r) {
            F largest = splat(0);
            for (int64_t i = 0; i < dim; i += WIDTH)
                largest = max(largest, abs(load(&work.q[r * dim + i])) * load(most + i));
            const float top = max_lane(largest), levels = Rounding<BITS>::SIGNED_MOST;
            work.step[r] = top / levels;
            work.inverse[r] = top > 0 ? levels / top : 0;
        }
    }

    // Rounds one row's queries times `scale` [dim]; the sum of the rounded ones' errors left out of
    // `fixed` is what the middle of the codes makes of them.
    template <int BITS> void round_row(int64_t r, const float* scale) {
        const float* q = &work.q[r * dim];
        const F inverse = splat(work.inverse[r]);
        for (int64_t i = 0; i < dim; i += 4 * WIDTH) {
            I x[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                x[k] = i + k * WIDTH < dim ? to_int(load(q + i + k * WIDTH) * inverse *
                                                    load(scale + i + k * WIDTH))
                                           : splat_int(0);
            Rounding<BITS>::template put<true>(&work.rounded[r * QUERY_UNITS + i / 4], plane, x);
        }
    }

    // Lanes that add up to the sum of row r's rounded queries.
    template <int BITS> F rounded_lanes(int64_t r) const {
        I total = splat_int(0);
        const uint32_t* a = &work.rounded[r * QUERY_UNITS];
        for (int plane = 0; plane < Rounding<BITS>::PLANES; ++plane, a += this->plane) {
            QUIRE_EACH total.part[p] <<= 8;
            for (int64_t i = 0; i < dim / 4; i += CHUNK)
                total = dot_bytes<true>(total, splat_unit(0x01010101u), load_units(a + i));
        }
        return to_float(total);
    }

    // Sum of row r's rounded queries in channel tiles [first, last).
    template <int BITS> float rounded_sum(int64_t r, int64_t first, int64_t last) const {
        float total = 0;
        const uint32_t* a = &work.rounded[r * QUERY_UNITS];
        for (int plane = 0; plane < Rounding<BITS>::PLANES; ++plane, a += this->plane) {
            int64_t here = 0;
            for (int64_t run = first; run < last; ++run)
                for (int64_t s = 0; s < 4; ++s) {
                    int8_t bytes[4];
                    std::memcpy(bytes, a + unit_of(run) + s * STEP, 4);
                    here += bytes[0] + bytes[1] + bytes[2] + bytes[3];
                }
            total = total * 256 + float(here);
        }
        return total;
    }

    Cells key_cells(int64_t page, int64_t first, int64_t runs) const {
        const int64_t cell = keys.cell();
        return {keys.page(page), tiles * cell, cell, first, runs, work.rounded.data(), plane};
    }

    // Scores of pages [first, last), whose first one's lie at `to`, where scales belong to channels.
    template <int BITS> void score_channels(int64_t first, int64_t last) {
        if (first == (read.offset + task.first_key) / PAGE || first % STEPPED == 0) {
            std::fill(work.scale.begin(), work.scale.begin() + dim, 0.0f);
            const int64_t end = std::min((first / STEPPED + 1) * STEPPED, last_page());
            keys.each_group(first, end, [&](int64_t group, int64_t, int64_t) {
                for (int64_t t = 0; t < tiles; ++t)
                    store(&work.scale[t * WIDTH], max(load(&work.scale[t * WIDTH]),
                                                      keys.scale(keys.of_channels(group, t))));
            });
            set_steps<BITS>(work.scale.data());
        }
        keys.each_group(first, last, [&](int64_t group, int64_t start, int64_t stop) {
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t at = keys.of_channels(group, t);
                store(&work.scale[t * WIDTH], keys.scale(at));
                store(&work.middle[t * WIDTH], keys.middle(at));
            }
            for (int64_t r = 0; r < rows; ++r) {
                round_row<BITS>(r, work.scale.data());
                F middle = splat(0);
                for (int64_t i = 0; i < dim; i += WIDTH)
                    middle = fma(load(&work.q[r * dim + i]), load(&work.middle[i]), middle);
                const F shift = splat(-work.step[r] * keys.half);
                work.fixed[r] = sum(fma(rounded_lanes<BITS>(r), shift, middle));
            }
            float* scores = work.scores.data() + (start - first) * PAGE;
            const auto put = [&, scores](int64_t r, int64_t tile, I sums) {
                store(scores + r * BLOCK + tile * WIDTH,
                      fma(to_float(sums), splat(work.step[r]), splat(work.fixed[r])));
            };
            cells_rows<BITS, false>(key_cells(start, 0, tiles), 0, rows, 0, stop - start, put);
        });
    }

    // The same where scales belong to tokens: queries are rounded once.
    template <int BITS> void prepare_tokens() {
        std::fill(work.scale.begin(), work.scale.begin() + dim, 1.0f);
        set_steps<BITS>(work.scale.data());
        for (int64_t r = 0; r < rows; ++r) round_row<BITS>(r, work.scale.data());
        work.fixed.resize(2 * rows * keys.sets());
        const int64_t wide = keys.set_tiles();
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < keys.sets(); ++s) {
                F total = splat(0);
                for (int64_t t = s * wide; t < (s + 1) * wide; ++t)
                    total = total + load(&work.q[r * dim + t * WIDTH]);
                float* to = &work.fixed[2 * (r * keys.sets() + s)];
                to[0] = keys.half * rounded_sum<BITS>(r, s * wide, (s + 1) * wide);
                to[1] = sum(total);
            }
    }

    template <int BITS> void score_tokens(int64_t first, int64_t last) {
        const int64_t sets = keys.sets(), wide = keys.set_tiles();
        for (int64_t s = 0; s < sets; ++s) {
            for (int64_t p = first; p < last; ++p) {
                const int64_t at = keys.of_tokens(s, p);
                store(&work.scale[(p - first) * PAGE], keys.scale(at));
                store(&work.middle[(p - first) * PAGE], keys.middle(at));
            }
            const auto put = [&](int64_t r, int64_t tile, I sums) {
                float* to = &work.scores[r * BLOCK + tile * WIDTH];
                const float* fixed = &work.fixed[2 * (r * sets + s)];
                const F centred = (to_float(sums) - splat(fixed[0])) * splat(work.step[r]);
                const F before = s > 0 ? load(to) : splat(0);
                const F middle = fma(splat(fixed[1]), load(&work.middle[tile * WIDTH]), before);
                store(to, fma(centred, load(&work.scale[tile * WIDTH]), middle));
            };
            cells_rows<BITS, false>(key_cells(first, s * wide, wide), 0, rows, 0, last - first, put);
        }
    }

    template <int BITS> void score_block(int64_t first, int64_t last) {
        keys.data.along_tokens ? score_channels<BITS>(first, last)
                               : score_tokens<BITS>(first, last);
    }

    void score(int64_t first, int64_t last, int64_t last_key) {
        keys.data.bits == 2   ? score_block<2>(first, last)
        : keys.data.bits == 4 ? score_block<4>(first, last)
                              : score_block<8>(first, last);
        const int64_t shift = first * PAGE - read.offset, count = (last - first) * PAGE;
        for (int64_t r = 0; r < rows; ++r) {
            int64_t low = task.first_key;
            if (plan.window)
                low = std::max(low, plan.positions[task.row + r / plan.group] - read.position -
                                        plan.window + 1);
            work.best[r] =
                largest(&work.scores[r * BLOCK], count, low - shift, last_key - shift);
        }
    }

    float largest(float* s, int64_t count, int64_t low, int64_t high) const {
        F most = splat(NOTHING);
        const bool whole = low <= 0 && high >= count && args.softcap <= 0;
        for (int64_t i = 0; i < count; i += WIDTH) {
            F x = load(s + i);
            if (!whole) {
                if (args.softcap > 0) x = capped(x, args.scale, args.softcap);
                if (i < low || i + WIDTH > high) x = hide(x, low - i, high - i);
                store(s + i, x);
            }
            most = max(most, x);
        }
        return max_lane(most);
    }

    // --- weights and values ----------------------------------------------------------------------

    // Makes the new maxima those that the rows' sums refer to; `share` is what a block's weights,
    // relative to its own maxima, are multiplied with.
    void raise() {
        for (int64_t r = 0; r < all_rows; r += WIDTH) {
            const F before = load(&work.top[r]), here = load(&work.best[r]);
            const F top = max(before, here);
            store(&work.top[r], top);
            store(&work.fade[r], exp2(before - top));
            store(&work.share[r], exp2(here - top));
        }
        for (int64_t r = 0; r < rows; ++r) {
            if (work.fade[r] == 1) continue;
            const F fade = splat(work.fade[r]);
            work.mass[r] = work.mass[r] * fade;
            for (int64_t s = 0; s < values.sets(); ++s)
                work.low[r * values.sets() + s] = work.low[r * values.sets() + s] * fade;
            float* out = &work.out[r * dim];
            for (int64_t i = 0; i < dim; i += WIDTH) store(out + i, load(out + i) * fade);
        }
    }

    uint32_t* weights_of(int64_t set, int64_t r) {
        return &work.weights[(set * rows + r) * WEIGHT_UNITS];
    }
    int64_t weights_plane() const { return values.sets() * rows * WEIGHT_UNITS; }

    // Scales and middles of a block's values, by token, for each set of channels; the scales
    // such that the largest is the largest rounded weight. Returns what one unit of that is worth.
    void scale_tokens(float most, int64_t first, int64_t last, float* worth) {
        for (int64_t s = 0; s < values.sets(); ++s) {
            float *scale = &work.scale[s * BLOCK], *middle = &work.middle[s * BLOCK];
            F largest = splat(0);
            for (int64_t p = 0; p < PAGES; ++p) {
                const bool there = first + p < last;
                const int64_t at = values.of_tokens(s, first + p);
                const F x = there ? values.scale(at) : splat(0);
                store(scale + p * PAGE, x);
                store(middle + p * PAGE, there ? values.middle(at) : splat(0));
                largest = max(largest, x);
            }
            const float top = max_lane(largest);
            const F factor = splat(top > 0 ? most / top : 0);
            worth[s] = top / most;
            for (int64_t i = 0; i < BLOCK; i += WIDTH) store(scale + i, load(scale + i) * factor);
        }
    }

    // Rounded weights of every row, times the scales of `sets` sets of channels.
    template <int BITS> void weigh(int64_t count) {
        const int64_t sets = values.sets();
        for (int64_t r = 0; r < rows; ++r) {
            float* s = &work.scores[r * BLOCK];
            for (int64_t i = count; i < rounded_up(count, 4 * WIDTH); i += WIDTH)
                store(s + i, splat(-INFINITY));
            const F top = splat(work.best[r]), share = splat(work.share[r]);
            F total = splat(0);
            for (int64_t i = 0; i < count; i += 4 * WIDTH) {
                F w[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    w[k] = exp2(load(s + i + k * WIDTH) - top);
                    total = total + w[k];
                }
                if (values.data.along_tokens)
                    for (int k = 0; k < 4; ++k)
                        work.page_mass[r * PAGES + i / WIDTH + k] = sum(w[k]) * work.share[r];
                for (int64_t set = 0; set < sets; ++set) {
                    const float *scale = &work.scale[set * BLOCK + i],
                                *middle = &work.middle[set * BLOCK + i];
                    F low = splat(0);
                    I x[4];
#pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k) {
                        x[k] = to_int(w[k] * load(scale + k * WIDTH));
                        low = fma(w[k], load(middle + k * WIDTH), low);
                    }
                    work.low[r * sets + set] = fma(low, share, work.low[r * sets + set]);
                    Rounding<BITS>::template put<false>(weights_of(set, r) + i / 4, weights_plane(),
                                                        x);
                }
            }
            work.mass[r] = fma(total, share, work.mass[r]);
        }
    }

    Cells value_cells(int64_t page, int64_t set, int64_t first, int64_t runs) {
        const int64_t cell = values.cell();
        return {values.page(page), cell, tiles * cell, first, runs, weights_of(set, 0),
                weights_plane()};
    }

    template <int BITS> void add_values(int64_t first, int64_t last) {
        const int64_t count = (last - first) * PAGE;
        constexpr float most = Rounding<BITS>::MOST;
        if (!values.data.along_tokens) {
            float worth[LONGEST_HEAD / WIDTH];
            scale_tokens(most, first, last, worth);
            weigh<BITS>(count);
            for (int64_t s = 0; s < values.sets(); ++s) {
                const auto add = [&](int64_t r, int64_t tile, I sums) {
                    float* to = &work.out[r * dim + tile * WIDTH];
                    store(to, fma(to_float(sums), splat(worth[s] * work.share[r]), load(to)));
                };
                const int64_t wide = values.set_tiles();
                cells_rows<BITS, true>(value_cells(first, s, 0, last - first), 0, rows, s * wide,
                                       wide, add);
            }
            return;
        }
        std::fill(work.scale.begin(), work.scale.begin() + BLOCK, most);
        std::fill(work.middle.begin(), work.middle.begin() + BLOCK, 0.0f);
        weigh<BITS>(count);
        values.each_group(first, last, [&](int64_t group, int64_t start, int64_t stop) {
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t at = values.of_channels(group, t);
                store(&work.scale[t * WIDTH], values.scale(at));
                store(&work.middle[t * WIDTH], values.middle(at));
            }
            const auto add = [&](int64_t r, int64_t tile, I sums) {
                float mass = 0;
                for (int64_t p = start; p < stop; ++p) mass += work.page_mass[r * PAGES + p - first];
                float* to = &work.out[r * dim + tile * WIDTH];
                const F low = fma(load(&work.middle[tile * WIDTH]), splat(mass), load(to));
                const F scale = load(&work.scale[tile * WIDTH]) * splat(work.share[r] / most);
                store(to, fma(to_float(sums), scale, low));
            };
            Cells cells = value_cells(first, 0, start - first, stop - start);
            cells_rows<BITS, true>(cells, 0, rows, 0, tiles, add);
        });
    }

    // --- a task ----------------------------------------------------------------------------------

    // Last key, exclusive, that this layer and head may read.
    int64_t last_key() const {
        if (plan.kept.empty()) return task.last_key;
        const int64_t at = (task.read * plan.layers + args.layer) * plan.kv_heads + head;
        return std::min<int64_t>(task.last_key, plan.kept[at]);
    }
    int64_t last_page() const { return (read.offset + last_key() + PAGE - 1) / PAGE; }

    void run() {
        if (!keys.data.along_tokens)
            keys.data.bits == 2   ? prepare_tokens<2>()
            : keys.data.bits == 4 ? prepare_tokens<4>()
                                  : prepare_tokens<8>();
        const int64_t last_key = this->last_key(), end = last_page();
        for (int64_t first = (read.offset + task.first_key) / PAGE; first < end;) {
            const int64_t last = std::min(end, (first / PAGES + 1) * PAGES);
            score(first, last, last_key);
            raise();
            values.data.bits == 2   ? add_values<2>(first, last)
            : values.data.bits == 4 ? add_values<4>(first, last)
                                    : add_values<8>(first, last);
            first = last;
        }
        finish();
    }

    void finish() {
        const int64_t sets = values.sets(), wide = values.set_tiles() * WIDTH;
        for (int64_t r = 0; r < rows; ++r) {
            float* out = &work.out[r * dim];
            if (!values.data.along_tokens)
                for (int64_t s = 0; s < sets; ++s) {
                    const F low = splat(sum(work.low[r * sets + s]));
                    for (int64_t i = s * wide; i < (s + 1) * wide; i += WIDTH)
                        store(out + i, load(out + i) + low);
                }
            const float mass = sum(work.mass[r]);
            if (task.scratch >= 0) {
                float* base = args.scratch + head * plan.scratch_floats + task.scratch;
                save_part(base + r * part_floats(plan), dim, out, work.top[r], mass);
            } else {
                const int64_t token = task.row + r / plan.group;
                join((token * plan.kv_heads + head) * plan.group + r % plan.group, args.out,
                     args.lse, dim, work.top[r], mass, out);
            }
        }
    }
};

}  // namespace

void attend_packed(const PackedArgs& args) {
    const AttentionPlan& plan = args.plan->cut;
    each_task<PackedWorkspace>(
        plan, [&](const AttentionTask& task, int64_t head, PackedWorkspace& work) {
            PackedTask(args, task, head, work).run();
        });
    each_merged(plan, args.scratch, [&](int64_t at, float top, float mass, const float* sums) {
        join(at, args.out, args.lse, plan.head_dim, top, mass, sums);
    });
}

}  // namespace quire::QUIRE_ISA
