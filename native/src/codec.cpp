// How hidden states travel. All layouts are little-endian and unpadded, rows one after the other.
//
//   F32  cols floats a row: what the model computed, bit for bit.
//   F16  a row is one f32 scale, then cols halves; value = half · scale. The scale is a power of two that brings
//        the row's largest finite magnitude into [2^14, 2^15): no overflow however large activations are, and no
//        error but the half's own rounding (2^-11 relative; 2^-39 of the largest for values far below it).
//        Only within 2^-12 of the end of f32's range does rounding reach infinity.
//   Q8   a row is, in this order,
//          K columns (u16, ascending) and their K values (f32): the row's largest magnitudes, kept as they are;
//          the row's scale (u16), and for each block of 16 how far its own scale is below that (u8);
//          one int8 a value; value = int8 · the block's scale. The last block may be shorter.
//        K is one column in 128, at least 8. A scale is the upper 13 bits of an f32, so 16 steps are an octave and
//        u8 reaches 16 octaves down. It is largest / 127 of what is left in the block, rounded up by at most 2^-4 of
//        it; values are rounded to nearest, ties to even. Error ≤ scale / 2.
//
// Why some are kept: the residual stream has a few columns that are 10 to 1000 times larger than all others, and would
// take the precision of their blocks with them. docs/wire.md has the figures.
//
// Not finite: F16 keeps ±inf and NaN. Q8 turns all of them into NaN (−128 in a block), so that a broken model stays
// visibly broken. Rows of zeros have scale 1 (F16) and 0 (Q8). Every byte is a function of the values alone, never
// of the CPU.
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

constexpr int64_t BLOCK = 16;  // at most 32, the bits of a mask
constexpr int64_t MAX_ROWS = 1 << 20;  // a frame has at most thousands of rows,
constexpr int64_t MAX_COLS = 1 << 16;  // a model at most tens of thousands of columns, and Q8 counts them in 16 bits
constexpr int64_t MAX_BLOCKS = MAX_COLS / BLOCK;
constexpr int64_t GROUP = 16;  // blocks
constexpr int64_t MIN_APART = 8;  // small models have as many outliers as large ones
constexpr int64_t COLS_PER_APART = 128;
constexpr int8_t NOT_FINITE = -128;
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
// Scales as the upper bits of an f32. Below the smallest a Q8 row counts as zeros, for no activation means anything
// there; the largest is 2^121, for 127 times the next is infinite.
constexpr int SCALE_SHIFT = 19;
constexpr uint16_t MIN_SCALE = (127 - 108) << 4, MAX_SCALE = (127 + 121) << 4;
constexpr uint16_t MAX_BELOW = 255;
static_assert(MIN_SCALE > MAX_BELOW, "the scale of a block stays above 0");

int64_t blocks_of(int64_t cols) { return (cols + BLOCK - 1) / BLOCK; }

int64_t apart_of(int64_t cols) { return std::min(cols, std::max(MIN_APART, cols / COLS_PER_APART)); }

int64_t row_size(int32_t dtype, int64_t cols) {
    switch (dtype) {
        case DS_F32: return 4 * cols;
        case DS_F16: return 4 + 2 * cols;
        case DS_Q8: return 6 * apart_of(cols) + 2 + blocks_of(cols) + cols;
        default: return DS_E_ARG;
    }
}

// The largest finite magnitude; 0 if there is none. By its bits, which order as the values do: compilers vectorise the
// maximum of integers, and leave branches in that of floats, which nobody can predict.
float largest(const float *x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        top = std::max(top, bits < 0x7F800000 ? bits : 0);
    }
    float value;
    std::memcpy(&value, &top, 4);
    return value;
}

void encode_f16_row(const float *x, int64_t cols, uint8_t *out) {
    const float top = largest(x, cols);
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

float scale_value(int32_t upper) {
    const uint32_t bits = static_cast<uint32_t>(upper) << SCALE_SHIFT;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale;
}

// The scale for a largest finite magnitude `top`: no smaller than top / 127, so that nothing is cut off.
uint16_t scale_for(float top) {
    const float exact = top / 127.0f;
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    const auto upper = static_cast<uint16_t>((bits + (1u << SCALE_SHIFT) - 1) >> SCALE_SHIFT);
    return upper < MIN_SCALE ? uint16_t{0} : std::min(upper, MAX_SCALE);
}

// Which values of a row are kept apart: a bit each. The largest finite magnitude of the rest of each block, and of each
// group of blocks: a tournament, for a row of 8192 has 64 winners.
struct Apart {
    uint32_t mask[MAX_BLOCKS];
    float top[MAX_BLOCKS];
    float group_top[MAX_BLOCKS / GROUP];
};

// The first with this magnitude, which is there. From the end, without branches.
int64_t find(const float *x, int64_t n, float magnitude) {
    int64_t at = 0;
    for (int64_t i = n - 1; i >= 0; --i) at = std::fabs(x[i]) == magnitude ? i : at;
    return at;
}

// A block with its values apart as zeros: they leave nothing behind.
const float *without(uint32_t mask, const float *x, int64_t n, float *scratch) {
    if (mask == 0) return x;
    for (int64_t i = 0; i < n; ++i) scratch[i] = (mask >> i & 1u) != 0 ? 0.0f : x[i];
    return scratch;
}

// The K largest finite magnitudes, ties to the lower column; what is not finite counts as zero.
void choose_apart(const float *x, int64_t cols, Apart &apart) {
    const int64_t n_blocks = blocks_of(cols), n_groups = (n_blocks + GROUP - 1) / GROUP;
    for (int64_t b = 0; b < n_blocks; ++b) {
        apart.mask[b] = 0;
        apart.top[b] = largest(x + b * BLOCK, std::min(BLOCK, cols - b * BLOCK));
    }
    for (int64_t g = 0; g < n_groups; ++g) {
        apart.group_top[g] = largest(apart.top + g * GROUP, std::min(GROUP, n_blocks - g * GROUP));
    }
    float scratch[BLOCK];
    int64_t left = apart_of(cols);
    for (; left > 0; --left) {
        const float top = largest(apart.group_top, n_groups);
        if (top == 0) break;
        const int64_t g = find(apart.group_top, n_groups, top), in_group = std::min(GROUP, n_blocks - g * GROUP);
        const int64_t b = g * GROUP + find(apart.top + g * GROUP, in_group, top);
        const int64_t n = std::min(BLOCK, cols - b * BLOCK);
        apart.mask[b] |= 1u << find(without(apart.mask[b], x + b * BLOCK, n, scratch), n, top);
        apart.top[b] = largest(without(apart.mask[b], x + b * BLOCK, n, scratch), n);
        apart.group_top[g] = largest(apart.top + g * GROUP, in_group);
    }
    for (int64_t c = 0; left > 0; ++c) {  // nothing but zeros is left: the count is the same all the same
        const uint32_t bit = 1u << c % BLOCK;
        left -= (apart.mask[c / BLOCK] & bit) == 0;
        apart.mask[c / BLOCK] |= bit;
    }
}

void encode_q8_block(const float *x, int64_t n, float factor, uint8_t *out) {
    int8_t quants[BLOCK];  // of its own: it cannot overlap x
    for (int64_t i = 0; i < n; ++i) {
        const bool finite = std::fabs(x[i]) <= FLT_MAX;
        // Adding 1.5 · 2^23 leaves no fraction bits: it rounds to nearest even, and vectorises where lrint does not.
        const float value = finite ? x[i] : 0.0f;
        const auto rounded = static_cast<int32_t>(value * factor + 12582912.0f - 12582912.0f);
        // Near the end of f32's range a scale cannot be rounded up: 128 is possible.
        const int32_t quant = std::max(-127, std::min(127, rounded));
        quants[i] = static_cast<int8_t>(finite ? quant : NOT_FINITE);
    }
    std::memcpy(out, quants, static_cast<size_t>(n));
}

void encode_q8_row(const float *x, int64_t cols, uint8_t *out) {
    Apart apart;
    choose_apart(x, cols, apart);
    const int64_t n_blocks = blocks_of(cols);
    uint8_t *columns = out, *values = columns + 2 * apart_of(cols), *below = values + 4 * apart_of(cols) + 2;
    uint8_t *quants = below + n_blocks;
    const uint16_t scale = scale_for(largest(apart.top, n_blocks));
    std::memcpy(below - 2, &scale, 2);
    float scratch[BLOCK];
    for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t at = b * BLOCK, n = std::min(BLOCK, cols - at);
        for (int64_t i = 0; i < n && apart.mask[b] >> i != 0; ++i) {
            if ((apart.mask[b] >> i & 1u) == 0) continue;
            const auto column = static_cast<uint16_t>(at + i);
            const float value = std::fabs(x[column]) <= FLT_MAX ? x[column] : NOT_A_NUMBER;
            std::memcpy(columns, &column, 2), columns += 2;
            std::memcpy(values, &value, 4), values += 4;
        }
        const auto steps = std::min(static_cast<int>(MAX_BELOW), scale - scale_for(apart.top[b]));
        below[b] = static_cast<uint8_t>(steps);
        const float factor = scale == 0 ? 0.0f : 1.0f / scale_value(scale - steps);
        encode_q8_block(without(apart.mask[b], x + at, n, scratch), n, factor, quants + at);
    }
}

int32_t decode_q8_row(const uint8_t *data, int64_t cols, float *out) {
    const int64_t n_apart = apart_of(cols);
    const uint8_t *columns = data, *values = columns + 2 * n_apart, *below = values + 4 * n_apart + 2;
    const uint8_t *quants = below + blocks_of(cols);
    uint16_t largest_scale;
    std::memcpy(&largest_scale, below - 2, 2);
    if (largest_scale > MAX_SCALE || (largest_scale != 0 && largest_scale < MIN_SCALE)) return DS_E_DATA;
    for (int64_t at = 0; at < cols; at += BLOCK, ++below) {
        if (largest_scale == 0 && *below != 0) return DS_E_DATA;
        const float scale = scale_value(largest_scale - *below);
        const int64_t end = std::min(cols, at + BLOCK);
        for (int64_t i = at; i < end; ++i) {
            const auto quant = static_cast<int8_t>(quants[i]);
            out[i] = quant == NOT_FINITE ? NOT_A_NUMBER : static_cast<float>(quant) * scale;
        }
    }
    int64_t before = -1;
    for (int64_t k = 0; k < n_apart; ++k) {
        uint16_t column;
        float value;
        std::memcpy(&column, columns + 2 * k, 2);
        std::memcpy(&value, values + 4 * k, 4);
        if (column <= before || column >= cols || std::isinf(value)) return DS_E_DATA;
        out[column] = value;
        before = column;
    }
    return DS_OK;
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
