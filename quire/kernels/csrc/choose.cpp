// Which chunks of keys queries read: the products with the chunks' means, a softmax for each query
// head, the largest share that any head of a KV head's group gives, and the chunks that have most.

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
    std::vector<float> scores, best, hidden;
    std::vector<int32_t> order;
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

// The count-th largest of `n`, bit by bit: counting is faster than partial sorting, whose branches
// nobody can predict.
inline int32_t largest(const int32_t* x, int64_t n, int64_t count) {
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (at_least(x, n, middle) >= count)
            low = middle;
        else
            high = middle - 1;
    }
    return int32_t(low);
}

template <class E> void choose_one(const ChooseArgs& args, int64_t row, int64_t head) {
    using T = typename E::Element;
    thread_local ChooseWorkspace work;
    const int64_t dim = args.head_dim, steps = dim / E::PACK;
    const int64_t tiles = (args.chunks + WIDTH - 1) / WIDTH, wide = tiles * WIDTH;
    work.scores.resize(args.group * wide);
    work.best.assign(wide, -INFINITY);
    work.q.resize(args.group * steps);
    std::memcpy(work.q.data(),
                static_cast<const T*>(args.q) + row * args.q_stride + head * args.group * dim,
                args.group * dim * sizeof(T));
    const auto* means = static_cast<const uint32_t*>(args.means) + head * wide * steps;
    product<E>(
        work.scores.data(), wide, work.q.data(), steps,
        [=](int64_t tile, int64_t) { return means + tile * WIDTH * steps; }, args.group, tiles, 1,
        steps, WIDTH, false);
    const uint8_t* skipped = args.skipped + head * args.chunks;
    const F factor = splat(args.scale * LOG2E);
    work.hidden.assign(wide, -INFINITY);
    for (int64_t c = 0; c < args.chunks; ++c) work.hidden[c] = skipped[c] ? -INFINITY : 0;
    for (int64_t g = 0; g < args.group; ++g) {
        float* s = work.scores.data() + g * wide;
        F most = splat(-INFINITY), total = splat(0);
        for (int64_t c = 0; c < wide; c += WIDTH) {
            const F x = fma(load(s + c), factor, load(&work.hidden[c]));
            store(s + c, x);
            most = max(most, x);
        }
        const float top = max_lane(most);
        if (top == -INFINITY) continue;
        for (int64_t c = 0; c < wide; c += WIDTH) total = total + exp2(load(s + c) - splat(top));
        const F shift = splat(top + std::log2(sum(total)));
        for (int64_t c = 0; c < wide; c += WIDTH)
            store(&work.best[c], max(load(&work.best[c]), load(s + c) - shift));
    }
    // All above the count-th largest, and as many of its equals as fit, in the order of their chunks.
    work.order.resize(args.chunks);
    int32_t* order = work.order.data();
    for (int64_t c = 0; c < args.chunks; ++c) {
        const float x = work.best[c] >= -FLT_MAX ? work.best[c] : -FLT_MAX;  // NaN has no order
        order[c] = skipped[c] ? INT32_MIN : ordered(x);
    }
    const int32_t border = largest(order, args.chunks, args.count);
    int64_t equals = args.count - at_least(order, args.chunks, int64_t(border) + 1);
    int64_t* to = args.places + (row * args.kv_heads + head) * args.stride;
    for (int64_t c = 0; c < args.chunks; ++c) {
        if (!(order[c] > border) && !(order[c] == border && equals-- > 0)) continue;
        for (int64_t i = 0; i < args.run; ++i) *to++ = c * args.run + i;
    }
}

}  // namespace

void choose(const ChooseArgs& args) {
    parallel_tasks(args.rows * args.kv_heads, [&](int64_t i) {
        const int64_t row = i / args.kv_heads, head = i % args.kv_heads;
        args.bf16 ? choose_one<Bf16>(args, row, head) : choose_one<Float>(args, row, head);
    });
}

}  // namespace quire::QUIRE_ISA
