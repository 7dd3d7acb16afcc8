// How hidden states travel. All layouts are little-endian and unpadded, rows one after the other.
//
//   F32  cols floats a row: what the model computed, bit for bit.
//   F16  a row is one f32 scale, then cols halves; value = half · scale. The scale is a power of two that brings
//        the row's largest finite magnitude into [2^14, 2^15): no overflow however large activations are, and no
//        error but the half's own rounding (2^-11 relative; 2^-39 of the largest for values far below it).
//        Only within 2^-12 of the end of f32's range does rounding reach infinity.
//   Q8   a row is blocks of 32 (the last may be shorter): one f32 scale, then one int8 a value; value = int8 · scale,
//        scale = largest / 127, rounded to nearest, ties to even. Error ≤ scale / 2.
//
// Not finite: F16 keeps ±inf and NaN. Q8 has neither: −128 marks such a value and decodes to NaN, so that a broken
// model stays visibly broken. Rows and blocks of zeros have scale 1 and 0. Every byte is a function of the values
// alone, never of the CPU.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "dwarfstar_native.h"
#include "half.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian: this CPU needs byte swaps in codec.cpp"
#endif

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t MAX_ROWS = 1 << 20;  // a frame has at most thousands of rows,
constexpr int64_t MAX_COLS = 1 << 20;  // a model at most tens of thousands of columns; products stay inside int64
constexpr int8_t NOT_FINITE = -128;
// Below this a Q8 block counts as zeros: 127 / largest would overflow, and no activation means anything there.
constexpr float Q8_TINY = 7.8886090522101181e-31f;  // 2^-100
// The largest scale s with 127 · s still finite: FLT_MAX / 127 rounds up, past it.
const float Q8_MAX_SCALE = std::nextafter(FLT_MAX / 127.0f, 0.0f);

int64_t row_size(int32_t dtype, int64_t cols) {
    switch (dtype) {
        case DS_F32: return 4 * cols;
        case DS_F16: return 4 + 2 * cols;
        case DS_Q8: return 4 * ((cols + BLOCK - 1) / BLOCK) + cols;
        default: return DS_E_ARG;
    }
}

// The largest finite magnitude; 0 if there is none. Eight lanes, so that compilers vectorise it.
float largest(const float *x, size_t n) {
    float lane[8] = {};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (size_t j = 0; j < 8; ++j) {
            const float m = std::fabs(x[i + j]);
            const float finite = m <= FLT_MAX ? m : 0.0f;
            lane[j] = finite > lane[j] ? finite : lane[j];
        }
    }
    for (; i < n; ++i) {
        const float m = std::fabs(x[i]);
        if (m <= FLT_MAX && m > lane[0]) lane[0] = m;
    }
    return *std::max_element(lane, lane + 8);
}

void encode_f16_row(const float *x, int64_t cols, uint8_t *out) {
    const float top = largest(x, static_cast<size_t>(cols));
    int exponent = 0;
    if (top > 0) exponent = std::max(std::ilogb(top) - 14, -126);  // 2^-126: both it and its inverse are normal
    const float scale = std::ldexp(1.0f, exponent);
    std::memcpy(out, &scale, 4);
    ds::to_half(x, static_cast<size_t>(cols), std::ldexp(1.0f, -exponent), out + 4);
}

int32_t decode_f16_row(const uint8_t *data, int64_t cols, float *out) {
    float scale;
    std::memcpy(&scale, data, 4);
    if (!(scale > 0.0f) || !std::isfinite(scale)) return DS_E_DATA;
    ds::from_half(data + 4, static_cast<size_t>(cols), scale, out);
    return DS_OK;
}

void encode_q8_block(const float *x, int64_t n, uint8_t *out) {
    const float top = largest(x, static_cast<size_t>(n));
    const bool tiny = top < Q8_TINY;
    const float scale = tiny ? 0.0f : std::min(top / 127.0f, Q8_MAX_SCALE);
    const float factor = tiny ? 0.0f : 127.0f / top;
    std::memcpy(out, &scale, 4);
    int8_t quants[BLOCK];
    for (int64_t i = 0; i < n; ++i) {
        const bool finite = std::fabs(x[i]) <= FLT_MAX;
        // Adding 1.5 · 2^23 leaves no fraction bits: it rounds to nearest even, and vectorises where lrint does not.
        const float shifted = (finite ? x[i] * factor : 0.0f) + 12582912.0f;
        const auto rounded = static_cast<int32_t>(shifted - 12582912.0f);
        quants[i] = finite ? static_cast<int8_t>(rounded) : NOT_FINITE;
    }
    std::memcpy(out + 4, quants, static_cast<size_t>(n));
}

int32_t decode_q8_block(const uint8_t *data, int64_t n, float *out) {
    float scale;
    std::memcpy(&scale, data, 4);
    if (!(scale >= 0.0f) || !(scale <= Q8_MAX_SCALE)) return DS_E_DATA;
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < n; ++i) {
        const auto quant = static_cast<int8_t>(data[4 + i]);
        out[i] = quant == NOT_FINITE ? nan : static_cast<float>(quant) * scale;
    }
    return DS_OK;
}

void encode_q8_row(const float *x, int64_t cols, uint8_t *out) {
    for (int64_t at = 0; at < cols; at += BLOCK) {
        const int64_t n = std::min(BLOCK, cols - at);
        encode_q8_block(x + at, n, out);
        out += 4 + n;
    }
}

int32_t decode_q8_row(const uint8_t *data, int64_t cols, float *out) {
    int32_t status = DS_OK;
    for (int64_t at = 0; at < cols && status == DS_OK; at += BLOCK) {
        const int64_t n = std::min(BLOCK, cols - at);
        status = decode_q8_block(data, n, out + at);
        data += 4 + n;
    }
    return status;
}

}  // namespace

extern "C" {

int64_t ds_encoded_size(int32_t dtype, int64_t rows, int64_t cols) {
    if (rows < 0 || cols <= 0 || rows > MAX_ROWS || cols > MAX_COLS) return DS_E_ARG;
    const int64_t one = row_size(dtype, cols);
    return one < 0 ? one : rows * one;
}

int64_t ds_encode(int32_t dtype, const float *x, int64_t rows, int64_t cols, void *out, uint64_t capacity) {
    const int64_t size = ds_encoded_size(dtype, rows, cols);
    if (size <= 0) return size;
    if (x == nullptr || out == nullptr) return DS_E_ARG;
    if (capacity < static_cast<uint64_t>(size)) return DS_E_SIZE;
    auto *bytes = static_cast<uint8_t *>(out);
    if (dtype == DS_F32) {
        std::memcpy(bytes, x, static_cast<size_t>(size));
        return size;
    }
    const int64_t step = row_size(dtype, cols);
    for (int64_t r = 0; r < rows; ++r) {
        if (dtype == DS_F16) {
            encode_f16_row(x + r * cols, cols, bytes + r * step);
        } else {
            encode_q8_row(x + r * cols, cols, bytes + r * step);
        }
    }
    return size;
}

int32_t ds_decode(int32_t dtype, const void *data, uint64_t size, int64_t rows, int64_t cols, float *out,
                  uint64_t count) {
    const int64_t expected = ds_encoded_size(dtype, rows, cols);
    if (expected < 0) return static_cast<int32_t>(expected);
    if (size != static_cast<uint64_t>(expected) || count < static_cast<uint64_t>(rows * cols)) return DS_E_SIZE;
    if (expected == 0) return DS_OK;
    if (data == nullptr || out == nullptr) return DS_E_ARG;
    const auto *bytes = static_cast<const uint8_t *>(data);
    if (dtype == DS_F32) {
        std::memcpy(out, bytes, static_cast<size_t>(size));
        return DS_OK;
    }
    const int64_t step = row_size(dtype, cols);
    int32_t status = DS_OK;
    for (int64_t r = 0; r < rows && status == DS_OK; ++r) {
        status = dtype == DS_F16 ? decode_f16_row(bytes + r * step, cols, out + r * cols)
                                 : decode_q8_row(bytes + r * step, cols, out + r * cols);
    }
    return status;
}
}
