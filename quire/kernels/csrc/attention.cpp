// Attention over the prefix tree: dense tiles of query rows times KV pages.
//
// A task takes the rows of some readers (times the query heads of a KV head's group) over a range
// of a segment's keys, with the softmax computed online (FlashAttention-2, arXiv 2307.08691). A row
// with several tasks has its partial results merged by their log-sum-exp, as in FlashDecoding.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t BLOCK = 8 * PAGE;  // keys scored at once
constexpr float NOTHING = -1e30f;    // maximum of a row that has seen no key; stays finite

struct Workspace {
    std::vector<float> scores, out, top, mass, best;
    std::vector<uint32_t> q, weights;  // units
};

// Scores of one row in units of log2, masked to lanes [low, high) of `count`; returns the largest.
QUIRE_INLINE float prepare_row(
    float* s, int64_t count, int64_t low, int64_t high, float scale, float softcap) {
    F best = splat(NOTHING);
    for (int64_t i = 0; i < count; i += WIDTH) {
        F x = load(s + i);
        x = softcap > 0 ? tanh(x * splat(scale / softcap)) * splat(softcap * LOG2E)
                        : x * splat(scale * LOG2E);
        if (i < low || i + WIDTH > high) {
            float lanes[WIDTH];
            store(lanes, x);
            for (int64_t j = 0; j < WIDTH; ++j)
                if (i + j < low || i + j >= high) lanes[j] = -INFINITY;
            x = load(lanes);
        }
        store(s + i, x);
        best = max(best, x);
    }
    return max_lane(best);
}

template <class E> struct Task {
    using T = typename E::Element;
    static constexpr int64_t UNITS = BLOCK / E::PACK;  // of a row of weights

    const AttentionArgs& args;
    const AttentionPlan& plan;
    const AttentionTask& task;
    const Read& read;
    const int64_t head, rows, dim, dim_units;
    Workspace& work;

    Task(const AttentionArgs& args, const AttentionTask& task, int64_t head, Workspace& work)
        : args(args), plan(*args.plan), task(task), read(args.plan->reads[task.read]), head(head),
          rows(task.rows * plan.group), dim(plan.head_dim), dim_units(plan.head_dim / E::PACK),
          work(work) {
        work.q.resize(rows * dim_units);
        work.scores.resize(rows * BLOCK);
        work.weights.resize(rows * UNITS);
        work.out.assign(rows * dim, 0.0f);
        work.top.assign(rows, NOTHING);
        work.mass.assign(rows, 0.0f);
        const T* q = static_cast<const T*>(args.q) + head * plan.group * dim;
        for (int64_t r = 0; r < task.rows; ++r)
            std::memcpy(work.q.data() + r * plan.group * dim_units,
                        q + (task.row + r) * args.q_stride, plan.group * dim * sizeof(T));
    }

    // Last key, exclusive, that this layer and head may read.
    int64_t last_key() const {
        if (plan.kept.empty()) return task.last_key;
        const int64_t at = (task.read * plan.layers + args.layer) * plan.kv_heads + head;
        return std::min<int64_t>(task.last_key, plan.kept[at]);
    }

    // Calls use(first page of the run, pages, offset in the block) for runs of adjacent pages.
    template <class Use> void runs(int64_t first, int64_t last, const Use& use) const {
        const int32_t* pages = plan.pages.data() + read.page;
        for (int64_t at = first; at < last;) {
            int64_t end = at + 1;
            while (end < last && pages[end] == pages[end - 1] + 1) ++end;
            use(pages[at], end - at, at - first);
            at = end;
        }
    }

    // Scores of all rows over pages [first, last) of the read, masked; maxima into `best`.
    void score(int64_t first, int64_t last, int64_t last_key, float* best) {
        const auto* keys = static_cast<const uint32_t*>(args.keys) +
                           head * args.head_stride / E::PACK;
        runs(first, last, [&](int64_t page, int64_t count, int64_t at) {
            product<E>(work.scores.data() + at * PAGE, BLOCK, work.q.data(), dim_units,
                       keys + page * PAGE * dim_units, PAGE * dim_units, PAGE, rows, count,
                       dim_units, false);
        });
        const int64_t shift = first * PAGE - read.offset;  // key of the block's first lane
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t place = plan.positions[task.row + r / plan.group] - read.position;
            int64_t low = task.first_key;
            if (plan.window) low = std::max(low, place - plan.window + 1);
            const int64_t high = std::min(last_key, place + 1);
            best[r] = prepare_row(work.scores.data() + r * BLOCK, (last - first) * PAGE,
                                  low - shift, high - shift, args.scale, args.softcap);
        }
    }

    // Weights 2^(score - top) of one row of `count` scores, as units; returns their sum.
    float weigh(int64_t r, int64_t count, float top) {
        float* s = work.scores.data() + r * BLOCK;
        T* w = reinterpret_cast<T*>(work.weights.data() + r * UNITS);
        F total = splat(0);
        for (int64_t i = 0; i < count; i += WIDTH) {
            F x = exp2(load(s + i) - splat(top));
            total = total + x;
            store(s + i, x);
            store(w + i, x);
        }
        return sum(total);
    }

    template <class Product> void add_values(int64_t first, int64_t last) {
        const auto* values = static_cast<const uint32_t*>(args.values) +
                             head * args.head_stride / E::PACK;
        constexpr int64_t page_units = PAGE / E::PACK;
        runs(first, last, [&](int64_t page, int64_t count, int64_t at) {
            product<Product>(work.out.data(), dim, work.weights.data() + at * page_units, UNITS,
                             values + page * page_units * dim, WIDTH, dim, rows, dim / WIDTH,
                             count * page_units, true);
        });
    }

    // Calls use(first page, last page, maxima of the rows) for each block of scored keys.
    template <class Use> void each_block(const Use& use) {
        const int64_t last_key = this->last_key();
        const int64_t end = (read.offset + last_key + PAGE - 1) / PAGE;
        work.best.resize(rows);
        for (int64_t first = (read.offset + task.first_key) / PAGE; first < end;) {
            const int64_t last = std::min(end, first + BLOCK / PAGE);
            score(first, last, last_key, work.best.data());
            use(first, last, work.best.data());
            first = last;
        }
    }

    void run() {
        each_block([&](int64_t first, int64_t last, const float* best) {
            for (int64_t r = 0; r < rows; ++r) {
                if (best[r] > work.top[r]) raise(r, best[r]);
                work.mass[r] += weigh(r, (last - first) * PAGE, work.top[r]);
            }
            add_values<E>(first, last);
        });
        if (task.scratch < 0)
            finish();
        else
            save();
    }

    // Makes `top` the maximum that row r's sums refer to.
    void raise(int64_t r, float top) {
        const float fade = std::exp2(work.top[r] - top);
        work.top[r] = top;
        work.mass[r] *= fade;
        float* out = work.out.data() + r * dim;
        for (int64_t i = 0; i < dim; i += WIDTH) store(out + i, load(out + i) * splat(fade));
    }

    void finish() {
        for (int64_t r = 0; r < rows; ++r)
            write_row(r, work.out.data() + r * dim, work.mass[r]);
    }

    void write_row(int64_t r, const float* out, float mass) {
        const int64_t token = task.row + r / plan.group;
        const int64_t at = head * plan.group + r % plan.group;
        T* to = static_cast<T*>(args.out) + (token * plan.kv_heads * plan.group + at) * dim;
        const F share = splat(mass > 0 ? 1 / mass : 0);
        for (int64_t i = 0; i < dim; i += WIDTH) store(to + i, load(out + i) * share);
    }

    float* saved(int64_t r) {
        return args.scratch + head * plan.scratch_floats + task.scratch + r * (dim + 2);
    }

    void save() {
        for (int64_t r = 0; r < rows; ++r) {
            float* to = saved(r);
            std::memcpy(to, work.out.data() + r * dim, dim * sizeof(float));
            to[dim] = work.top[r];
            to[dim + 1] = work.mass[r];
        }
    }

    // The two passes of `attend_in_order`.
    void save_maxima() {
        each_block([&](int64_t, int64_t, const float* best) {
            for (int64_t r = 0; r < rows; ++r) work.top[r] = std::max(work.top[r], best[r]);
        });
        for (int64_t r = 0; r < rows; ++r) saved(r)[dim] = work.top[r];
    }

    void run_in_order() {
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = task.row + r / plan.group;
            const Part* first = plan.parts.data() + plan.part_start[token];
            const Part* last = plan.parts.data() + plan.part_start[token + 1];
            const float* base = args.scratch + head * plan.scratch_floats;
            const int64_t at = r % plan.group * (dim + 2);
            const float* before = nullptr;
            for (const Part* p = first; p != last; ++p) {
                const float* part = base + p->scratch + at;
                work.top[r] = std::max(work.top[r], part[dim]);
                if (p + 1 != last && base + p[1].scratch + at == saved(r)) before = part;
            }
            if (before != nullptr) {
                std::memcpy(work.out.data() + r * dim, before, dim * sizeof(float));
                work.mass[r] = before[dim + 1];
            }
        }
        each_block([&](int64_t first, int64_t last, const float*) {
            for (int64_t r = 0; r < rows; ++r) {
                weigh(r, (last - first) * PAGE, work.top[r]);
                const float* s = work.scores.data() + r * BLOCK;  // now the weights in float
                for (int64_t i = 0; i < (last - first) * PAGE; ++i) work.mass[r] += s[i];
            }
            add_values<typename E::Chain>(first, last);
        });
        for (int64_t r = 0; r < rows; ++r) {
            float* to = saved(r);
            std::memcpy(to, work.out.data() + r * dim, dim * sizeof(float));
            to[dim + 1] = work.mass[r];
        }
        // Later parts overwrite what an earlier one writes here; the last is the whole.
        finish();
    }
};

template <class T>
void merge_row(const AttentionArgs& args, int64_t token, int64_t head) {
    const AttentionPlan& plan = *args.plan;
    const int64_t dim = plan.head_dim;
    const Part* first = plan.parts.data() + plan.part_start[token];
    const Part* last = plan.parts.data() + plan.part_start[token + 1];
    if (first != last && first->scratch < 0) return;
    const float* base = args.scratch + head * plan.scratch_floats;
    T* to = static_cast<T*>(args.out) + (token * plan.kv_heads + head) * plan.group * dim;
    for (int64_t g = 0; g < plan.group; ++g, to += dim) {
        const int64_t at = g * (dim + 2);
        float top = NOTHING, mass = 0;
        for (const Part* p = first; p != last; ++p)
            top = std::max(top, base[p->scratch + at + dim]);
        for (const Part* p = first; p != last; ++p)
            mass += std::exp2(base[p->scratch + at + dim] - top) * base[p->scratch + at + dim + 1];
        for (int64_t i = 0; i < dim; i += WIDTH) {
            F sum = splat(0);
            for (const Part* p = first; p != last; ++p) {
                const float* part = base + p->scratch + at;
                sum = fma(splat(std::exp2(part[dim] - top)), load(part + i), sum);
            }
            store(to + i, sum * splat(mass > 0 ? 1 / mass : 0));
        }
    }
}

template <class E> void attend_with(const AttentionArgs& args) {
    const AttentionPlan& plan = *args.plan;
    const int64_t bundles = int64_t(plan.bundles.size()) - 1;
    parallel_tasks(bundles * plan.kv_heads, [&](int64_t i) {
        thread_local Workspace work;
        const int64_t bundle = i / plan.kv_heads;
        for (int64_t t = plan.bundles[bundle]; t < plan.bundles[bundle + 1]; ++t)
            Task<E>(args, plan.tasks[t], i % plan.kv_heads, work).run();
    });
    const int64_t tokens = int64_t(plan.positions.size());
    parallel_ranges(tokens, 16, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token)
            for (int64_t head = 0; head < plan.kv_heads; ++head)
                merge_row<typename E::Element>(args, token, head);
    });
}

// The same with every sum taken key by key in the order of the path, against the row's maximum over
// the whole path: a row's result then does not depend on where segments or pages begin, nor on
// who else reads them. Reads of one level follow from no other read of that level.
template <class E> void attend_in_order(const AttentionArgs& args) {
    const AttentionPlan& plan = *args.plan;
    const auto each = [&](int64_t first, int64_t last, auto use) {
        parallel_tasks((last - first) * plan.kv_heads, [&](int64_t i) {
            thread_local Workspace work;
            Task<E> task(args, plan.tasks[first + i / plan.kv_heads], i % plan.kv_heads, work);
            use(task);
        });
    };
    each(0, int64_t(plan.tasks.size()), [](Task<E>& task) { task.save_maxima(); });
    for (size_t level = 0; level + 1 < plan.bundles.size(); ++level)
        each(plan.bundles[level], plan.bundles[level + 1],
             [](Task<E>& task) { task.run_in_order(); });
}

}  // namespace

void attend(const AttentionArgs& args) {
    if (args.plan->in_order)
        args.bf16 ? attend_in_order<Bf16>(args) : attend_in_order<Float>(args);
    else
        args.bf16 ? attend_with<Bf16>(args) : attend_with<Float>(args);
}

}  // namespace quire::QUIRE_ISA
