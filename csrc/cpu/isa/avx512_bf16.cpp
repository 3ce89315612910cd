// SPDX-License-Identifier: Apache-2.0
// total (V, H) += gradient (n, V)^T hidden (n, H) by vdpbf16ps, which multiplies bfloat16 pairs and adds to float32.
//
// A pair is two rows of n. `hidden` is packed once: 32 bits of a pair for each column, in panels of kColumns columns. A
// block of kBlockRows rows of total packs its columns of `gradient` in the same way, which needs no transposition. A
// tile of kRows x kColumns sums stays in registers while the pairs go by. kPairs pairs of a panel of either operand fit
// into the first-level cache together. Subnormal bfloat16 numbers count as zero, as with every such instruction.
#include <immintrin.h>
#include <string.h>

#include "../kernels.h"

#if defined(__clang__) || __GNUC__ >= 10

namespace {

#define SSPO_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

using sspo::ProductArgs;

constexpr int kLanes = 16, kRows = 6, kVectors = 4, kColumns = kVectors * kLanes, kBlockRows = 16 * kRows;
constexpr int64_t kPairs = 128;

struct Packing {
    int64_t pairs, length, width;  // all pairs; pairs of a full block of them; columns with padding

    explicit Packing(const ProductArgs& a) {
        pairs = (a.n + 1) / 2, width = (a.H + kColumns - 1) / kColumns * kColumns;
        const int64_t blocks = (pairs + kPairs - 1) / kPairs;
        length = blocks ? (pairs + blocks - 1) / blocks : 1;
    }
    int64_t length_at(int64_t first_pair) const { return pairs - first_pair < length ? pairs - first_pair : length; }
};

// Pair p of columns [begin, begin + count) of a (n, columns) matrix.
inline void interleave(const uint16_t* rows, int64_t stride, int64_t n, int64_t p, int64_t begin, int64_t count,
                       uint32_t* out) {
    const uint16_t* even = rows + 2 * p * stride + begin;
    if (2 * p + 1 == n) {
        for (int64_t i = 0; i < count; ++i) out[i] = even[i];
        return;
    }
    const uint16_t* odd = even + stride;
    for (int64_t i = 0; i < count; ++i) out[i] = even[i] | (uint32_t)odd[i] << 16;
}

int64_t packed_size(const ProductArgs& a) {
    const Packing packing(a);
    return packing.pairs * packing.width;
}

// Packed: blocks of pairs, in these panels of columns, in these pairs.
void pack(const ProductArgs& a, uint32_t* packed, int64_t begin, int64_t end) {
    const Packing packing(a);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p / packing.length * packing.length, length = packing.length_at(first);
        uint32_t* out = packed + first * packing.width + (p - first) * kColumns;
        for (int64_t column = 0; column < a.H; column += kColumns, out += length * kColumns) {
            const int64_t count = a.H - column < kColumns ? a.H - column : kColumns;
            interleave(a.hidden, a.hidden_stride, a.n, p, column, count, out);
            for (int64_t i = count; i < kColumns; ++i) out[i] = 0;
        }
    }
}

struct Tile {
    const uint32_t *gradient, *hidden;  // (length, kRows) and (length, kColumns)
    int64_t length;
    float* total;
    int64_t stride;
    int64_t columns;  // at most kColumns are read and written
    bool first;
};

template <int kTileRows>
SSPO_BF16 void multiply_tile(const Tile& t) {
    __m512 sums[kTileRows][kVectors];
    __mmask16 mask[kVectors];
    for (int j = 0; j < kVectors; ++j) {
        const int64_t left = t.columns - j * kLanes;
        mask[j] = (__mmask16)(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
    }
    for (int r = 0; r < kTileRows; ++r)
        for (int j = 0; j < kVectors; ++j) {
            float* at = t.total + r * t.stride + j * kLanes;
            sums[r][j] = t.first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask[j], at);
            _mm_prefetch((const char*)(at + 2 * kColumns), _MM_HINT_T1);  // a prefetch past the end does nothing
        }
    for (int64_t p = 0; p < t.length; ++p) {
        __m512bh columns[kVectors];
        for (int j = 0; j < kVectors; ++j)
            columns[j] = (__m512bh)_mm512_loadu_si512(t.hidden + p * kColumns + j * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32((int)t.gradient[p * kRows + r]);
            for (int j = 0; j < kVectors; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], row, columns[j]);
        }
    }
    for (int r = 0; r < kTileRows; ++r)
        for (int j = 0; j < kVectors; ++j)
            _mm512_mask_storeu_ps(t.total + r * t.stride + j * kLanes, mask[j], sums[r][j]);
}

// Columns [begin, begin + rows) of the gradient, pairs [first, first + length): panels of kRows, in these pairs.
void pack_gradient(const ProductArgs& a, int64_t first, int64_t length, int64_t begin, int64_t rows, uint32_t* out) {
    uint32_t line[kBlockRows] = {};
    for (int64_t p = 0; p < length; ++p) {
        interleave(a.gradient, a.gradient_stride, a.n, first + p, begin, rows, line);
        for (int64_t row = 0; row < rows; row += kRows)
            memcpy(out + row * length + p * kRows, line + row, kRows * sizeof(uint32_t));
    }
}

void multiply(const ProductArgs& a, const uint32_t* packed, int64_t begin, int64_t end) {
    const Packing packing(a);
    alignas(64) uint32_t gradient[kBlockRows * kPairs];
    for (int64_t block = begin; block < end; block += kBlockRows) {
        const int64_t rows = end - block < kBlockRows ? end - block : kBlockRows;
        int64_t first = 0;
        do {  // once also for n = 0, which writes zeros where total is written
            const int64_t length = packing.length_at(first);
            pack_gradient(a, first, length, block, rows, gradient);
            for (int64_t row = 0; row < rows; row += kRows)
                for (int64_t column = 0; column < a.H; column += kColumns) {
                    Tile tile{gradient + row * length,
                              packed + first * packing.width + column * length,
                              length,
                              a.total + (block + row) * a.total_stride + column,
                              a.total_stride,
                              a.H - column,
                              a.first && first == 0};
                    if (rows - row >= kRows) {
                        multiply_tile<kRows>(tile);
                        continue;
                    }
                    for (int64_t r = row; r < rows; ++r, ++tile.gradient, tile.total += tile.stride)
                        multiply_tile<1>(tile);
                }
            first += packing.length;
        } while (first < packing.pairs);
    }
}

constexpr sspo::Product kProduct = {kBlockRows, packed_size, pack, multiply};

}  // namespace

const sspo::Product* const sspo::kAvx512Bf16Product = &kProduct;

#else

const sspo::Product* const sspo::kAvx512Bf16Product = nullptr;

#endif
