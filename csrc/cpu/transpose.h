// SPDX-License-Identifier: Apache-2.0
// Transposes a matrix of 16-bit elements.
#pragma once

#include <cstdint>

namespace sspo {

// dst (cols, rows) = src (rows, cols) transposed. The strides are those between rows, in elements.
void transpose16(const uint16_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint16_t* dst, int64_t dst_stride,
                 int threads);

}  // namespace sspo
