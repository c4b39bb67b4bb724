// All layers of a model in one call, for the layers that most models have: pre-normalised, a dense MLP.
//
// With few rows a product takes 20 to 100 microseconds, so that what lies between two of them counts.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quire {

enum Format : int64_t { DENSE = 0, INT8 = 1, GROUPED = 2 };

struct Linear {
    int64_t format;
    ProductArgs args;  // but for x, out, add and rows
};

struct Layer {
    const void *norm, *mlp_norm;    // [hidden]
    const void *q_norm, *k_norm;    // [head_dim] or null
    int64_t rotation;               // of StepArgs; -1: none
    int64_t plan;                   // of StepArgs
    Linear qkv, out, up, down;
};

struct Model {
    std::vector<Layer> layers;
    int64_t heads, kv_heads, head_dim, activation;
    bool gated, bf16;
    float eps, add;        // of the norms, as in NormArgs
    float scale, softcap;  // as in AttentionArgs
};

struct Rotation {
    const float *cos, *sin;  // [rows, rotated / 2]
    int64_t rotated;
};

struct StepArgs {
    void* x;  // [rows, hidden]: the first layer's input, then the last one's output
    int64_t rows;
    std::vector<Rotation> rotations;
    std::vector<const AttentionPlan*> plans;
    const int64_t* slots;  // [rows]
    void *keys, *values;   // of the first layer
    int64_t layer_bytes;   // of the keys of a layer, and of the values
    // x begins with the output of these rows, ascending, and the rest of it is of no use; the last
    // layer attends by the plan `ending`.
    const int64_t* wanted;
    int64_t wanted_rows;  // -1: all rows are wanted, by the layer's own plan
    const AttentionPlan* ending;
};

void run_layers(const Kernels& kernels, const Model& model, const StepArgs& args);

}  // namespace quire
