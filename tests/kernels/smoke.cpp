// The portable kernels without Python: a dense product, a gate and an int8 product against loops.
// Prints the largest error of each. Built for ARM64 by test_arm.py.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace quire::portable { extern const quire::Kernels kernels; }

namespace {

constexpr int64_t ROWS = 37, INS = 64, OUTS = 40, TILES = (OUTS + 15) / 16;

float number() { return float(rand()) / float(RAND_MAX) - 0.5f; }

quire::ProductArgs product(const std::vector<float>& x, std::vector<float>& out, const void* weight) {
    quire::ProductArgs args{};
    args.x = x.data();
    args.x_stride = args.ins = INS;
    args.out = out.data();
    args.rows = ROWS;
    args.outs = OUTS;
    args.weight = weight;
    return args;
}

float dense(const std::vector<float>& x) {
    std::vector<float> w(OUTS * INS), tiles(TILES * INS * 16), out(ROWS * OUTS);
    for (int64_t n = 0; n < OUTS; ++n)
        for (int64_t k = 0; k < INS; ++k)
            w[n * INS + k] = tiles[(n / 16 * INS + k) * 16 + n % 16] = number();
    quire::portable::kernels.dense(product(x, out, tiles.data()));
    float worst = 0;
    for (int64_t m = 0; m < ROWS; ++m)
        for (int64_t n = 0; n < OUTS; ++n) {
            float sum = 0;
            for (int64_t k = 0; k < INS; ++k) sum += x[m * INS + k] * w[n * INS + k];
            worst = std::max(worst, std::fabs(sum - out[m * OUTS + n]));
        }
    return worst;
}

float int8(const std::vector<float>& x) {
    std::vector<int8_t> w(OUTS * INS), tiles(TILES * INS * 16);
    std::vector<float> scales(TILES * 16, 0.01f), out(ROWS * OUTS);
    std::vector<int32_t> sums(TILES * 16);
    for (int64_t n = 0; n < OUTS; ++n)
        for (int64_t k = 0; k < INS; ++k) {
            w[n * INS + k] = int8_t(rand() % 255 - 127);
            tiles[((n / 16 * INS / 4 + k / 4) * 16 + n % 16) * 4 + k % 4] = w[n * INS + k];
            sums[n] += w[n * INS + k];
        }
    quire::ProductArgs args = product(x, out, tiles.data());
    args.scales = scales.data();
    args.sums = sums.data();
    quire::portable::kernels.int8(args);
    float worst = 0;
    for (int64_t m = 0; m < ROWS; ++m) {
        float top = 0;
        for (int64_t k = 0; k < INS; ++k) top = std::max(top, std::fabs(x[m * INS + k]));
        const float scale = top / 127;
        for (int64_t n = 0; n < OUTS; ++n) {
            int64_t sum = 0;
            for (int64_t k = 0; k < INS; ++k)
                sum += int64_t(std::nearbyint(x[m * INS + k] * (1 / scale))) * w[n * INS + k];
            worst = std::max(worst, std::fabs(float(sum) * scale * 0.01f - out[m * OUTS + n]));
        }
    }
    return worst;
}

float gate() {
    constexpr int64_t width = 21;
    std::vector<float> x(2 * width), out(width);
    for (float& v : x) v = 8 * number();
    quire::portable::kernels.gate({x.data(), out.data(), 1, width, quire::SILU, true, false});
    float worst = 0;
    for (int64_t i = 0; i < width; ++i)
        worst = std::max(worst, std::fabs(out[i] - x[i] / (1 + std::exp(-x[i])) * x[width + i]));
    return worst;
}

}  // namespace

int main() {
    quire::set_threads(2);
    std::vector<float> x(ROWS * INS);
    for (float& v : x) v = number();
    std::printf("%g %g %g\n", dense(x), int8(x), gate());
}
