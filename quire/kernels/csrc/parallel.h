// Loops over the kernels' threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace quire {

// Calls body(i) for i in [0, count), handed out in order to whichever thread is free.
template <class Body> void parallel_tasks(int64_t count, const Body& body) {
    run_tasks(
        count, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
        &body);
}

// Calls body(first, last) on contiguous shares of [0, count), each of at least `grain`.
template <class Body> void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
    const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(grain, 1));
    const int64_t shares = std::min(most, 4 * threads());
    if (count == 0) return;
    parallel_tasks(shares, [&](int64_t i) {
        body(count * i / shares, count * (i + 1) / shares);
    });
}

}  // namespace quire
