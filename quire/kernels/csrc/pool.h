// The kernels' own threads.
//
// A parallel loop here ends when its tasks are done, not when every thread has come by: on a
// machine that others use too, a thread that is not running holds nobody up unless it has taken a
// task. (OpenMP's barrier waits for all of them, for every one of some three hundred short loops of
// a step.)
#pragma once

#include <cstdint>

namespace quire {

// Threads that work on a loop, the caller's included; not to be called while loops run.
void set_threads(int64_t count);
int64_t threads();

// Calls task(context, i) for i in [0, count), handed out in order to whichever thread is free.
// Runs on the caller's thread alone when called from a task, or while another thread has the pool.
void run_tasks(int64_t count, void (*task)(const void* context, int64_t i), const void* context);

}  // namespace quire
