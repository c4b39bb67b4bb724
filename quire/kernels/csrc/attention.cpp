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
#include "rows.h"
#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

namespace {

// Lines [first, last) of a page.
struct Share {
    int64_t first, last;
};

QUIRE_INLINE void ask(const uint32_t* page, Share lines, int64_t apart) {
    for (int64_t i = lines.first; i < lines.last; ++i)
        __builtin_prefetch(page + i * apart, 0, 2);
}

// Calls multiply(first row, rows, share) for the rows that are multiplied at once: each of these
// passes over the pages asks for its share of the `lines` of pages that come later. All of them in
// every pass cost more than they save.
template <class Multiply> void each_pass(int64_t rows, int64_t lines, const Multiply& multiply) {
    const int64_t passes = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t i = 0, row = 0; i < passes; ++i, row += MAX_ROWS)
        multiply(row, std::min<int64_t>(MAX_ROWS, rows - row),
                 Share{lines * i / passes, lines * (i + 1) / passes});
}

void save_lse(const AttentionArgs& args, int64_t at, float top, float mass) {
    if (args.lse != nullptr) args.lse[at] = log_of(top, mass);
}

template <class E> struct Task : Rows<E> {
    using T = typename E::Element;
    using Rows<E>::UNITS;
    using Rows<E>::rows;
    using Rows<E>::dim;
    using Rows<E>::dim_units;
    using Rows<E>::work;

    const AttentionArgs& args;
    const AttentionPlan& plan;
    const AttentionTask& task;
    const Read& read;
    const int64_t head;

    Task(const AttentionArgs& args, const AttentionTask& task, int64_t head, Workspace& work)
        : Rows<E>(task.rows * args.plan->group, args.plan->head_dim, args.scale, args.softcap,
                  work),
          args(args), plan(*args.plan), task(task), read(args.plan->reads[task.read]), head(head) {
        const T* q = static_cast<const T*>(args.q) + head * plan.group * dim;
        for (int64_t r = 0; r < task.rows; ++r)
            this->set_q(r * plan.group, plan.group, q + (task.row + r) * args.q_stride);
    }

    // Last key, exclusive, that this layer and head may read.
    int64_t last_key() const {
        if (plan.kept.empty()) return task.last_key;
        const int64_t at = (task.read * plan.layers + args.layer) * plan.kv_heads + head;
        return std::min<int64_t>(task.last_key, plan.kept[at]);
    }

    int64_t last_page(int64_t last_key) const { return (read.offset + last_key + PAGE - 1) / PAGE; }

    // Products of q and k over pages [first, last) of the read, and for each row the largest score
    // (in units of log2) among the keys that it may see; the others become -inf.
    void score(int64_t first, int64_t last, int64_t last_key, float* best) {
        const int32_t* pages = plan.pages.data() + read.page + first;
        const auto* keys = static_cast<const uint32_t*>(args.keys) + head * PAGE * dim_units;
        const int64_t page_units = plan.kv_heads * PAGE * dim_units, count = (last - first) * PAGE;
        const int64_t left = last_page(last_key) - 1 - first;
        each_pass(rows, dim_units, [&](int64_t row, int64_t rows, Share lines) {
            product<E>(
                work.scores.data() + row * BLOCK, BLOCK, work.q.data() + row * dim_units, dim_units,
                [=](int64_t tile, int64_t) {
                    if (tile + AHEAD <= left)
                        ask(keys + pages[tile + AHEAD] * page_units, lines, PAGE);
                    return keys + pages[tile] * page_units;
                },
                rows, last - first, 1, dim_units, PAGE, false);
        });
        const int64_t shift = first * PAGE - read.offset;  // key of the block's first lane
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t place = plan.positions[task.row + r / plan.group] - read.position;
            int64_t low = task.first_key;
            if (plan.window) low = std::max(low, place - plan.window + 1);
            const int64_t high = std::min(last_key, place + 1);
            best[r] = this->largest(work.scores.data() + r * BLOCK, count, low - shift,
                                    high - shift);
        }
    }

    template <class Product> void add_values(int64_t first, int64_t last) {
        constexpr int64_t steps = PAGE / E::PACK;
        const int32_t* pages = plan.pages.data() + read.page + first;
        const auto* values = static_cast<const uint32_t*>(args.values) + head * steps * dim;
        const int64_t page_units = plan.kv_heads * steps * dim, wide = dim;
        const int64_t left = last_page(last_key()) - 1 - first;
        each_pass(rows, steps, [&](int64_t row, int64_t rows, Share lines) {
            product<Product>(
                work.out.data() + row * wide, wide, work.weights.data() + row * UNITS, UNITS,
                [=](int64_t tile, int64_t run) {
                    const uint32_t* column = values + tile * WIDTH;
                    if (run + AHEAD <= left)
                        ask(column + pages[run + AHEAD] * page_units, lines, wide);
                    return column + pages[run] * page_units;
                },
                rows, wide / WIDTH, last - first, steps, wide, true);
        });
    }

    // Calls use(first page, last page, maxima of the rows) for each block of scored keys.
    template <class Use> void each_block(const Use& use) {
        const int64_t last_key = this->last_key(), end = last_page(last_key);
        for (int64_t first = (read.offset + task.first_key) / PAGE; first < end;) {
            const int64_t last = std::min(end, first + BLOCK / PAGE);
            score(first, last, last_key, work.best.data());
            use(first, last, work.best.data());
            first = last;
        }
    }

    void run() {
        each_block([&](int64_t first, int64_t last, const float*) {
            this->weigh_all((last - first) * PAGE);
            add_values<E>(first, last);
        });
        if (task.scratch < 0)
            finish();
        else
            save();
    }

    void finish() {
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = task.row + r / plan.group;
            const int64_t at = head * plan.group + r % plan.group;
            T* to = static_cast<T*>(args.out) + (token * plan.kv_heads * plan.group + at) * dim;
            const float* out = work.out.data() + r * dim;
            const float mass = sum(work.mass[r]);
            const F share = splat(mass > 0 ? 1 / mass : 0);
            for (int64_t i = 0; i < dim; i += WIDTH) store(to + i, load(out + i) * share);
            save_lse(args, token * plan.kv_heads * plan.group + at, work.top[r], mass);
        }
    }

    float* saved(int64_t r) {
        return args.scratch + head * plan.scratch_floats + task.scratch + r * (dim + 2);
    }

    void save() {
        for (int64_t r = 0; r < rows; ++r)
            save_part(saved(r), dim, work.out.data() + r * dim, work.top[r], sum(work.mass[r]));
    }

    // The two passes of `attend_in_order`.
    void save_maxima() {
        each_block([&](int64_t, int64_t, const float* best) {
            for (int64_t r = 0; r < rows; ++r) work.top[r] = std::max(work.top[r], best[r]);
        });
        for (int64_t r = 0; r < rows; ++r) saved(r)[dim] = work.top[r];
    }

    static F first_lane(float x) {
        float lanes[WIDTH] = {x};
        return load(lanes);
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
                work.mass[r] = first_lane(before[dim + 1]);
            }
        }
        each_block([&](int64_t first, int64_t last, const float*) {
            const int64_t count = (last - first) * PAGE;
            for (int64_t r = 0; r < rows; ++r) {
                this->weigh(r, count, work.top[r], true);
                const float* weights = work.scores.data() + r * BLOCK;
                float mass = sum(work.mass[r]);
                for (int64_t i = 0; i < count; ++i) mass += weights[i];
                work.mass[r] = first_lane(mass);
            }
            add_values<typename E::Chain>(first, last);
        });
        for (int64_t r = 0; r < rows; ++r) {
            float* to = saved(r);
            std::memcpy(to, work.out.data() + r * dim, dim * sizeof(float));
            to[dim + 1] = sum(work.mass[r]);
        }
        // Later parts overwrite what an earlier one writes here; the last is the whole.
        finish();
    }
};

template <class E> void attend_with(const AttentionArgs& args) {
    using T = typename E::Element;
    const AttentionPlan& plan = *args.plan;
    each_task<Workspace>(plan, [&](const AttentionTask& task, int64_t head, Workspace& work) {
        Task<E>(args, task, head, work).run();
    });
    each_merged(plan, args.scratch, [&](int64_t at, float top, float mass, const float* sums) {
        T* to = static_cast<T*>(args.out) + at * plan.head_dim;
        const F share = splat(mass > 0 ? 1 / mass : 0);
        for (int64_t i = 0; i < plan.head_dim; i += WIDTH) store(to + i, load(sums + i) * share);
        save_lse(args, at, top, mass);
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
