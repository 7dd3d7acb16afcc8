// Two implementations that give the same bits: integer arithmetic for any CPU, and F16C chosen at run time on
// x86 (ds_force_portable_half lets tests compare them). Other CPUs use the integer one, which compilers vectorise.
#include "half.h"

#include <atomic>
#include <cstring>

#include "dwarfstar_native.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define DS_F16C 1
#include <immintrin.h>
#endif

namespace {

constexpr uint16_t HALF_NAN = 0x7E00;
std::atomic<bool> force_portable{false};

uint16_t half_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return HALF_NAN;
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 2^16 or more: infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: subnormal. 0.5 has an ulp of 2^-24, the unit of subnormal halves.
        float value;
        std::memcpy(&value, &magnitude, 4);
        value += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &value, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3F000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13));
}

float half_value(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1Fu;
    const uint32_t mantissa = half & 0x3FFu;
    uint32_t bits;
    if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, exact
        const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7F800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u);  // NaN is quiet
    } else {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void to_half_portable(const float *x, size_t n, float factor, uint8_t *out) {
    for (size_t i = 0; i < n; ++i) {
        const uint16_t half = half_bits(x[i] * factor);
        std::memcpy(out + 2 * i, &half, 2);
    }
}

void from_half_portable(const uint8_t *data, size_t n, float scale, float *out) {
    for (size_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, data + 2 * i, 2);
        out[i] = half_value(half) * scale;
    }
}

#ifdef DS_F16C
bool has_f16c() {
    static const bool there = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
    return there && !force_portable.load(std::memory_order_relaxed);
}

__attribute__((target("avx,f16c"))) void to_half_f16c(const float *x, size_t n, float factor, uint8_t *out) {
    const __m256 by = _mm256_set1_ps(factor);
    const __m256 quiet = _mm256_set1_ps(__builtin_nanf(""));  // converts to HALF_NAN
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), by);
        v = _mm256_blendv_ps(v, quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + 2 * i), halves);
    }
    to_half_portable(x + i, n - i, factor, out + 2 * i);
}

__attribute__((target("avx,f16c"))) void from_half_f16c(const uint8_t *data, size_t n, float scale, float *out) {
    const __m256 by = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 2 * i));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(halves), by));
    }
    from_half_portable(data + 2 * i, n - i, scale, out + i);
}
#endif

}  // namespace

namespace ds {

void to_half(const float *x, size_t n, float factor, void *out) {
    auto *bytes = static_cast<uint8_t *>(out);
#ifdef DS_F16C
    if (has_f16c()) return to_half_f16c(x, n, factor, bytes);
#endif
    to_half_portable(x, n, factor, bytes);
}

void from_half(const void *data, size_t n, float scale, float *out) {
    const auto *bytes = static_cast<const uint8_t *>(data);
#ifdef DS_F16C
    if (has_f16c()) return from_half_f16c(bytes, n, scale, out);
#endif
    from_half_portable(bytes, n, scale, out);
}

}  // namespace ds

extern "C" void ds_force_portable_half(bool on) { force_portable.store(on); }
