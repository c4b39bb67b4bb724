// Query rows of one KV head: what exact and chosen attention share between scores and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

struct Workspace {
    Lines<float> scores, out, top, best;
    Lines<F> mass;                // of each row, by lane
    Lines<uint32_t> q, weights;  // units
};

// Pages of keys or values that are asked for while others are multiplied: neighbours in a segment lie
// apart in memory, where the processor does not foresee them. Asked for all at once they would stall
// it as long as they take.
constexpr int64_t AHEAD = BLOCK / PAGE;

// Query rows of one KV head, and what they have read so far.
template <class E> struct Rows {
    using T = typename E::Element;
    static constexpr int64_t UNITS = BLOCK / E::PACK;  // of a row of weights

    const int64_t rows, dim, dim_units;
    const float scale, softcap;
    Workspace& work;

    Rows(int64_t rows, int64_t dim, float scale, float softcap, Workspace& work)
        : rows(rows), dim(dim), dim_units(dim / E::PACK), scale(scale), softcap(softcap),
          work(work) {
        work.q.resize(rows * dim_units);
        work.scores.resize(rows * BLOCK);
        work.weights.resize(rows * UNITS);
        work.out.assign(rows * dim, 0.0f);
        work.top.assign(rows, NOTHING);
        work.mass.assign(rows, splat(0));
        work.best.resize(rows);
    }

    void set_q(int64_t row, int64_t count, const T* q) {
        std::memcpy(work.q.data() + row * dim_units, q, count * dim * sizeof(T));
    }

    // The largest score of one row, in units of log2, over lanes [low, high) of `count`; the others
    // become -inf.
    float largest(float* s, int64_t count, int64_t low, int64_t high) const {
        F most = splat(-INFINITY);
        const bool whole = low <= 0 && high >= count && softcap <= 0;
        for (int64_t i = 0; i < count; i += WIDTH) {
            F x = load(s + i);
            if (!whole) {
                if (softcap > 0) x = capped(x, scale, softcap);
                if (i < low || i + WIDTH > high) x = hide(x, low - i, high - i);
                store(s + i, x);
            }
            most = max(most, x);
        }
        return bounded(most);
    }

    // The largest lane of a row's largest scores, in units of log2.
    float bounded(F most) const { return std::max(max_lane(most) * unit(), NOTHING); }

    // What a stored score is multiplied with to be in units of log2.
    float unit() const { return softcap > 0 ? 1 : scale * LOG2E; }

    // Weights 2^(score - top) of one row of `count` scores, as units; adds them up by lane. `keep`
    // leaves the weights as floats where the scores were.
    void weigh(int64_t r, int64_t count, float top, bool keep) {
        float* s = work.scores.data() + r * BLOCK;
        T* w = reinterpret_cast<T*>(work.weights.data() + r * UNITS);
        const F factor = splat(unit()), shift = splat(-top);
        F total = work.mass[r];
        const auto weight = [&](int64_t i) {
            const F x = exp2<std::is_same_v<T, bf16>>(fma(load(s + i), factor, shift));
            total = total + x;
            if (keep) store(s + i, x);
            return x;
        };
        int64_t i = 0;
        for (; i + 2 * WIDTH <= count; i += 2 * WIDTH) {
            const F x = weight(i);
            store(w + i, x, weight(i + WIDTH));
        }
        if (i < count) store(w + i, weight(i));
        if (!keep) work.mass[r] = total;
    }

    // Makes `top` the maximum that row r's sums refer to.
    void raise(int64_t r, float top) {
        const float before = work.top[r];
        work.top[r] = top;
        if (before == NOTHING) return;  // nothing is summed up yet
        const F fade = splat(std::exp2(before - top));
        work.mass[r] = work.mass[r] * fade;
        float* out = work.out.data() + r * dim;
        for (int64_t i = 0; i < dim; i += WIDTH) store(out + i, load(out + i) * fade);
    }

    // Weighs `count` scores of each row, whose maxima are `work.best`.
    void weigh_all(int64_t count) {
        for (int64_t r = 0; r < rows; ++r) {
            if (work.best[r] > work.top[r]) raise(r, work.best[r]);
            weigh(r, count, work.top[r], false);
        }
    }
};

}  // namespace quire::QUIRE_ISA
