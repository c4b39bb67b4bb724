// Loops over threads. OpenMP, so that the threads are PyTorch's own where both load one runtime.
#pragma once

#include <cstdint>

#include <omp.h>

namespace quire {

// Calls body(i) for i in [0, count), handed out in order to whichever thread is free.
template <class Body> void parallel_tasks(int64_t count, const Body& body) {
    if (count <= 1) {
        if (count == 1) body(0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) body(i);
}

// Calls body(first, last) on contiguous shares of [0, count), each of at least `grain`.
template <class Body> void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
    int64_t shares = count / (grain < 1 ? 1 : grain);
    int64_t threads = omp_get_max_threads();
    shares = shares < 1 ? 1 : shares > threads ? threads : shares;
    if (shares == 1) {
        if (count) body(int64_t(0), count);
        return;
    }
#pragma omp parallel for schedule(static, 1)
    for (int64_t i = 0; i < shares; ++i) body(count * i / shares, count * (i + 1) / shares);
}

}  // namespace quire
