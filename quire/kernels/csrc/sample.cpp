// Choosing tokens: masks, the largest logit, or a draw under temperature, top-k, top-p and min-p.
//
// Nothing is sorted but the few tokens at the border of top-p: the k-th largest logit is found
// among the tokens above a bound from block maxima, and the mass of top-p by a histogram.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t BLOCK = 64;

float largest(const float* x, int64_t count) {
    F best = splat(-INFINITY);
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) best = max(best, load(x + i));
    float top = max_lane(best);
    for (; i < count; ++i) top = std::max(top, x[i]);
    return top;
}

int64_t first_of(const float* x, int64_t count, float value) {
    for (int64_t i = 0; i < count; ++i)
        if (x[i] == value) return i;
    return 0;
}

float kth_largest(const float* x, int64_t count, int64_t k, std::vector<float>& room) {
    room.clear();
    for (int64_t i = 0; i < count; i += BLOCK)
        room.push_back(largest(x + i, std::min(BLOCK, count - i)));
    float bound = -INFINITY;  // at most the k-th largest: k blocks reach it
    if (k <= int64_t(room.size())) {
        std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<>());
        bound = room[k - 1];
    }
    room.clear();
    for (int64_t i = 0; i < count; ++i)
        if (x[i] >= bound) room.push_back(x[i]);
    std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<>());
    return room[k - 1];
}

// Zeroes the weights of all but the likeliest tokens whose mass reaches `share` of the total.
// `x` are the logits from the maximum down, in units of the temperature; `exact` the logits, which
// tell apart what the division has made equal.
void keep_mass(const float* x, const float* exact, float* weights, int64_t count, float share) {
    constexpr int64_t BINS = 512;
    constexpr float RANGE = 32;  // e^-32 and less goes into the last bin
    const auto bin = [](float below) {
        const float at = -below * (BINS / RANGE);
        return at < BINS - 1 ? int64_t(at) : BINS - 1;
    };
    double mass[BINS] = {}, total = 0;
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] > 0) mass[bin(x[i])] += weights[i];
    for (const double m : mass) total += m;
    double before = 0;
    int64_t border = 0;
    while (border < BINS - 1 && before + mass[border] < share * total) before += mass[border++];
    std::vector<int64_t> members;
    for (int64_t i = 0; i < count; ++i) {
        if (weights[i] <= 0) continue;
        const int64_t at = bin(x[i]);
        if (at == border) members.push_back(i);
        if (at > border) weights[i] = 0;
    }
    std::stable_sort(members.begin(), members.end(),
                     [&](int64_t a, int64_t b) { return exact[a] > exact[b]; });
    for (const int64_t i : members) {
        const float own = weights[i];
        if (before >= share * total) weights[i] = 0;
        before += own;
    }
}

int64_t draw(const float* weights, int64_t count, double point) {
    std::vector<double> blocks;
    double total = 0;
    for (int64_t i = 0; i < count; i += BLOCK) {
        double sum = 0;
        for (int64_t j = i; j < std::min(i + BLOCK, count); ++j) sum += weights[j];
        blocks.push_back(sum);
        total += sum;
    }
    point *= total;
    double before = 0;
    int64_t chosen = 0;  // the last token with mass, should rounding put the point past the end
    for (int64_t b = 0; b < int64_t(blocks.size()); ++b) {
        if (blocks[b] <= 0) continue;
        const bool here = before + blocks[b] > point;
        double reached = before;
        for (int64_t j = b * BLOCK; j < std::min((b + 1) * BLOCK, count); ++j) {
            if (weights[j] <= 0) continue;
            chosen = j;
            reached += weights[j];
            if (here && reached > point) return j;
        }
        before += blocks[b];
    }
    return chosen;
}

}  // namespace

void argmax(const float* logits, int64_t rows, int64_t vocab, int64_t* chosen) {
    parallel_ranges(rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* x = logits + row * vocab;
            chosen[row] = first_of(x, vocab, largest(x, vocab));
        }
    });
}

// Most words of a mask are all ones, which cost nothing, or all zeros.
void mask(const MaskArgs& args) {
    parallel_tasks(args.count, [&](int64_t i) {
        float* x = args.logits + args.rows[i] * args.vocab;
        const uint32_t* words = args.masks + i * args.words;
        for (int64_t at = 0; at < args.vocab; at += 32) {
            const uint32_t word = words[at / 32];
            if (word == 0xffffffffu) continue;
            const int64_t count = std::min<int64_t>(32, args.vocab - at);
            for (int64_t j = 0; j < count; ++j)
                x[at + j] = (word >> j) & 1 ? x[at + j] : -INFINITY;
        }
    });
}

void sample(const SampleArgs& args) {
    parallel_tasks(args.rows, [&](int64_t row) {
        thread_local std::vector<float> scaled, weights, room;
        scaled.resize(args.vocab);
        weights.resize(args.vocab);
        const float* x = args.logits + row * args.vocab;
        const float top = largest(x, args.vocab);
        const int64_t k = args.top_k[row];
        const float floor = k > 0 && k < args.vocab ? kth_largest(x, args.vocab, k, room) : -INFINITY;
        const float inverse = std::min(1 / args.temperature[row], 1e30f);  // times 0 is still 0
        const float least = args.min_p[row] > 0 ? std::log(args.min_p[row]) : -INFINITY;
        for (int64_t i = 0; i < args.vocab; i += WIDTH) {
            const int64_t count = args.vocab - i;
            const F logit = load_some(x + i, count);
            const F below = (logit - splat(top)) * splat(inverse);
            F weight = exp(below);
            QUIRE_EACH weight.part[p] =
                logit.part[p] < floor ? NativeF{} : weight.part[p];
            store_some(scaled.data() + i, below, count);
            store_some(weights.data() + i, weight, count);
        }
        if (args.top_p[row] < 1)
            keep_mass(scaled.data(), x, weights.data(), args.vocab, args.top_p[row]);
        if (args.min_p[row] > 0)
            for (int64_t i = 0; i < args.vocab; ++i)
                if (scaled[i] < least) weights[i] = 0;
        args.chosen[row] = draw(weights.data(), args.vocab, args.draws[row]);
    });
}

}  // namespace quire::QUIRE_ISA
