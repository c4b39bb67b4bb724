// Attention over the prefix tree: dense tiles of query rows times KV pages.
//
// A task takes the rows of some readers (times the query heads of a KV head's group) over a range
// of a segment's keys, with the softmax computed online (FlashAttention-2, arXiv 2307.08691). A row
// with several tasks has its partial results merged by their log-sum-exp, as in FlashDecoding.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

namespace {

struct Workspace {
    Lines<float> scores, out, top, best;
    Lines<F> mass;                // of each row, by lane
    Lines<uint32_t> q, weights;  // units
};

void save_lse(const AttentionArgs& args, int64_t at, float top, float mass) {
    if (args.lse != nullptr) args.lse[at] = log_of(top, mass);
}

// Pages of keys or values that are asked for while others are multiplied: neighbours in a segment lie
// apart in memory, where the processor does not foresee them. Asked for all at once they would stall
// it as long as they take.
constexpr int64_t AHEAD = BLOCK / PAGE;

QUIRE_INLINE void ask(const uint32_t* from, int64_t lines, int64_t apart) {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * apart, 0, 2);
}

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
        for (int64_t i = 0; i < count; i += WIDTH) {
            const F x = exp2(fma(load(s + i), factor, shift));
            total = total + x;
            if (keep) store(s + i, x);
            store(w + i, x);
        }
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
        const int64_t lines = dim_units, left = last_page(last_key) - 1 - first;
        product<E>(
            work.scores.data(), BLOCK, work.q.data(), dim_units,
            [=](int64_t tile, int64_t) {
                ask(keys + pages[std::min(tile + AHEAD, left)] * page_units, lines, PAGE);
                return keys + pages[tile] * page_units;
            },
            rows, last - first, 1, dim_units, PAGE, false);
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
        product<Product>(
            work.out.data(), dim, work.weights.data(), UNITS,
            [=](int64_t tile, int64_t run) {
                const uint32_t* column = values + tile * WIDTH;
                ask(column + pages[std::min(run + AHEAD, left)] * page_units, steps, wide);
                return column + pages[run] * page_units;
            },
            rows, dim / WIDTH, last - first, steps, dim, true);
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

// --- chosen keys ---------------------------------------------------------------------------------

// What is read of one row and head, in tiles of two half pages: whole pages, where both halves have
// something to read, then pairs of single halves, so that reading few keys here and there costs
// little more than those keys do. Half a page of values is half of its lines; of keys it is half of
// each line.
constexpr int64_t HALF = PAGE / 2;

struct Chosen {
    std::vector<int64_t> halves;  // of each tile its two: 2 * page + half
    std::vector<uint16_t> seen;   // of each tile the slots that are read, a bit for each
    int64_t wholes;               // leading tiles that are pages
    Workspace work;

    // What the reads choose for one row and head; false where a chunk is not in its segment.
    bool gather(const FetchArgs& args, int64_t row, int64_t head) {
        halves.clear();
        seen.clear();
        singles.clear();
        bits.clear();
        bool inside = true;
        for (const FetchRead& read : args.reads)
            if (row >= read.row && row < read.row + read.rows) {
                if (!mark(args, read, row, head)) inside = false;
                list(read);
            }
        wholes = int64_t(seen.size());
        if (singles.size() % 2) {  // half a page that is not read
            singles.push_back(singles.back());
            bits.push_back(0);
        }
        for (size_t i = 0; i < singles.size(); i += 2) {
            halves.push_back(singles[i]);
            halves.push_back(singles[i + 1]);
            seen.push_back(uint16_t(bits[i] | bits[i + 1] << HALF));
        }
        return inside;
    }

  private:
    std::vector<uint16_t> marks;   // of each page of one read, a bit for each slot
    std::vector<int64_t> singles;  // halves alone on their page
    std::vector<uint16_t> bits;    // of those

    bool mark(const FetchArgs& args, const FetchRead& read, int64_t row, int64_t head) {
        const int64_t at = ((row - read.row) * args.kv_heads + head) * read.count;
        const int64_t* chunks = read.chunks + at;
        const uint8_t* mask = read.mask == nullptr ? nullptr : read.mask + at;
        const int64_t last = (read.entries + read.size - 1) / read.size;
        const int64_t low =
            args.window ? args.positions[row] - args.window + 1 - read.position : 0;
        marks.assign((read.offset + read.entries + PAGE - 1) / PAGE, 0);
        bool inside = true;
        for (int64_t i = 0; i < read.count; ++i) {
            if (mask != nullptr && !mask[i]) continue;
            if (uint64_t(chunks[i]) >= uint64_t(last)) {
                inside = false;
                continue;
            }
            const int64_t first = chunks[i] * read.size;
            int64_t slot = read.offset + std::max(first, low);
            const int64_t stop = read.offset + std::min(first + read.size, read.entries);
            while (slot < stop) {
                const int64_t page = slot / PAGE, end = std::min(stop, (page + 1) * PAGE);
                marks[page] |= uint16_t(((1u << (end - slot)) - 1) << (slot % PAGE));
                slot = end;
            }
        }
        return inside;
    }

    // Sorts the marked pages, without branches: which of them are marked nobody can predict.
    void list(const FetchRead& read) {
        const int64_t pages = int64_t(marks.size());
        size_t whole = seen.size(), single = singles.size();
        halves.resize(2 * (whole + pages));
        seen.resize(whole + pages);
        singles.resize(single + pages);
        bits.resize(single + pages);
        for (int64_t i = 0; i < pages; ++i) {
            const uint32_t low = marks[i] & 0xff, high = marks[i] >> HALF;
            const int64_t place = 2 * int64_t(read.page[i]);
            halves[2 * whole] = place;
            halves[2 * whole + 1] = place + 1;
            seen[whole] = marks[i];
            whole += low && high;
            singles[single] = place + (high != 0);
            bits[single] = uint16_t(low | high);
            single += !low != !high;
        }
        halves.resize(2 * whole);
        seen.resize(whole);
        singles.resize(single);
        bits.resize(single);
    }
};

template <class E> struct ChosenTask : Rows<E> {
    using T = typename E::Element;
    using Rows<E>::UNITS;
    using Rows<E>::rows;
    using Rows<E>::dim;
    using Rows<E>::dim_units;
    using Rows<E>::scale;
    using Rows<E>::softcap;
    using Rows<E>::work;
    static constexpr int64_t TILES = BLOCK / PAGE;  // of a block

    const FetchArgs& args;
    const Chosen& chosen;
    const int64_t row, head;

    ChosenTask(const FetchArgs& args, int64_t row, int64_t head, Chosen& chosen)
        : Rows<E>(args.group, args.head_dim, args.scale, args.softcap, chosen.work), args(args),
          chosen(chosen), row(row), head(head) {
        this->set_q(0, args.group, static_cast<const T*>(args.q) + row * args.q_stride +
                                       head * args.group * dim);
    }

    void run() {
        const int64_t tiles = int64_t(chosen.seen.size());
        for (int64_t first = 0; first < chosen.wholes; first += TILES)
            add_block<true>(first, std::min(TILES, chosen.wholes - first));
        for (int64_t first = chosen.wholes; first < tiles; first += TILES)
            add_block<false>(first, std::min(TILES, tiles - first));
        for (int64_t r = 0; r < rows; ++r)
            join((row * args.kv_heads + head) * args.group + r, args.out, args.lse, dim,
                 work.top[r], sum(work.mass[r]), work.out.data() + r * dim);
    }

    // Tiles [first, first + count), all of them pages or none.
    template <bool WHOLE> void add_block(int64_t first, int64_t count) {
        const int64_t* halves = chosen.halves.data() + 2 * first;
        const uint16_t* seen = chosen.seen.data() + first;
        const int64_t page_units = args.kv_heads * PAGE * dim_units;
        const int64_t left = int64_t(chosen.seen.size()) - 1 - first;
        const auto* keys = static_cast<const uint32_t*>(args.keys) + head * PAGE * dim_units;
        const auto key = [=](int64_t half) {
            return keys + halves[half] / 2 * page_units + halves[half] % 2 * HALF;
        };
        product_of_group<E>(
            work.scores.data(), BLOCK, work.q.data(), dim_units,
            [=](int64_t tile, int64_t) {
                const int64_t next = std::min(tile + AHEAD, left);
                if constexpr (WHOLE)
                    return AskingRows{key(2 * tile), key(2 * next)};
                else
                    return AskingHalfRows{{key(2 * tile), key(2 * tile + 1)},
                                          {key(2 * next), key(2 * next + 1)}};
            },
            rows, count, 1, dim_units, PAGE, false);
        for (int64_t r = 0; r < rows; ++r) {
            float* s = work.scores.data() + r * BLOCK;
            F most = splat(-INFINITY);
            for (int64_t tile = 0; tile < count; ++tile, s += WIDTH) {
                F x = load(s);
                if (softcap > 0) x = capped(x, scale, softcap);
                if (seen[tile] != 0xffff) x = only(seen[tile], x, -INFINITY);
                store(s, x);
                most = max(most, x);
            }
            work.best[r] = this->bounded(most);
        }
        this->weigh_all(count * PAGE);
        // A run of values is a tile, or half of one.
        constexpr int64_t slots = WHOLE ? PAGE : HALF, apart = WHOLE ? 2 : 1;
        const auto* values = static_cast<const uint32_t*>(args.values) + head * PAGE * dim_units;
        const int64_t half_units = HALF / E::PACK * dim, last = 2 * left + 2 - apart;
        const auto value = [=](int64_t half) {
            return values + halves[half] / 2 * page_units + halves[half] % 2 * half_units;
        };
        product_of_group<E>(
            work.out.data(), dim, work.weights.data(), UNITS,
            [=](int64_t tile, int64_t run) {
                const int64_t half = run * apart, next = std::min(half + 2 * AHEAD, last);
                return AskingRows{value(half) + tile * WIDTH, value(next) + tile * WIDTH};
            },
            rows, dim / WIDTH, count * PAGE / slots, slots / E::PACK, dim, true);
    }
};

template <class E> bool fetch_with(const FetchArgs& args) {
    std::atomic<bool> inside = true;
    std::vector<int64_t> rows;
    for (const FetchRead& read : args.reads)
        for (int64_t row = read.row; row < read.row + read.rows; ++row) rows.push_back(row);
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    parallel_tasks(int64_t(rows.size()) * args.kv_heads, [&](int64_t i) {
        thread_local Chosen chosen;
        const int64_t row = rows[i / args.kv_heads], head = i % args.kv_heads;
        if (!chosen.gather(args, row, head)) inside = false;
        ChosenTask<E>(args, row, head, chosen).run();
    });
    return inside;
}

}  // namespace

void attend(const AttentionArgs& args) {
    if (args.plan->in_order)
        args.bf16 ? attend_in_order<Bf16>(args) : attend_in_order<Float>(args);
    else
        args.bf16 ? attend_with<Bf16>(args) : attend_with<Float>(args);
}

bool attend_chosen(const FetchArgs& args) {
    return args.bf16 ? fetch_with<Bf16>(args) : fetch_with<Float>(args);
}

}  // namespace quire::QUIRE_ISA
