// Attention over chosen keys, few here and there, where they lie in the arena.

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"
#include "softmax.h"

namespace quire::QUIRE_ISA {

namespace {

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

bool attend_chosen(const FetchArgs& args) {
    return args.bf16 ? fetch_with<Bf16>(args) : fetch_with<Float>(args);
}

}  // namespace quire::QUIRE_ISA
