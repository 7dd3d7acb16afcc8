// CRC-32C: eight bytes an instruction where the CPU has one (SSE 4.2, ARMv8 CRC), eight tables elsewhere.
#include <array>
#include <cstring>

#include "dwarfstar_native.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DS_CRC_X86 1
#include <nmmintrin.h>
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define DS_CRC_ARM 1
#include <arm_acle.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace {

constexpr uint32_t POLYNOMIAL = 0x82F63B78u;  // Castagnoli, reflected

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the checksum of byte b followed by k zero bytes.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? POLYNOMIAL : 0u);
        tables[0][b] = crc;
    }
    for (uint32_t b = 0; b < 256; ++b) {
        for (size_t k = 1; k < 8; ++k) tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFFu];
    }
    return tables;
}

constexpr Tables TABLES = make_tables();

uint32_t crc_portable(uint32_t crc, const uint8_t *data, uint64_t n) {
    for (; n >= 8; n -= 8, data += 8) {
        crc ^= static_cast<uint32_t>(data[0]) | static_cast<uint32_t>(data[1]) << 8 |
               static_cast<uint32_t>(data[2]) << 16 | static_cast<uint32_t>(data[3]) << 24;
        crc = TABLES[7][crc & 0xFFu] ^ TABLES[6][(crc >> 8) & 0xFFu] ^ TABLES[5][(crc >> 16) & 0xFFu] ^
              TABLES[4][crc >> 24] ^ TABLES[3][data[4]] ^ TABLES[2][data[5]] ^ TABLES[1][data[6]] ^
              TABLES[0][data[7]];
    }
    for (; n > 0; --n, ++data) crc = (crc >> 8) ^ TABLES[0][(crc ^ *data) & 0xFFu];
    return crc;
}

#if defined(DS_CRC_X86)
bool has_crc() {
    static const bool there = __builtin_cpu_supports("sse4.2");
    return there;
}

__attribute__((target("sse4.2"))) uint32_t crc_cpu(uint32_t crc, const uint8_t *data, uint64_t n) {
    uint64_t wide = crc;
    for (; n >= 8; n -= 8, data += 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    auto narrow = static_cast<uint32_t>(wide);
    for (; n > 0; --n, ++data) narrow = _mm_crc32_u8(narrow, *data);
    return narrow;
}
#elif defined(DS_CRC_ARM)
bool has_crc() {
#if defined(__linux__)
    static const bool there = (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
    return there;
#elif defined(__APPLE__)
    return true;  // every 64-bit ARM Mac
#else
    return false;
#endif
}

#if defined(__clang__)
__attribute__((target("crc")))
#else
__attribute__((target("+crc")))
#endif
uint32_t crc_cpu(uint32_t crc, const uint8_t *data, uint64_t n) {
    for (; n >= 8; n -= 8, data += 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        crc = __crc32cd(crc, word);
    }
    for (; n > 0; --n, ++data) crc = __crc32cb(crc, *data);
    return crc;
}
#else
bool has_crc() { return false; }
uint32_t crc_cpu(uint32_t crc, const uint8_t *data, uint64_t n) { return crc_portable(crc, data, n); }
#endif

}  // namespace

extern "C" {

uint32_t ds_crc32c(uint32_t seed, const void *data, uint64_t n) {
    if (data == nullptr || n == 0) return seed;
    const auto *bytes = static_cast<const uint8_t *>(data);
    return ~(has_crc() ? crc_cpu(~seed, bytes, n) : crc_portable(~seed, bytes, n));
}

uint32_t ds_crc32c_portable(uint32_t seed, const void *data, uint64_t n) {
    if (data == nullptr || n == 0) return seed;
    return ~crc_portable(~seed, static_cast<const uint8_t *>(data), n);
}
}
