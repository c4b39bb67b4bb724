// Which chunks of keys queries read: the products with the chunks' means, a softmax for each query
// head, the largest share that any head of a KV head's group gives, and the chunks that have most.
// All segments of a step in one loop.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

struct ChooseWorkspace {
    std::vector<float> scores, best;
    std::vector<int32_t> order;
    std::vector<int64_t> apart;
    std::vector<uint32_t> q;
};

// An integer that compares with others as `x` does with their floats; never the least of all.
inline int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? -(bits & INT32_MAX) : bits;
}

inline int64_t at_least(const int32_t* x, int64_t n, int64_t border) {
    int32_t found = 0;
    if (border > INT32_MAX) return 0;
    for (int64_t i = 0; i < n; ++i) found += x[i] >= int32_t(border);
    return found;
}

// A border with just `count` of `n` at or above it, or else the count-th largest. Bit by bit: counting
// is faster than partial sorting, whose branches nobody can predict.
inline int32_t border_of(const int32_t* x, int64_t n, int64_t count) {
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const int64_t found = at_least(x, n, middle);
        if (found == count) return int32_t(middle);
        if (found > count)
            low = middle;
        else
            high = middle - 1;
    }
    return int32_t(low);
}

constexpr int64_t AHEAD = 8;  // tiles of means that are asked for while others are multiplied

template <class E>
void choose_one(const ChooseArgs& args, const ChooseRead& read, int64_t row, int64_t head) {
    using T = typename E::Element;
    thread_local ChooseWorkspace work;
    const int64_t dim = args.head_dim, steps = dim / E::PACK, known = read.known;
    const int64_t tiles = (known + WIDTH - 1) / WIDTH, wide = tiles * WIDTH;
    work.scores.resize(args.group * wide);
    work.best.assign(wide, -INFINITY);
    work.q.resize(args.group * steps);
    std::memcpy(work.q.data(),
                static_cast<const T*>(args.q) + (read.row + row) * args.q_stride +
                    head * args.group * dim,
                args.group * dim * sizeof(T));
    const auto* means = static_cast<const uint32_t*>(read.means) + head * wide * steps;
    product_of_group<E>(
        work.scores.data(), wide, work.q.data(), steps,
        [=](int64_t tile, int64_t) {
            const int64_t next = std::min(tile + AHEAD, tiles - 1);
            return AskingRows{means + tile * WIDTH * steps, means + next * WIDTH * steps};
        },
        args.group, tiles, 1, steps, WIDTH, false);
    const uint8_t* always = read.always + head * known;
    work.apart.clear();  // what takes no part
    for (int64_t c = 0; c < known; ++c)
        if (always[c]) work.apart.push_back(c);
    for (int64_t c = known; c < wide; ++c) work.apart.push_back(c);
    const F factor = splat(args.scale * LOG2E);
    float* best = work.best.data();
    for (int64_t g = 0; g < args.group; ++g) {
        float* s = work.scores.data() + g * wide;
        for (const int64_t c : work.apart) s[c] = -INFINITY;
        F most = splat(-INFINITY), total = splat(0);
        for (int64_t c = 0; c < wide; c += WIDTH) most = max(most, load(s + c));
        const float top = max_lane(most) * args.scale * LOG2E;
        if (top == -INFINITY) continue;
        for (int64_t c = 0; c < wide; c += WIDTH)
            total = total + exp2(fma(load(s + c), factor, splat(-top)));
        const F shift = splat(-top - std::log2(sum(total)));
        for (int64_t c = 0; c < wide; c += WIDTH)
            store(best + c, max(load(best + c), fma(load(s + c), factor, shift)));
    }
    work.order.resize(known);
    int32_t* order = work.order.data();
    for (int64_t c = 0; c < known; ++c)
        order[c] = ordered(best[c] >= -FLT_MAX ? best[c] : -FLT_MAX);  // NaN has no order
    for (const int64_t c : work.apart)
        if (c < known) order[c] = INT32_MAX;
    const int32_t border = border_of(order, known, read.count);
    int64_t extra = at_least(order, known, border) - read.count;
    for (int64_t c = known - 1; extra > 0; --c)  // of equals the first are taken
        if (order[c] == border) {
            order[c] = INT32_MIN;
            --extra;
        }
    int64_t* to = read.chunks + (row * args.kv_heads + head) * (read.count + read.all - known);
    const int64_t* end = to + read.count;
    for (int64_t c = 0; to != end; ++c) {  // without branches
        *to = c;
        to += order[c] >= border;
    }
    for (int64_t c = known; c < read.all; ++c) *to++ = c;
}

}  // namespace

void choose(const ChooseArgs& args) {
    struct One {
        const ChooseRead* read;
        int64_t row, head;
    };
    std::vector<One> tasks;  // rows of one segment follow each other: its means stay in a cache
    for (const ChooseRead& read : args.reads)
        for (int64_t head = 0; head < args.kv_heads; ++head)
            for (int64_t row = 0; row < read.rows; ++row) tasks.push_back({&read, row, head});
    parallel_tasks(int64_t(tasks.size()), [&](int64_t i) {
        const auto& [read, row, head] = tasks[i];
        args.bf16 ? choose_one<Bf16>(args, *read, row, head)
                  : choose_one<Float>(args, *read, row, head);
    });
}

}  // namespace quire::QUIRE_ISA
