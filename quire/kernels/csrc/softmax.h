// What the attention kernels share: scores, masks, and the merging of partial results.
#pragma once

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

constexpr int64_t BLOCK = 16 * PAGE;  // keys scored at once
constexpr float NOTHING = -1e30f;    // maximum of a row that has seen no key; stays finite

// Workspaces begin at a cache line, so that no vector lies across two.
template <class T> struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    LineAllocator() = default;
    template <class Other> LineAllocator(const LineAllocator<Other>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* at, size_t) { ::operator delete(at, LINE); }
    template <class Other> bool operator==(const LineAllocator<Other>&) const { return true; }
};
template <class T> using Lines = std::vector<T, LineAllocator<T>>;

// Turns products of q and k into scores in units of log2, under a soft cap.
QUIRE_INLINE F capped(F x, float scale, float softcap) {
    return tanh(x * splat(scale / softcap)) * splat(softcap * LOG2E);
}

// -inf in the lanes outside [low, high).
QUIRE_INLINE F hide(F x, int64_t low, int64_t high) {
    float lanes[WIDTH];
    store(lanes, x);
    for (int64_t j = 0; j < WIDTH; ++j)
        if (j < low || j >= high) lanes[j] = -INFINITY;
    return load(lanes);
}

// The natural logarithm of `mass` times 2^top.
inline float log_of(float top, float mass) {
    return mass > 0 ? (top + std::log2(mass)) / LOG2E : -INFINITY;
}

// Calls body(task, KV head, workspace) for every task of a plan, a bundle at a time.
template <class Workspace, class Body>
void each_task(const AttentionPlan& plan, const Body& body) {
    const int64_t bundles = int64_t(plan.bundles.size()) - 1;
    parallel_tasks(bundles * plan.kv_heads, [&](int64_t i) {
        thread_local Workspace work;
        const int64_t bundle = i / plan.kv_heads;
        for (int64_t t = plan.bundles[bundle]; t < plan.bundles[bundle + 1]; ++t)
            body(plan.tasks[t], i % plan.kv_heads, work);
    });
}

// A partial result: `head_dim` sums of weighted values, the maximum in units of log2 that the weights
// refer to, and the weights' sum.
inline int64_t part_floats(const AttentionPlan& plan) { return plan.head_dim + 2; }

inline void save_part(float* to, int64_t dim, const float* sums, float top, float mass) {
    std::memcpy(to, sums, dim * sizeof(float));
    to[dim] = top;
    to[dim + 1] = mass;
}

// Adds weighted values, as in a part, to row `at` of normalised results `out` [tokens, heads, dim] and
// the logs of their weights' sums `lse`.
inline void join(int64_t at, float* out, float* lse, int64_t dim, float top, float mass,
                 const float* sums) {
    if (!(mass > 0)) return;
    const float before = lse[at] * LOG2E, more = top + std::log2(mass);
    const float most = std::max(before, more);
    const float old = std::exp2(before - most), added = std::exp2(more - most);
    const F keep = splat(old / (old + added)), take = splat(added / (old + added) / mass);
    for (int64_t i = at * dim; i < (at + 1) * dim; i += WIDTH, sums += WIDTH)
        store(out + i, fma(load(out + i), keep, load(sums) * take));
    lse[at] = (most + std::log2(old + added)) / LOG2E;
}

// Calls use(place in [tokens, heads], top, mass, sums) for every row that has saved parts, merged.
template <class Use>
void each_merged(const AttentionPlan& plan, const float* scratch, const Use& use) {
    const int64_t dim = plan.head_dim;
    const auto merge_row = [&](int64_t token, int64_t head) {
        const Part* first = plan.parts.data() + plan.part_start[token];
        const Part* last = plan.parts.data() + plan.part_start[token + 1];
        if (first != last && first->scratch < 0) return;
        const float* base = scratch + head * plan.scratch_floats;
        thread_local std::vector<float> sums;
        for (int64_t g = 0; g < plan.group; ++g) {
            const int64_t at = g * part_floats(plan);
            float top = NOTHING, mass = 0;
            for (const Part* p = first; p != last; ++p)
                top = std::max(top, base[p->scratch + at + dim]);
            sums.assign(dim, 0.0f);
            for (const Part* p = first; p != last; ++p) {
                const float* part = base + p->scratch + at;
                const float weight = std::exp2(part[dim] - top);
                mass += weight * part[dim + 1];
                for (int64_t i = 0; i < dim; i += WIDTH)
                    store(&sums[i], fma(splat(weight), load(part + i), load(&sums[i])));
            }
            use((token * plan.kv_heads + head) * plan.group + g, top, mass, sums.data());
        }
    };
    parallel_ranges(int64_t(plan.positions.size()), 16, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token)
            for (int64_t head = 0; head < plan.kv_heads; ++head) merge_row(token, head);
    });
}

}  // namespace quire::QUIRE_ISA
