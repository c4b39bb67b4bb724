// The Python module: chooses an instruction set at run time and passes calls on.
//
// Tensors come as addresses; the files of `quire/kernels` check dtypes, shapes and strides first. No
// function here keeps a pointer. The interpreter's lock is released while a kernel runs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "plan.h"
#include "pool.h"
#include "step.h"
#include "targets.h"  // QUIRE_TARGETS(X): X(isa) for each target, written by CMake
#include "widen.h"

namespace nb = nanobind;

namespace quire {

#define QUIRE_DECLARE(isa) \
    namespace isa { extern const Kernels kernels; }
QUIRE_TARGETS(QUIRE_DECLARE)
#undef QUIRE_DECLARE

namespace {

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (name == "avx2") return avx2;
    if (name == "avx512") return avx512;
    if (name == "avx512_vnni") return vnni;
    if (name == "avx512_bf16") return vnni && __builtin_cpu_supports("avx512bf16");
#endif
    return name == "portable";
}

std::vector<const Kernels*> compiled() {
    std::vector<const Kernels*> found;
#define QUIRE_LIST(isa) found.push_back(&isa::kernels);
    QUIRE_TARGETS(QUIRE_LIST)
#undef QUIRE_LIST
    return found;
}

const Kernels* best() {
    const Kernels* found = nullptr;
    for (const Kernels* each : compiled())  // listed from the plainest to the richest
        if (runs_here(each->name)) found = each;
    return found;
}

const Kernels* active = best();

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

using Ints = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Shorts = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

AttentionPlan make_plan(Ints reads, Shorts pages, Ints positions, std::optional<Shorts> kept,
                        int64_t layers, int64_t kv_heads, int64_t group, int64_t head_dim,
                        int64_t window, bool in_order) {
    AttentionPlan plan;
    for (size_t i = 0; i < reads.shape(0); ++i) {
        const int64_t* r = reads.data() + i * 6;
        plan.reads.push_back({r[0], r[1], r[2], r[3], r[4], r[5]});
    }
    if (pages.is_valid()) plan.pages.assign(pages.data(), pages.data() + pages.size());
    plan.positions.assign(positions.data(), positions.data() + positions.size());
    if (kept) plan.kept.assign(kept->data(), kept->data() + kept->size());
    plan.layers = layers;
    plan.kv_heads = kv_heads;
    plan.group = group;
    plan.head_dim = head_dim;
    plan.window = window;
    plan.in_order = in_order;
    make_tasks(plan, threads());
    return plan;
}

void attend(const AttentionPlan& plan, int64_t layer, uintptr_t q, int64_t q_stride, uintptr_t out,
            uintptr_t keys, uintptr_t values, float scale, float softcap, uintptr_t lse,
            bool bf16) {
    thread_local std::vector<float> scratch;
    scratch.resize(plan.kv_heads * plan.scratch_floats);
    active->attend({&plan, at<void>(q), q_stride, at<void>(out), at<void>(keys), at<void>(values),
                    layer, scale, softcap, scratch.data(), at<float>(lse), bf16});
}

// `reads` [reads, 8]: the members of a ChooseRead.
void choose(Ints reads, uintptr_t q, int64_t q_stride, int64_t kv_heads, int64_t group,
            int64_t head_dim, float scale, bool bf16) {
    ChooseArgs args{{}, at<void>(q), q_stride, kv_heads, group, head_dim, scale, bf16};
    for (size_t i = 0; i < reads.shape(0); ++i) {
        const int64_t* r = reads.data() + i * 8;
        args.reads.push_back({r[0], r[1], at<void>(r[2]), at<uint8_t>(r[3]), r[4], r[5], r[6],
                              at<int64_t>(r[7])});
    }
    nb::gil_scoped_release free;
    active->choose(args);
}

// `reads` [reads, 10]: the members of a FetchRead.
void attend_chosen(Ints reads, uintptr_t q, int64_t q_stride, uintptr_t positions, uintptr_t out,
                   uintptr_t lse, uintptr_t keys, uintptr_t values, int64_t kv_heads,
                   int64_t group, int64_t head_dim, int64_t window, float scale, float softcap,
                   bool bf16) {
    FetchArgs args{{}, at<void>(q), q_stride, at<int64_t>(positions), at<float>(out),
                   at<float>(lse), at<void>(keys), at<void>(values), kv_heads, group, head_dim,
                   window, scale, softcap, bf16};
    for (size_t i = 0; i < reads.shape(0); ++i) {
        const int64_t* r = reads.data() + i * 10;
        args.reads.push_back({r[0], r[1], r[2], r[3], r[4], at<int32_t>(r[5]), at<int64_t>(r[6]),
                              at<uint8_t>(r[7]), r[8], r[9]});
    }
    bool inside;
    {
        nb::gil_scoped_release free;
        inside = active->attend_chosen(args);
    }
    if (!inside) throw std::out_of_range("an index chose a chunk that is not in its segment");
}

// `reads` [reads, 6]: row, rows, source, first entry, entries, position of the first; `sources`
// [sources, layers, 2, 8]: of keys and values, pages and the members of a CodedSide.
PackedPlan make_packed_plan(Ints reads, Ints sources, Ints positions, std::optional<Shorts> kept,
                            int64_t layers, int64_t kv_heads, int64_t group, int64_t head_dim,
                            int64_t window) {
    PackedPlan plan;
    plan.cut = make_plan(reads, {}, positions, kept, layers, kv_heads, group, head_dim, window,
                         false);
    const auto side = [](const int64_t* s) {
        return CodedSide{at<uint8_t>(s[1]), at<void>(s[2]), at<void>(s[3]), s[4], s[5], s[6], s[7]};
    };
    for (const Read& read : plan.cut.reads) {
        PackedSource source;
        for (int64_t layer = 0; layer < layers; ++layer) {
            const int64_t* both = sources.data() + (read.page * layers + layer) * 16;
            source.pages = both[0];
            source.layers.push_back({side(both), side(both + 8)});
        }
        plan.sources.push_back(std::move(source));
    }
    return plan;
}

void attend_packed(const PackedPlan& plan, int64_t layer, uintptr_t q, int64_t q_stride,
                   uintptr_t out, uintptr_t lse, float scale, float softcap, bool bf16) {
    thread_local std::vector<float> scratch;
    scratch.resize(plan.cut.kv_heads * plan.cut.scratch_floats);
    active->attend_packed({&plan, at<void>(q), q_stride, at<float>(out), at<float>(lse), layer,
                           scale, softcap, scratch.data(), bf16});
}

void rotate_append(uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride, uintptr_t v,
                   int64_t v_stride, uintptr_t cos, uintptr_t sin, int64_t rotated,
                   uintptr_t slots, uintptr_t keys, uintptr_t values,
                   int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, bool bf16) {
    active->rotate_append({at<void>(q), at<void>(k), at<void>(v), q_stride, k_stride, v_stride,
                           at<float>(cos), at<float>(sin), at<int64_t>(slots), at<void>(keys),
                           at<void>(values), tokens, heads, kv_heads, head_dim,
                           rotated, bf16});
}

void read_slots(uintptr_t keys, uintptr_t values, uintptr_t slots, uintptr_t k, uintptr_t v,
                int64_t tokens, int64_t kv_heads, int64_t head_dim, bool bf16) {
    active->read_slots({at<void>(keys), at<void>(values), at<int64_t>(slots), at<void>(k),
                        at<void>(v), tokens, kv_heads, head_dim, bf16});
}

void rms_norm(uintptr_t x, uintptr_t out, uintptr_t weight, int64_t rows, int64_t width,
              float eps, float add, bool bf16) {
    active->rms_norm({at<void>(x), at<void>(out), at<void>(weight), rows, width, eps, add, bf16});
}

void gate(uintptr_t x, uintptr_t out, int64_t rows, int64_t width, int64_t activation, bool gated,
          bool bf16) {
    active->gate({at<void>(x), at<void>(out), rows, width, activation, gated, bf16});
}

ProductArgs product_args(uintptr_t x, int64_t x_stride, uintptr_t out, uintptr_t bias,
                         uintptr_t add, int64_t rows, int64_t ins, int64_t outs, bool bf16,
                         uintptr_t weight) {
    ProductArgs args{};
    args.x = at<void>(x);
    args.x_stride = x_stride;
    args.out = at<void>(out);
    args.bias = at<void>(bias);
    args.add = at<void>(add);
    args.rows = rows;
    args.ins = ins;
    args.outs = outs;
    args.bf16 = bf16;
    args.weight = at<void>(weight);
    return args;
}

void dense(uintptr_t x, int64_t x_stride, uintptr_t out, uintptr_t bias, uintptr_t add,
           int64_t rows, int64_t ins, int64_t outs, bool bf16, uintptr_t weight) {
    active->dense(product_args(x, x_stride, out, bias, add, rows, ins, outs, bf16, weight));
}

void int8(uintptr_t x, int64_t x_stride, uintptr_t out, uintptr_t bias, uintptr_t add, int64_t rows,
          int64_t ins, int64_t outs, bool bf16, uintptr_t weight, uintptr_t scales,
          uintptr_t sums) {
    ProductArgs args = product_args(x, x_stride, out, bias, add, rows, ins, outs, bf16, weight);
    args.scales = at<float>(scales);
    args.sums = at<int32_t>(sums);
    active->int8(args);
}

void grouped(uintptr_t x, int64_t x_stride, uintptr_t out, uintptr_t bias, uintptr_t add,
             int64_t rows, int64_t ins, int64_t outs, bool bf16, uintptr_t weight,
             uintptr_t scales, uintptr_t offsets, int64_t bits, int64_t group, bool small) {
    ProductArgs args = product_args(x, x_stride, out, bias, add, rows, ins, outs, bf16, weight);
    args.scales = at<float>(scales);
    args.offsets = at<float>(offsets);
    args.bits = bits;
    args.group = group;
    args.small = small;
    active->grouped(args);
}

constexpr int64_t LINEAR = 11, LAYER = 6 + 4 * LINEAR;  // numbers in the table of make_model

Linear linear(const int64_t* of) {
    ProductArgs args{};
    args.weight = at<void>(of[1]);
    args.scales = at<float>(of[2]);
    args.offsets = at<float>(of[3]);
    args.sums = at<int32_t>(of[4]);
    args.bias = at<void>(of[5]);
    args.ins = of[6];
    args.outs = of[7];
    args.bits = of[8];
    args.group = of[9];
    args.small = of[10];
    return {of[0], args};
}

// `table` [layers, LAYER]: the members of a Layer, of each Linear the format and those above.
Model make_model(Ints table, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t activation,
                 bool gated, float eps, float add, float scale, float softcap, bool bf16) {
    Model model{{}, heads, kv_heads, head_dim, activation, gated, bf16, eps, add, scale, softcap};
    for (size_t i = 0; i < table.shape(0); ++i) {
        const int64_t* of = table.data() + i * LAYER;
        const int64_t* linears = of + LAYER - 4 * LINEAR;
        model.layers.push_back({at<void>(of[0]), at<void>(of[1]), at<void>(of[2]), at<void>(of[3]),
                                of[4], of[5], linear(linears), linear(linears + LINEAR),
                                linear(linears + 2 * LINEAR), linear(linears + 3 * LINEAR)});
    }
    return model;
}

// `rotations` [.., 3]: the members of a Rotation.
void step(const Model& model, uintptr_t x, int64_t rows, Ints rotations,
          const std::vector<const AttentionPlan*>& plans, uintptr_t slots, uintptr_t keys,
          uintptr_t values, int64_t layer_bytes, uintptr_t wanted, int64_t wanted_rows,
          const AttentionPlan* ending) {
    StepArgs args{at<void>(x), rows, {}, plans, at<int64_t>(slots), at<void>(keys), at<void>(values),
                  layer_bytes, at<int64_t>(wanted), wanted_rows, ending};
    for (size_t i = 0; i < rotations.shape(0); ++i) {
        const int64_t* r = rotations.data() + i * 3;
        args.rotations.push_back({at<float>(r[0]), at<float>(r[1]), r[2]});
    }
    nb::gil_scoped_release free;
    run_layers(*active, model, args);
}

void argmax(uintptr_t logits, int64_t rows, int64_t vocab, uintptr_t chosen) {
    active->argmax(at<float>(logits), rows, vocab, at<int64_t>(chosen));
}

void sample(uintptr_t logits, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_p,
            uintptr_t min_p, uintptr_t top_k, uintptr_t draws, uintptr_t chosen) {
    active->sample({at<float>(logits), rows, vocab, at<float>(temperature), at<float>(top_p),
                    at<float>(min_p), at<int64_t>(top_k), at<double>(draws), at<int64_t>(chosen)});
}

void mask(uintptr_t logits, int64_t vocab, uintptr_t rows, uintptr_t masks, int64_t count,
          int64_t words) {
    active->mask({at<float>(logits), at<int64_t>(rows), at<uint32_t>(masks), count, vocab, words});
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Kernels* each : compiled())
        if (runs_here(each->name)) names.push_back(each->name);
    return names;
}

void use(const std::string& name) {
    for (const Kernels* each : compiled())
        if (name == each->name && runs_here(name)) {
            active = each;
            return;
        }
    throw std::invalid_argument("no kernels for " + name + " here");
}

}  // namespace

NB_MODULE(_native, m) {
    const auto free = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def_prop_ro("tasks", [](const AttentionPlan& p) { return p.tasks.size(); })
        .def_prop_ro("scratch_floats",
                     [](const AttentionPlan& p) { return p.scratch_floats * p.kv_heads; });
    m.def("make_plan", make_plan, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
    nb::class_<PackedPlan>(m, "PackedPlan").def_prop_ro("tasks", [](const PackedPlan& p) {
        return p.cut.tasks.size();
    });
    m.def("make_packed_plan", make_packed_plan, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
    m.def("attend", attend, free);
    m.def("choose", choose);
    m.def("attend_chosen", attend_chosen);
    m.def("attend_packed", attend_packed, free);
    m.def("rotate_append", rotate_append, free);
    m.def("read_slots", read_slots, free);
    m.def("rms_norm", rms_norm, free);
    m.def("gate", gate, free);
    m.def("dense", dense, free);
    m.def("int8", int8, free);
    m.def("grouped", grouped, free);
    nb::class_<Model>(m, "Model");
    m.def("make_model", make_model);
    m.def("run_layers", step, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("widen", [](uintptr_t from, uintptr_t to, int64_t count) {
        widen(at<uint16_t>(from), at<uint32_t>(to), count);
    }, free);
    m.def("argmax", argmax, free);
    m.def("sample", sample, free);
    m.def("mask", mask, free);
    m.def("available", available);
    m.def("use", use);
    m.def("active", [] { return std::string(active->name); });
    m.def("set_threads", set_threads);
    m.def("threads", threads);
}

}  // namespace quire
