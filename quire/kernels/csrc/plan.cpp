// Cuts the reads of a step into attention tasks of like cost.

#include "plan.h"

#include <algorithm>

namespace quire {

namespace {

constexpr int64_t ROWS = 48;         // query rows (tokens times group) of a task
constexpr int64_t LEAST_KEYS = 512;  // a task is not cut into fewer keys

// Large tasks first; small ones in bundles of at least `share`.
void bundle_by_cost(AttentionPlan& plan, int64_t share) {
    const auto cost = [](const AttentionTask& t) { return t.rows * (t.last_key - t.first_key); };
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
    int64_t open = 0;
    for (int64_t i = 0; i < int64_t(plan.tasks.size()); ++i) {
        if (open == 0) plan.bundles.push_back(i);
        open += cost(plan.tasks[i]) * plan.group;
        if (open >= share) open = 0;
    }
    plan.bundles.push_back(int64_t(plan.tasks.size()));
}

// A task comes after the tasks of all its rows' earlier reads.
void bundle_levels(AttentionPlan& plan) {
    std::vector<int64_t> reached(plan.positions.size(), 0);
    std::vector<std::vector<AttentionTask>> levels;
    for (const AttentionTask& task : plan.tasks) {
        const auto rows = reached.begin() + task.row;
        const int64_t level = *std::max_element(rows, rows + task.rows);
        std::fill(rows, rows + task.rows, level + 1);
        if (level == int64_t(levels.size())) levels.emplace_back();
        levels[level].push_back(task);
    }
    plan.tasks.clear();
    for (const auto& level : levels) {
        plan.bundles.push_back(int64_t(plan.tasks.size()));
        plan.tasks.insert(plan.tasks.end(), level.begin(), level.end());
    }
    plan.bundles.push_back(int64_t(plan.tasks.size()));
}

}  // namespace

void make_tasks(AttentionPlan& plan, int64_t threads) {
    const int64_t tokens = int64_t(plan.positions.size());
    const int64_t rows_at_once = std::max<int64_t>(1, ROWS / plan.group);
    std::vector<AttentionTask> whole;
    int64_t total = 0;
    for (int64_t i = 0; i < int64_t(plan.reads.size()); ++i) {
        const Read& read = plan.reads[i];
        for (int64_t row = read.row; row < read.row + read.rows; row += rows_at_once) {
            const int64_t rows = std::min(rows_at_once, read.row + read.rows - row);
            const auto at = plan.positions.begin() + row;
            const auto [low, high] = std::minmax_element(at, at + rows);
            const int64_t last = std::min(read.keys, *high - read.position + 1);
            const int64_t first =
                plan.window ? std::max<int64_t>(0, *low - plan.window + 1 - read.position) : 0;
            if (first >= last) continue;
            whole.push_back({i, row, rows, first, last, -1});
            total += rows * plan.group * (last - first);
        }
    }
    // A share small enough that the last task to end leaves the other threads idle only briefly.
    const int64_t share = std::max<int64_t>(1, total / (threads * 8));
    for (const AttentionTask& task : whole) {
        const int64_t offset = plan.reads[task.read].offset;
        int64_t keys = std::max(LEAST_KEYS, share / (task.rows * plan.group));
        if (plan.in_order || threads == 1) keys = task.last_key;
        for (int64_t first = task.first_key; first < task.last_key;) {
            int64_t last = first + keys;
            last -= (last + offset) % PAGE;  // cut between pages
            if (task.last_key - last < LEAST_KEYS / 2) last = task.last_key;
            last = std::min(std::max(last, first + 1), task.last_key);
            plan.tasks.push_back({task.read, task.row, task.rows, first, last, -1});
            first = last;
        }
    }

    plan.part_start.assign(tokens + 1, 0);
    for (const AttentionTask& task : plan.tasks)
        for (int64_t row = task.row; row < task.row + task.rows; ++row) ++plan.part_start[row + 1];
    const std::vector<int64_t> counts(plan.part_start.begin() + 1, plan.part_start.end());
    const int64_t row_floats = plan.group * (plan.head_dim + 2);
    plan.scratch_floats = 0;
    for (AttentionTask& task : plan.tasks) {
        bool alone = true;
        for (int64_t row = task.row; row < task.row + task.rows; ++row) alone &= counts[row] == 1;
        if (alone && !plan.in_order) continue;
        task.scratch = plan.scratch_floats;
        plan.scratch_floats += task.rows * row_floats;
    }
    for (int64_t row = 0; row < tokens; ++row) plan.part_start[row + 1] += plan.part_start[row];
    plan.parts.resize(plan.part_start[tokens]);
    std::vector<int64_t> next(plan.part_start.begin(), plan.part_start.end() - 1);
    for (const AttentionTask& task : plan.tasks)
        for (int64_t row = task.row; row < task.row + task.rows; ++row)
            plan.parts[next[row]++] = {
                task.scratch < 0 ? -1 : task.scratch + (row - task.row) * row_floats};

    if (plan.in_order)
        bundle_levels(plan);
    else
        bundle_by_cost(plan, share / 2);
}

}  // namespace quire
