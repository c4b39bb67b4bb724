// Cutting a step's attention into tasks.
#pragma once

#include "kernels.h"

namespace quire {

// Fills in tasks, bundles and parts from the plan's reads, pages and positions. The reads of a row
// come in the order of its path. With `in_order` no read is cut between threads.
void make_tasks(AttentionPlan& plan, int64_t threads);

}  // namespace quire
