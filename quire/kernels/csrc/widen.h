// bfloat16 as float32, on the kernels' threads.
//
// PyTorch's own takes OpenMP's threads, whose barrier waits for milliseconds on a machine that others
// use too: for the logits of one row, longer than their product.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace quire {

inline void widen(const uint16_t* from, uint32_t* to, int64_t count) {
    parallel_ranges(count, 1 << 15, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) to[i] = uint32_t(from[i]) << 16;
    });
}

}  // namespace quire
