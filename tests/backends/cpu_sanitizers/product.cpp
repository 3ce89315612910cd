// SPDX-License-Identifier: Apache-2.0
// The product of bfloat16 matrices into a float32 sum. Operands end where their data ends; the sum lies inside a larger
// buffer, since masked stores are no accesses that a sanitizer sees.
#include "checks.h"

namespace checks {

using namespace sspo;

namespace {

void check_sizes(const Product& product, int64_t n, int64_t V, int64_t H, bool first) {
    constexpr int64_t kAround = 70;  // more than a panel of columns
    constexpr float kUntouched = 1e30f, kBefore = 3;
    const int64_t stride = H + kAround;
    uint16_t *gradient = (uint16_t*)malloc((size_t)(2 * n * V)), *hidden = (uint16_t*)malloc((size_t)(2 * n * H));
    for (int64_t i = 0; i < n * V; ++i) store(gradient, DType::kBFloat16, i, (float)integer(-64, 64) / 8);
    for (int64_t i = 0; i < n * H; ++i) store(hidden, DType::kBFloat16, i, (float)integer(-64, 64) / 8);
    std::vector<float> buffer((size_t)((V + 2) * stride), kUntouched);
    float* total = buffer.data() + stride;
    for (int64_t v = 0; v < V; ++v)
        for (int64_t h = 0; h < H; ++h) total[v * stride + h] = kBefore;
    add_product(product, {total, gradient, hidden, stride, V, H, n, V, H, first}, kThreads);
    for (int64_t v = -1; v <= V; ++v)
        for (int64_t h = 0; h < stride; ++h) {
            double truth = v < 0 || v == V || h >= H ? kUntouched : first ? 0 : kBefore;
            if (truth != kUntouched)  // multiples of 1/64 that float32 holds exactly
                for (int64_t i = 0; i < n; ++i)
                    truth += load(gradient, DType::kBFloat16, i * V + v) * load(hidden, DType::kBFloat16, i * H + h);
            expect("product", total[v * stride + h], truth, 0, "product", V, h);
        }
    free(gradient);
    free(hidden);
}

}  // namespace

void check_product() {
    const ProductChoice choice = choose_product();
    if (!choice.product) {
        printf("no product: %s\n", choice.why_not.c_str());
        return;
    }
    for (bool first : {false, true})
        for (int64_t n : {0, 1, 2, 9, 301})
            for (int64_t V : {1, 6, 101})
                for (int64_t H : {1, 64, 81}) check_sizes(*choice.product, n, V, H, first);
    check_sizes(*choice.product, 5, 2000, 300, false);  // several blocks, so that all threads have work
    printf("product\n");
}

}  // namespace checks
