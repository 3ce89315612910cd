// SPDX-License-Identifier: Apache-2.0
#include "transpose.h"

#include <algorithm>

#include "dispatch.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sspo {

namespace {

// A block is read in 8 x 8 pieces while its source lines stay in the L1 cache, and its stores fill whole cache lines.
constexpr int64_t kBlockRows = 256, kBlockCols = 32;

void transpose_piece(const uint16_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint16_t* dst,
                     int64_t dst_stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

#if defined(__SSE2__)
void transpose_8x8(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride) {
    __m128i r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128((const __m128i*)(src + i * src_stride));
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm_unpacklo_epi16(r[i], r[i + 1]);
        t[i + 1] = _mm_unpackhi_epi16(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm_unpacklo_epi32(t[i], t[i + 2]);
        r[i + 1] = _mm_unpackhi_epi32(t[i], t[i + 2]);
        r[i + 2] = _mm_unpacklo_epi32(t[i + 1], t[i + 3]);
        r[i + 3] = _mm_unpackhi_epi32(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128((__m128i*)(dst + 2 * i * dst_stride), _mm_unpacklo_epi64(r[i], r[i + 4]));
        _mm_storeu_si128((__m128i*)(dst + (2 * i + 1) * dst_stride), _mm_unpackhi_epi64(r[i], r[i + 4]));
    }
}
#endif

void transpose_block(const uint16_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint16_t* dst,
                     int64_t dst_stride) {
    int64_t r = 0, c = 0;
#if defined(__SSE2__)
    for (; r + 8 <= rows; r += 8)
        for (c = 0; c + 8 <= cols; c += 8)
            transpose_8x8(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
    c = cols / 8 * 8;
    transpose_piece(src + c, src_stride, r, cols - c, dst + c * dst_stride, dst_stride);
#endif
    transpose_piece(src + r * src_stride, src_stride, rows - r, cols, dst + r, dst_stride);
}

}  // namespace

void transpose16(const uint16_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint16_t* dst, int64_t dst_stride,
                 int threads) {
    parallel_for(cols, 16 * kBlockCols, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = 0; r < rows; r += kBlockRows)
            for (int64_t c = begin; c < end; c += kBlockCols)
                transpose_block(src + r * src_stride + c, src_stride, std::min(kBlockRows, rows - r),
                                std::min(kBlockCols, end - c), dst + c * dst_stride + r, dst_stride);
    });
}

}  // namespace sspo
