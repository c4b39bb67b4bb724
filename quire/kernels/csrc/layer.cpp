// The rest of a layer: normalisation, rotation with the KV append, the gate of the MLP.

#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

namespace {

template <class T> void rms_norm_with(const NormArgs& args) {
    const T* weight = static_cast<const T*>(args.weight);
    parallel_ranges(args.rows, 1 + 16384 / args.width, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* x = static_cast<const T*>(args.x) + row * args.width;
            T* out = static_cast<T*>(args.out) + row * args.width;
            F squares = splat(0);
            for (int64_t i = 0; i < args.width; i += WIDTH) {
                F v = load_some(x + i, args.width - i);
                squares = fma(v, v, squares);
            }
            const F factor = splat(1 / std::sqrt(sum(squares) / float(args.width) + args.eps));
            for (int64_t i = 0; i < args.width; i += WIDTH) {
                const int64_t count = args.width - i;
                F w = load_some(weight + i, count) + splat(args.add);
                store_some(out + i, load_some(x + i, count) * factor * w, count);
            }
        }
    });
}

QUIRE_INLINE F erf(F x) {  // Abramowitz and Stegun 7.1.26, error below 1.5e-7
    F a = abs(x);
    F t = splat(1) / fma(splat(0.3275911f), a, splat(1));
    F y = fma(splat(1.061405429f), t, splat(-1.453152027f));
    y = fma(y, t, splat(1.421413741f));
    y = fma(y, t, splat(-0.284496736f));
    y = fma(y, t, splat(0.254829592f));
    y = splat(1) - y * t * exp(splat(0) - a * a);
    F r;
    QUIRE_EACH r.part[p] =
        (NativeF)((NativeU)y.part[p] | ((NativeU)x.part[p] & 0x80000000u));
    return r;
}

template <int64_t kind> QUIRE_INLINE F activate(F x) {
    if constexpr (kind == SILU) return x * sigmoid(x);
    if constexpr (kind == GELU)
        return splat(0.5f) * x * (splat(1) + erf(x * splat(0.70710678f)));
    if constexpr (kind == GELU_TANH)
        return splat(0.5f) * x *
               (splat(1) + tanh(splat(0.79788456f) * fma(splat(0.044715f) * x * x, x, x)));
    return max(x, splat(0));
}

template <class T, int64_t kind> void gate_with(const GateArgs& args) {
    parallel_ranges(args.rows, 1 + 8192 / args.width, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* gate = static_cast<const T*>(args.x) + row * (args.gated ? 2 : 1) * args.width;
            T* out = static_cast<T*>(args.out) + row * args.width;
            for (int64_t i = 0; i < args.width; i += WIDTH) {
                const int64_t count = args.width - i;
                F value = activate<kind>(load_some(gate + i, count));
                if (args.gated) value = value * load_some(gate + args.width + i, count);
                store_some(out + i, value, count);
            }
        }
    });
}

template <class T> void gate_kind(const GateArgs& args) {
    switch (args.activation) {
        case SILU: return gate_with<T, SILU>(args);
        case GELU: return gate_with<T, GELU>(args);
        case GELU_TANH: return gate_with<T, GELU_TANH>(args);
        default: return gate_with<T, RELU>(args);
    }
}

// Rotates the first 2 * half numbers of a head: pairs (i, i + half).
template <class T> QUIRE_INLINE void rotate(T* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t count = half - i;
        F a = load_some(x + i, count), b = load_some(x + half + i, count);
        F c = load_some(cos + i, count), s = load_some(sin + i, count);
        store_some(x + i, a * c - b * s, count);
        store_some(x + half + i, b * c + a * s, count);
    }
}

template <class E> void rotate_append_with(const RotateArgs& args) {
    using T = typename E::Element;
    constexpr int64_t pack = E::PACK;
    const int64_t half = args.rotated / 2, dim = args.head_dim;
    parallel_ranges(args.tokens, 8, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            T* q = static_cast<T*>(args.q) + token * args.q_stride;
            T* k = static_cast<T*>(args.k) + token * args.k_stride;
            const T* v = static_cast<const T*>(args.v) + token * args.v_stride;
            const float *cos = args.cos + token * half, *sin = args.sin + token * half;
            for (int64_t h = 0; half && h < args.heads; ++h) rotate(q + h * dim, cos, sin, half);
            const int64_t page = args.slots[token] / PAGE, t = args.slots[token] % PAGE;
            for (int64_t h = 0; h < args.kv_heads; ++h) {
                if (half) rotate(k + h * dim, cos, sin, half);
                const int64_t base = (page * args.kv_heads + h) * PAGE * dim;
                T* to = static_cast<T*>(args.keys) + base + t * pack;
                for (int64_t i = 0; i < dim; i += pack)
                    std::memcpy(to + i * PAGE, k + h * dim + i, pack * sizeof(T));
                to = static_cast<T*>(args.values) + base + t / pack * pack * dim + t % pack;
                for (int64_t i = 0; i < dim; ++i) to[i * pack] = v[h * dim + i];
            }
        }
    });
}

template <class E> void read_slots_with(const ReadArgs& args) {
    using T = typename E::Element;
    constexpr int64_t pack = E::PACK;
    const int64_t dim = args.head_dim;
    parallel_ranges(args.tokens, 16, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            const int64_t page = args.slots[token] / PAGE, t = args.slots[token] % PAGE;
            for (int64_t h = 0; h < args.kv_heads; ++h) {
                const int64_t base = (page * args.kv_heads + h) * PAGE * dim;
                T* k = static_cast<T*>(args.k) + (h * args.tokens + token) * dim;
                T* v = static_cast<T*>(args.v) + (h * args.tokens + token) * dim;
                const T* from = static_cast<const T*>(args.keys) + base + t * pack;
                for (int64_t i = 0; i < dim; i += pack)
                    std::memcpy(k + i, from + i * PAGE, pack * sizeof(T));
                from = static_cast<const T*>(args.values) + base + t / pack * pack * dim + t % pack;
                for (int64_t i = 0; i < dim; ++i) v[i] = from[i * pack];
            }
        }
    });
}

}  // namespace

void rms_norm(const NormArgs& args) {
    args.bf16 ? rms_norm_with<bf16>(args) : rms_norm_with<float>(args);
}
void gate(const GateArgs& args) { args.bf16 ? gate_kind<bf16>(args) : gate_kind<float>(args); }
void rotate_append(const RotateArgs& args) {
    args.bf16 ? rotate_append_with<Bf16>(args) : rotate_append_with<Float>(args);
}
void read_slots(const ReadArgs& args) {
    args.bf16 ? read_slots_with<Bf16>(args) : read_slots_with<Float>(args);
}

}  // namespace quire::QUIRE_ISA
