// Attention over packed entries: codes of few bits are multiplied where they lie (cells.h).
//
// Queries and softmax weights are rounded to 8 bits where they meet codes of up to 4 bits, and to
// 15 and 16 bits (two products) where they meet codes of 8. What is constant along the inner
// dimension leaves the products exactly: scales of tokens times weights, middles times sums. Scales
// of channels go into the queries before these are rounded.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cells.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t PAGES = 16;            // of a block, which is scored at once
constexpr int64_t KEYS = PAGES * PAGE;   // of a block
constexpr int64_t AHEAD = 8;             // pages to those that are asked for
constexpr int64_t STEPPED = 4 * PAGES;   // pages for which a query keeps one step of rounding
// Distances of rows: constants, and queries' such that few rows share a line of the cache.
constexpr int64_t QUERY = LONGEST_HEAD + WIDTH, QUERY_UNITS = LONGEST_HEAD / 4,
                  WEIGHT_UNITS = KEYS / 4;

#if defined(__AVX512BW__)
// Queries and softmax weights that are rounded to 8 bits come from 16-bit fixed point, twice as many
// to a vector. A weight is 2^-(d / 64) for the rounded distance d of its score from the largest:
// within 0.6% of itself.
constexpr bool FIXED = true;
constexpr float PER_OCTAVE = 64, WHOLE = 32767;  // fixed-point weight 1

struct Powers {
    alignas(64) int16_t numbers[64];
    Powers() {
        for (int i = 0; i < 64; ++i)
            numbers[i] = int16_t(std::lround(WHOLE * std::exp2(float(-i) / PER_OCTAVE)));
    }
};
const Powers powers;

// Pairs of vectors as 16-bit integers, in the order of the packing instruction.
QUIRE_INLINE __m512i shorts_of(F a, F b) {
    return _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)a.part[0]),
                              _mm512_cvtps_epi32((__m512)b.part[0]));
}
QUIRE_INLINE __m512i dot_shorts(__m512i acc, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
QUIRE_INLINE F float_of(__m512i x) { return {(NativeF)_mm512_cvtepi32_ps(x)}; }
#else
constexpr bool FIXED = false;
#endif

// Sixteen scales or middles from number `i` on.
QUIRE_INLINE F numbers_at(const void* from, int64_t i, int64_t kind) {
    if (kind == FLOAT) return load(static_cast<const float*>(from) + i);
    if (kind == BFLOAT) return load(static_cast<const bf16*>(from) + i);
    uint32_t bits[WIDTH];
    for (int64_t j = 0; j < WIDTH; ++j)
        bits[j] = uint32_t(static_cast<const uint8_t*>(from)[i + j]) << 23;
    F r;
    std::memcpy(&r, bits, sizeof r);
    return r;
}

// The keys or values of a task's KV head.
struct Side {
    const CodedSide& data;
    const int64_t head, pages, tiles, groups;  // tiles: of channels; groups: of tokens
    const int64_t sets, wide;                  // of channels with a scale for each token; their tiles
    const float half;

    Side(const CodedSide& data, int64_t head, int64_t pages, int64_t dim)
        : data(data), head(head), pages(pages), tiles(dim / WIDTH),
          groups(pages * PAGE / data.group), sets(data.along_tokens ? 1 : dim / data.group),
          wide(data.group / WIDTH), half(float(1 << (data.bits - 1))) {}

    int64_t cell() const { return 32 * data.bits; }
    int64_t ahead() const { return AHEAD * tiles * cell(); }
    const uint8_t* page(int64_t p) const {
        return data.codes + (head * pages + p) * tiles * cell();
    }
    // Place of the scales of 16 tokens of a page in `set` of their channels, or of a group of
    // tokens in a channel tile.
    int64_t of_tokens(int64_t set, int64_t p) const {
        return ((head * sets + set) * pages + p) * PAGE;
    }
    int64_t of_channels(int64_t group, int64_t tile) const {
        return ((head * groups + group) * tiles + tile) * WIDTH;
    }
    F scale(int64_t i) const { return numbers_at(data.scale, i, data.kind); }
    F middle(int64_t i) const {
        return data.middle == nullptr ? splat(0) : numbers_at(data.middle, i, data.kind);
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

// Of rows, unless said otherwise. Rows are made up to a multiple of 16.
struct PackedWorkspace {
    Lines<float> q;              // [rows, QUERY], times what makes scores of products
    Lines<float> step, inverse;  // of the rounding of q, and 1 / step
    Lines<uint32_t> rounded;     // q in units, [planes, rows, QUERY_UNITS]
    Lines<float> fixed;          // what of the scores is the same for a group or a set of channels
    Lines<float> scores;         // [rows, KEYS], in units of log2 unless there is a soft cap
    Lines<float> best, top;      // largest scores of a block, and of all
    Lines<float> fade, share;    // what older sums are multiplied with, and a block's weights
    Lines<float> page_mass;      // [rows, PAGES], sums of weights
    Lines<uint32_t> weights;     // in units, [planes, sets, rows, WEIGHT_UNITS]
    Lines<float> out;            // [rows, dim]
    Lines<F> mass, middles;      // by lane: sums of weights, and of weights times middles [rows, sets]
    Lines<float> scale, middle;  // of a group of tokens, by channel, or of a block's, by token
    Lines<float> most, shares;   // largest scale of each channel, and 2048 / that
    Lines<int16_t> fixed_q, fixed_scale, fixed_middle;
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
          plane(all_rows * QUERY_UNITS) {
        work.q.assign(all_rows * QUERY, 0.0f);
        for (Lines<float>* each : {&work.step, &work.inverse, &work.fade, &work.share})
            each->assign(all_rows, 0.0f);
        work.fixed.resize(2 * all_rows * keys.sets);
        work.scores.resize(rows * KEYS);
        work.out.assign(rows * dim, 0.0f);
        work.top.assign(all_rows, NOTHING);
        work.best.assign(all_rows, NOTHING);
        work.mass.assign(rows, splat(0));
        work.middles.assign(rows * values.sets, splat(0));
        work.scale.resize(std::max(dim, std::max(keys.sets, values.sets) * KEYS));
        work.middle.resize(work.scale.size());
        work.page_mass.resize(rows * PAGES);
        work.rounded.assign(2 * plane, 0);
        work.most.resize(dim);
        work.shares.resize(dim);
        work.fixed_q.assign(all_rows * LONGEST_HEAD, 0);
        work.fixed_scale.assign(std::max(LONGEST_HEAD, values.sets * KEYS), 0);
        work.fixed_middle.resize(work.fixed_scale.size());
        work.weights.resize(2 * weights_plane());
        const float unit = args.softcap > 0 ? 1 : args.scale * LOG2E;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (task.row + r / plan.group) * args.q_stride +
                               (head * plan.group + r % plan.group) * dim;
            for (int64_t i = 0; i < dim; i += WIDTH) {
                const F x = args.bf16 ? load(static_cast<const bf16*>(args.q) + at + i)
                                      : load(static_cast<const float*>(args.q) + at + i);
                store(&work.q[r * QUERY + i], x * splat(unit));
            }
        }
    }

    // --- scores ----------------------------------------------------------------------------------

    // Sets each row's step of rounding: `most` [dim] bounds the scales of its channels.
    template <int BITS> void set_steps(const float* most) {
        for (int64_t r = 0; r < rows; ++r) {
            F largest = splat(0);
            for (int64_t i = 0; i < dim; i += WIDTH)
                largest = max(largest, abs(load(&work.q[r * QUERY + i])) * load(most + i));
            const float top = max_lane(largest), levels = Rounding<BITS>::SIGNED_MOST;
            work.step[r] = top / levels;
            work.inverse[r] = top > 0 ? levels / top : 0;
        }
    }

    // Rounds one row's queries times `scale` [dim].
    template <int BITS> void round_row(int64_t r, const float* scale) {
        const float* q = &work.q[r * QUERY];
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

    // Rounds all rows' queries times the scales of a group of keys, and sets `fixed`.
    template <int BITS> void round_rows(int64_t group) {
        if constexpr (FIXED && BITS < 8) {
            for (int64_t r = 0; r < rows; r += 8) round_fixed(group, r);
            return;
        }
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t at = keys.of_channels(group, t);
            store(&work.scale[t * WIDTH], keys.scale(at));
            store(&work.middle[t * WIDTH], keys.middle(at));
        }
        for (int64_t r = 0; r < rows; ++r) {
            round_row<BITS>(r, work.scale.data());
            const float* q = &work.q[r * QUERY];
            F middle = splat(0);
            for (int64_t i = 0; i < dim; i += WIDTH)
                middle = fma(load(q + i), load(&work.middle[i]), middle);
            const F shift = splat(-work.step[r] * keys.half);
            work.fixed[r] = sum(fma(rounded_lanes<BITS>(r), shift, middle));
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
        return {keys.page(page), tiles * cell, cell, first, runs, work.rounded.data(), plane,
                keys.ahead()};
    }

    // Scores of pages [first, last) where scales belong to channels. Codes are taken as distances
    // from their middle, so that the rounding errors of queries have little to act on.
    template <int BITS> void score_channels(int64_t first, int64_t last) {
        if (first == (read.offset + task.first_key) / PAGE || first % STEPPED == 0) {
            const int64_t end = std::min((first / STEPPED + 1) * STEPPED, last_page());
            const int64_t size = keys.data.group / PAGE, groups = (end - 1) / size + 1;
            for (int64_t t = 0; t < tiles; ++t) {
                F most = splat(0);
                for (int64_t group = first / size; group < groups; ++group)
                    most = max(most, keys.scale(keys.of_channels(group, t)));
                store(&work.most[t * WIDTH], most);
            }
            set_steps<BITS>(work.most.data());
            if constexpr (FIXED && BITS < 8) prepare_fixed();
        }
        keys.each_group(first, last, [&](int64_t group, int64_t start, int64_t stop) {
            round_rows<BITS>(group);
            float* scores = work.scores.data() + (start - first) * PAGE;
            const float *step = work.step.data(), *fixed = work.fixed.data();
            const auto put = [=](int64_t r, int64_t tile, I sums) {
                store(scores + r * KEYS + tile * WIDTH,
                      fma(to_float(sums), splat(step[r]), splat(fixed[r])));
            };
            multiply_cells<BITS, false, QUERY_UNITS>(key_cells(start, 0, tiles), rows, 0, stop - start,
                                                     put);
        });
    }

    // The same where scales belong to tokens: queries are rounded once.
    template <int BITS> void prepare_tokens() {
        std::fill(work.scale.begin(), work.scale.begin() + dim, 1.0f);
        set_steps<BITS>(work.scale.data());
        for (int64_t r = 0; r < rows; ++r) round_row<BITS>(r, work.scale.data());
        const int64_t wide = keys.wide;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < keys.sets; ++s) {
                F total = splat(0);
                for (int64_t t = s * wide; t < (s + 1) * wide; ++t)
                    total = total + load(&work.q[r * QUERY + t * WIDTH]);
                float* to = &work.fixed[2 * (r * keys.sets + s)];
                to[0] = -work.step[r] * keys.half * rounded_sum<BITS>(r, s * wide, (s + 1) * wide);
                to[1] = sum(total);
            }
    }

    template <int BITS> void score_tokens(int64_t first, int64_t last) {
        const int64_t sets = keys.sets, wide = keys.wide;
        for (int64_t s = 0; s < sets; ++s) {
            for (int64_t p = first; p < last; ++p) {
                const int64_t at = keys.of_tokens(s, p);
                store(&work.scale[(p - first) * PAGE], keys.scale(at));
                store(&work.middle[(p - first) * PAGE], keys.middle(at));
            }
            float* scores = work.scores.data();
            const float *scale = work.scale.data(), *middle = work.middle.data();
            const float *step = work.step.data(), *fixed = &work.fixed[2 * s];
            const auto put = [=](int64_t r, int64_t tile, I sums) {
                float* to = scores + r * KEYS + tile * WIDTH;
                const float* both = fixed + 2 * r * sets;
                const F centred = fma(to_float(sums), splat(step[r]), splat(both[0]));
                const F before = s > 0 ? load(to) : splat(0);
                const F rest = fma(splat(both[1]), load(middle + tile * WIDTH), before);
                store(to, fma(centred, load(scale + tile * WIDTH), rest));
            };
            multiply_cells<BITS, false, QUERY_UNITS>(key_cells(first, s * wide, wide), rows, 0,
                                                     last - first, put);
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
        F most[8];
        for (int64_t row = 0; row < rows; row += 8) {
            for (int64_t r = row; r < row + 8; ++r) {
                int64_t low = task.first_key;
                if (plan.window)
                    low = std::max(low, plan.positions[task.row + r / plan.group] - read.position -
                                            plan.window + 1);
                most[r - row] = r < rows ? largest(&work.scores[r * KEYS], count, low - shift,
                                                   last_key - shift)
                                         : splat(NOTHING);
            }
            fold_rows(most, &work.best[row], [](NativeF x, NativeF y) { return x > y ? x : y; });
        }
    }

    F largest(float* s, int64_t count, int64_t low, int64_t high) const {
        F most = splat(NOTHING);
        if (low <= 0 && high >= count && args.softcap <= 0) {
            for (int64_t i = 0; i < count; i += WIDTH) most = max(most, load(s + i));
            return most;
        }
        for (int64_t i = 0; i < count; i += WIDTH) {
            F x = load(s + i);
            if (args.softcap > 0) x = capped(x, args.scale, args.softcap);
            if (i < low || i + WIDTH > high) x = hide(x, low - i, high - i);
            store(s + i, x);
            most = max(most, x);
        }
        return most;
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
            for (int64_t s = 0; s < values.sets; ++s)
                work.middles[r * values.sets + s] = work.middles[r * values.sets + s] * fade;
            float* out = &work.out[r * dim];
            for (int64_t i = 0; i < dim; i += WIDTH) store(out + i, load(out + i) * fade);
        }
    }

    uint32_t* weights_of(int64_t set, int64_t r) {
        return &work.weights[(set * rows + r) * WEIGHT_UNITS];
    }
    int64_t weights_plane() const { return values.sets * rows * WEIGHT_UNITS; }

    // Scales and middles of a block's values, by token, for each set of channels; the scales
    // such that the largest is the largest rounded weight. Returns what one unit of that is worth.
    void scale_tokens(float most, int64_t first, int64_t last, float* worth) {
        for (int64_t s = 0; s < values.sets; ++s) {
            float *scale = &work.scale[s * KEYS], *middle = &work.middle[s * KEYS];
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
            for (int64_t i = 0; i < KEYS; i += WIDTH) store(scale + i, load(scale + i) * factor);
        }
    }

    // Rounded weights of every row, times the scales of `sets` sets of channels.
    template <int BITS> void weigh(int64_t count) {
        const int64_t sets = values.sets;
        for (int64_t r = 0; r < rows; ++r) {
            float* s = &work.scores[r * KEYS];
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
                    const float *scale = &work.scale[set * KEYS + i],
                                *middle = &work.middle[set * KEYS + i];
                    F low = splat(0);
                    I x[4];
#pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k) {
                        x[k] = to_int(w[k] * load(scale + k * WIDTH));
                        low = fma(w[k], load(middle + k * WIDTH), low);
                    }
                    work.middles[r * sets + set] = fma(low, share, work.middles[r * sets + set]);
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
                weights_plane(), values.ahead()};
    }

    template <int BITS> void add_values(int64_t first, int64_t last) {
        const int64_t count = (last - first) * PAGE;
        constexpr float most = Rounding<BITS>::MOST;
        if (!values.data.along_tokens) {
            float worth[2 * LONGEST_HEAD / WIDTH];
            if constexpr (FIXED && BITS < 8) {
                weigh_all_fixed(first, last, worth);
            } else {
                scale_tokens(most, first, last, worth);
                weigh<BITS>(count);
            }
            for (int64_t s = 0; s < values.sets; ++s) {
                float* out = work.out.data();
                const float* share = work.share.data();
                const int64_t dim = this->dim;
                const float unit = worth[s];
                const auto add = [=](int64_t r, int64_t tile, I sums) {
                    float* to = out + r * dim + tile * WIDTH;
                    store(to, fma(to_float(sums), splat(unit * share[r]), load(to)));
                };
                const int64_t wide = values.wide;
                multiply_cells<BITS, true, WEIGHT_UNITS>(value_cells(first, s, 0, last - first),
                                                         rows, s * wide, wide, add);
            }
            return;
        }
        std::fill(work.scale.begin(), work.scale.begin() + KEYS, most);
        std::fill(work.middle.begin(), work.middle.begin() + KEYS, 0.0f);
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
            multiply_cells<BITS, true, WEIGHT_UNITS>(
                value_cells(first, 0, start - first, stop - start), rows, 0, tiles, add);
        });
    }

    // --- in fixed point ---------------------------------------------------------------------------

#if defined(__AVX512BW__)
    // The queries as integers up to 127 * 16; those of scales are up to 2048, and the product of the
    // two, rounded to its upper 17 bits, is a rounded query.
    void prepare_fixed() {
        for (int64_t i = 0; i < dim; i += WIDTH) {
            const __m512 most = (__m512)load(&work.most[i]).part[0];
            const __mmask16 there = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
            _mm512_store_ps(&work.shares[i],
                            _mm512_maskz_div_ps(there, _mm512_set1_ps(2048), most));
        }
        for (int64_t r = 0; r < rows; ++r) {
            const F factor = splat(16 * work.inverse[r]);
            const auto at = [&](int64_t i) {
                return i < dim ? load(&work.q[r * QUERY + i]) * load(&work.most[i]) * factor
                               : splat(0);
            };
            for (int64_t i = 0; i < dim; i += 2 * WIDTH)
                _mm512_store_si512(&work.fixed_q[r * LONGEST_HEAD + i],
                                   shorts_of(at(i), at(i + WIDTH)));
        }
    }

    // `round_rows` for eight rows from `row` on.
    void round_fixed(int64_t group, int64_t row) {
        const float* q = &work.q[row * QUERY];
        const int16_t* fixed_q = &work.fixed_q[row * LONGEST_HEAD];
        uint32_t* to = &work.rounded[row * QUERY_UNITS];
        const float* shares = work.shares.data();
        const int64_t dim = this->dim, first = keys.of_channels(group, 0);
        F middles[8];
        I sums[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
            middles[r] = splat(0);
            sums[r] = splat_int(0);
        }
        for (int64_t i = 0; i < dim; i += 4 * WIDTH) {
            F scale[4], middle[4];
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; ++k) {
                const int64_t at = i + k * WIDTH;
                scale[k] = at < dim ? keys.scale(first + at) * load(shares + at) : splat(0);
                middle[k] = at < dim ? keys.middle(first + at) : splat(0);
            }
            const __m512i low = shorts_of(scale[0], scale[1]), high = shorts_of(scale[2], scale[3]);
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) {
                const __m512i bytes = _mm512_packs_epi16(
                    _mm512_mulhrs_epi16(_mm512_load_si512(fixed_q + r * LONGEST_HEAD), low),
                    _mm512_mulhrs_epi16(
                        _mm512_load_si512(fixed_q + r * LONGEST_HEAD + 2 * WIDTH), high));
                _mm512_store_si512(to + r * QUERY_UNITS, bytes);
                sums[r] = dot_bytes<true>(sums[r], splat_unit(0x01010101u), U{(NativeU)bytes});
#pragma GCC unroll 4
                for (int64_t k = 0; k < 4; ++k)
                    middles[r] = fma(load(q + r * QUERY + k * WIDTH), middle[k], middles[r]);
            }
            q += 4 * WIDTH;
            fixed_q += 4 * WIDTH;
            to += CHUNK;
        }
        const float half = -keys.half;
        const float* steps = &work.step[row];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r)
            middles[r] = fma(to_float(sums[r]), splat(half * steps[r]), middles[r]);
        fold_rows(middles, &work.fixed[row], [](NativeF x, NativeF y) { return x + y; });
    }
    // `scale_tokens`; the worth of a unit of the sums of middles follows after all sets.
    void fix_tokens(int64_t first, int64_t last, float* worth) {
        const int64_t sets = values.sets, pages = last - first;
        alignas(64) float most[2 * LONGEST_HEAD / WIDTH];
        F tops[8];
        for (int64_t s = 0; s < sets; s += 4) {
            for (int64_t k = 0; k < 4; ++k) {
                F scale = splat(0), middle = splat(0);
                if (s + k < sets)
                    for (int64_t p = 0; p < pages; ++p) {
                        const int64_t at = values.of_tokens(s + k, first + p);
                        scale = max(scale, values.scale(at));
                        middle = max(middle, abs(values.middle(at)));
                    }
                tops[2 * k] = scale;
                tops[2 * k + 1] = middle;
            }
            fold_rows(tops, most + 2 * s, [](NativeF x, NativeF y) { return x > y ? x : y; });
        }
        for (int64_t s = 0; s < sets; ++s) {
            const float top = most[2 * s], high = most[2 * s + 1];
            const F factor = splat(top > 0 ? 255 / top : 0);
            const F shrink = splat(high > 0 ? 2047 / high : 0);
            worth[s] = top / 255;
            worth[sets + s] = high / (2047 * WHOLE);
            for (int64_t p = 0; p < PAGES; p += 2) {
                const int64_t at = values.of_tokens(s, first + p), i = s * KEYS + p * PAGE;
                const F none = splat(0);
                const bool one = p < pages, two = p + 1 < pages;
                _mm512_store_si512(
                    &work.fixed_scale[i],
                    shorts_of(one ? values.scale(at) * factor : none,
                              two ? values.scale(at + PAGE) * factor : none));
                _mm512_store_si512(
                    &work.fixed_middle[i],
                    shorts_of(one ? values.middle(at) * shrink : none,
                              two ? values.middle(at + PAGE) * shrink : none));
            }
        }
    }

    // `weigh`, where scales belong to tokens, for SETS sets of channels from `first` on.
    template <int SETS> void weigh_fixed(int64_t count, int64_t first, const float* worth) {
        const int64_t sets = values.sets;
        const __m512i even = _mm512_load_si512(powers.numbers),
                      odd = _mm512_load_si512(powers.numbers + 32);
        const auto power = [&](F a, F b) {
            const __m512i d = shorts_of(a, b);
            return _mm512_srlv_epi16(_mm512_permutex2var_epi16(even, d, odd),
                                     _mm512_srli_epi16(d, 6));
        };
        const F slope = splat(-PER_OCTAVE);
        const int64_t chunks = rounded_up(count, 4 * WIDTH) / (4 * WIDTH);
        const int16_t *scales = work.fixed_scale.data(), *middles = work.fixed_middle.data();
        for (int64_t r = 0; r < rows; ++r) {
            float* s = &work.scores[r * KEYS];
            for (int64_t i = count; i < chunks * 4 * WIDTH; i += WIDTH)
                store(s + i, splat(-INFINITY));
            const F top = splat(PER_OCTAVE * work.best[r]);
            const float share = work.share[r];
            uint32_t* to = weights_of(0, r);
            const int64_t apart = rows * WEIGHT_UNITS;
            __m512i total = _mm512_setzero_si512(), low[SETS];
#pragma GCC unroll 4
            for (int set = 0; set < SETS; ++set) low[set] = _mm512_setzero_si512();
            for (int64_t c = 0; c < chunks; ++c) {
                __m512i w[2];
#pragma GCC unroll 2
                for (int k = 0; k < 2; ++k) {
                    const float* at = s + (4 * c + 2 * k) * WIDTH;
                    w[k] = power(fma(load(at), slope, top), fma(load(at + WIDTH), slope, top));
                    total = dot_shorts(total, w[k], _mm512_set1_epi16(1));
                }
#pragma GCC unroll 4
                for (int set = 0; set < SETS; ++set) {
                    const int64_t i = (first + set) * KEYS + 4 * c * WIDTH;
                    __m512i x[2];
#pragma GCC unroll 2
                    for (int k = 0; k < 2; ++k) {
                        x[k] = _mm512_mulhrs_epi16(w[k], _mm512_load_si512(scales + i + 32 * k));
                        low[set] =
                            dot_shorts(low[set], w[k], _mm512_load_si512(middles + i + 32 * k));
                    }
                    _mm512_store_si512(to + (first + set) * apart + c * CHUNK,
                                       _mm512_packus_epi16(x[0], x[1]));
                }
            }
            if (first == 0)
                work.mass[r] = fma(float_of(total), splat(share * (1 / WHOLE)), work.mass[r]);
            F* lows = &work.middles[r * sets + first];
#pragma GCC unroll 4
            for (int set = 0; set < SETS; ++set)
                lows[set] = fma(float_of(low[set]), splat(share * worth[first + set]), lows[set]);
        }
    }

    void weigh_all_fixed(int64_t first, int64_t last, float* worth) {
        const int64_t sets = values.sets, count = (last - first) * PAGE;
        fix_tokens(first, last, worth);
        int64_t s = 0;
        for (; s + 4 <= sets; s += 4) weigh_fixed<4>(count, s, worth + sets);
        for (; s + 2 <= sets; s += 2) weigh_fixed<2>(count, s, worth + sets);
        if (s < sets) weigh_fixed<1>(count, s, worth + sets);
    }
#else
    void prepare_fixed() {}
    void round_fixed(int64_t, int64_t) {}
    void weigh_all_fixed(int64_t, int64_t, float*) {}
#endif

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
        const int64_t sets = values.sets, wide = values.wide * WIDTH;
        for (int64_t r = 0; r < rows; ++r) {
            float* out = &work.out[r * dim];
            if (!values.data.along_tokens)
                for (int64_t s = 0; s < sets; ++s) {
                    const F low = splat(sum(work.middles[r * sets + s]));
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
