// Which chunks of keys queries read: the products with the chunks' means, a softmax for each query
// head, the largest share that any head of a KV head's group gives, and the chunks that have most.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

struct ChooseWorkspace {
    std::vector<float> scores, best, sorted;
    std::vector<uint32_t> q;
};

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
    for (int64_t g = 0; g < args.group; ++g) {
        float* s = work.scores.data() + g * wide;
        for (int64_t c = 0; c < wide; ++c)
            if (c >= args.chunks || skipped[c]) s[c] = -INFINITY;
        F most = splat(-INFINITY), total = splat(0);
        for (int64_t c = 0; c < wide; c += WIDTH) {
            const F x = load(s + c) * factor;
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
    for (int64_t c = 0; c < args.chunks; ++c)
        if (!skipped[c] && !(work.best[c] >= -FLT_MAX)) work.best[c] = -FLT_MAX;  // NaN has no order
    work.sorted.assign(work.best.begin(), work.best.begin() + args.chunks);
    const auto least = work.sorted.begin() + args.count - 1;
    std::nth_element(work.sorted.begin(), least, work.sorted.end(), std::greater<float>());
    const float border = *least;
    int64_t equals = args.count;
    for (int64_t c = 0; c < args.chunks; ++c) equals -= work.best[c] > border;
    int64_t* to = args.places + (row * args.kv_heads + head) * args.stride;
    for (int64_t c = 0; c < args.chunks; ++c) {
        if (!(work.best[c] > border) && !(work.best[c] == border && equals-- > 0)) continue;
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
