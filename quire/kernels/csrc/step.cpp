// The layers of a step: the kernels in the order in which decoder.py calls them.

#include "step.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace quire {

namespace {

struct alignas(64) Line {
    std::byte bytes[64];
};

using Buffer = std::unique_ptr<Line[]>;

Buffer buffer(int64_t bytes) {
    return std::make_unique_for_overwrite<Line[]>(bytes / int64_t(sizeof(Line)) + 1);
}

class Step {
  public:
    Step(const Kernels& kernels, const Model& model, const StepArgs& args)
        : kernels_(kernels), model_(model), args_(args), size_(model.bf16 ? 2 : 4),
          rows_(args.rows) {
        int64_t hidden = 0, wide = 0, narrow = 0;
        for (const Layer& layer : model.layers) {
            hidden = std::max(hidden, layer.qkv.args.ins);
            wide = std::max({wide, layer.qkv.args.outs, layer.up.args.outs});
            narrow = std::max({narrow, layer.out.args.ins, layer.down.args.ins});
        }
        const int64_t unit = args.rows * size_;
        normed_ = buffer(hidden * unit);
        wide_ = buffer(wide * unit);
        narrow_ = buffer(narrow * unit);
        int64_t scratch = 0;
        const auto fit = [&](const AttentionPlan* plan) {
            if (plan != nullptr)
                scratch = std::max(scratch, plan->kv_heads * plan->scratch_floats);
        };
        std::ranges::for_each(args.plans, fit);
        fit(args.ending);
        scratch_ = buffer(scratch * int64_t(sizeof(float)));
    }

    void run() {
        for (size_t i = 0; i < model_.layers.size(); ++i) {
            const Layer& layer = model_.layers[i];
            const AttentionPlan* plan = args_.plans[layer.plan];
            norm(args_.x, normed_.get(), layer.norm, rows_, layer.qkv.args.ins);
            multiply(layer.qkv, normed_.get(), wide_.get(), nullptr);
            append(layer, int64_t(i));
            if (args_.wanted_rows >= 0 && i + 1 == model_.layers.size()) {
                keep_wanted(args_.x, layer.out.args.outs);
                keep_wanted(wide_.get(), layer.qkv.args.outs);
                rows_ = args_.wanted_rows;
                plan = args_.ending;
                if (rows_ == 0) return;
            }
            attend(layer, int64_t(i), plan);
            multiply(layer.out, narrow_.get(), args_.x, args_.x);
            norm(args_.x, normed_.get(), layer.mlp_norm, rows_, layer.up.args.ins);
            multiply(layer.up, normed_.get(), wide_.get(), nullptr);
            kernels_.gate({wide_.get(), narrow_.get(), rows_, layer.down.args.ins,
                           model_.activation, model_.gated, model_.bf16});
            multiply(layer.down, narrow_.get(), args_.x, args_.x);
        }
    }

  private:
    void norm(const void* x, void* out, const void* weight, int64_t rows, int64_t width) {
        kernels_.rms_norm({x, out, weight, rows, width, model_.eps, model_.add, model_.bf16});
    }

    void multiply(const Linear& linear, const void* x, void* out, const void* add) {
        ProductArgs args = linear.args;
        args.x = x;
        args.x_stride = args.ins;
        args.out = out;
        args.add = add;
        args.rows = rows_;
        args.bf16 = model_.bf16;
        switch (linear.format) {
            case DENSE: return kernels_.dense(args);
            case INT8: return kernels_.int8(args);
            default: return kernels_.grouped(args);
        }
    }

    // Moves the wanted rows of a matrix to its beginning.
    void keep_wanted(void* matrix, int64_t width) {
        std::byte* base = static_cast<std::byte*>(matrix);
        for (int64_t row = 0; row < args_.wanted_rows; ++row)
            if (const int64_t from = args_.wanted[row]; from != row)
                std::memcpy(base + row * width * size_, base + from * width * size_, width * size_);
    }

    // Rotates queries and keys in `wide_`, and stores keys and values.
    void append(const Layer& layer, int64_t index) {
        const int64_t stride = layer.qkv.args.outs, dim = model_.head_dim;
        std::byte* q = wide_[0].bytes;
        std::byte* k = q + model_.heads * dim * size_;
        std::byte* v = k + model_.kv_heads * dim * size_;
        if (layer.q_norm != nullptr)
            parallel_ranges(rows_, 8, [&](int64_t first, int64_t last) {
                for (int64_t at = first * stride * size_; first < last;
                     ++first, at += stride * size_) {
                    norm(q + at, q + at, layer.q_norm, model_.heads, dim);
                    norm(k + at, k + at, layer.k_norm, model_.kv_heads, dim);
                }
            });
        const Rotation none{nullptr, nullptr, 0};
        const Rotation& rotation = layer.rotation < 0 ? none : args_.rotations[layer.rotation];
        kernels_.rotate_append({q, k, v, stride, stride, stride, rotation.cos, rotation.sin,
                                args_.slots, of_layer(args_.keys, index),
                                of_layer(args_.values, index), rows_, model_.heads, model_.kv_heads,
                                dim, rotation.rotated, model_.bf16});
    }

    // Rotated queries in `wide_` -> results of attention in `narrow_`.
    void attend(const Layer& layer, int64_t index, const AttentionPlan* plan) {
        kernels_.attend({plan, wide_.get(), layer.qkv.args.outs, narrow_.get(),
                         of_layer(args_.keys, index), of_layer(args_.values, index), index,
                         model_.scale, model_.softcap, reinterpret_cast<float*>(scratch_.get()),
                         nullptr, model_.bf16});
    }

    void* of_layer(void* first, int64_t index) {
        return static_cast<std::byte*>(first) + index * args_.layer_bytes;
    }

    const Kernels& kernels_;
    const Model& model_;
    const StepArgs& args_;
    const int64_t size_;  // bytes of a number
    int64_t rows_;        // that are computed
    Buffer normed_, wide_, narrow_, scratch_;
};

}  // namespace

void run_layers(const Kernels& kernels, const Model& model, const StepArgs& args) {
    if (args.rows > 0) Step(kernels, model, args).run();
}

}  // namespace quire
