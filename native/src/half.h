// f32 ↔ f16 for whole rows, with a power-of-two scale.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds {

// out[i] = half(x[i] · factor), round to nearest even. NaN becomes 0x7E00 whatever its payload. out may be unaligned.
void to_half(const float *x, size_t n, float factor, void *out);

// out[i] = float(half in data[i]) · scale. data may be unaligned.
void from_half(const void *data, size_t n, float scale, float *out);

}  // namespace ds
