// Codecs on exactly sized buffers, over awkward values; checksums against known values.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<unsigned char>;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

Bytes encode(int32_t dtype, const Floats &x, int64_t rows, int64_t cols) {
    const int64_t size = ds_encoded_size(dtype, rows, cols);
    CHECK(size >= 0);
    Bytes out(static_cast<size_t>(size));
    CHECK(ds_encode(dtype, x.data(), rows, cols, out.data(), out.size()) == size);
    return out;
}

Floats decode(int32_t dtype, const Bytes &data, int64_t rows, int64_t cols) {
    Floats out(static_cast<size_t>(rows * cols));
    CHECK(ds_decode(dtype, data.data(), data.size(), rows, cols, out.data(), out.size()) == DS_OK);
    return out;
}

// A small generator with a fixed seed: magnitudes from 2^-20 to 2^20.
Floats numbers(size_t n) {
    Floats out(n);
    uint64_t state = 12345;
    for (float &x : out) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        const auto mantissa = static_cast<float>(static_cast<int64_t>(state >> 40) - (1 << 23));
        x = std::ldexp(mantissa, static_cast<int>((state >> 20) % 40) - 43);
    }
    return out;
}

void keeps_what_it_promises() {
    for (const int64_t cols : {1, 7, 8, 31, 32, 33, 576}) {
        const int64_t rows = 3;
        const Floats x = numbers(static_cast<size_t>(rows * cols));
        CHECK(decode(DS_F32, encode(DS_F32, x, rows, cols), rows, cols) == x);
        const Bytes halves = encode(DS_F16, x, rows, cols);
        const Floats h = decode(DS_F16, halves, rows, cols);
        const Floats q = decode(DS_Q8, encode(DS_Q8, x, rows, cols), rows, cols);
        for (int64_t r = 0; r < rows; ++r) {
            float top = 0;
            for (int64_t c = 0; c < cols; ++c) top = std::max(top, std::fabs(x[r * cols + c]));
            for (int64_t c = 0; c < cols; ++c) {
                const size_t i = static_cast<size_t>(r * cols + c);
                CHECK(std::fabs(h[i] - x[i]) <= std::max(std::fabs(x[i]) * 0x1p-11f, top * 0x1p-38f));
                float block = 0;
                for (int64_t b = c / 16 * 16; b < std::min(cols, c / 16 * 16 + 16); ++b) {
                    block = std::max(block, std::fabs(x[r * cols + b]));
                }
                // A scale is rounded up by at most 2^-4, and reaches 2^-16 of the row's largest.
                CHECK(std::fabs(q[i] - x[i]) <= std::max(block / 254 * 1.0626f, top * 0x1p-23f));
            }
        }
        CHECK(encode(DS_F16, h, rows, cols) == halves);  // a relay re-encodes what it decoded: nothing more is lost
    }
}

// The promise of Q8: the K largest of a row arrive as they are, wherever they lie, and ties go to the lower column.
void keeps_outliers_apart() {
    for (const int64_t cols : {1, 8, 9, 33, 576, 4096, 65536}) {
        const int64_t k = std::min(cols, std::max(int64_t{8}, cols / 128));
        const int64_t blocks = (cols + 15) / 16;
        CHECK(ds_encoded_size(DS_Q8, 1, cols) == 6 * k + 2 + blocks + cols);
        Floats x(static_cast<size_t>(cols), 1.0f);
        for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(cols - 1 - i * (cols / k))] = -12345.678f;
        const Floats q = decode(DS_Q8, encode(DS_Q8, x, 1, cols), 1, cols);
        for (size_t i = 0; i < x.size(); ++i) {
            CHECK(x[i] < 0 ? q[i] == x[i] : std::fabs(q[i] - 1.0f) <= 1.0626f / 254);
        }
    }
    const Bytes same = encode(DS_Q8, Floats(40, 2.0f), 1, 40), zeros = encode(DS_Q8, Floats(40), 1, 40);
    for (unsigned char i = 0; i < 8; ++i) CHECK(same[2 * i] == i && zeros[2 * i] == i);
}

void is_deterministic_off_the_numbers() {
    const Floats odd = {INF, -INF, NOT_A_NUMBER, -NOT_A_NUMBER, 0.0f, -0.0f, 1.0f, FLT_MIN, FLT_TRUE_MIN, -3e38f};
    const int64_t n = static_cast<int64_t>(odd.size());
    const Floats h = decode(DS_F16, encode(DS_F16, odd, 1, n), 1, n);
    CHECK(h[0] == INF && h[1] == -INF && std::isnan(h[2]) && std::isnan(h[3]) && h[4] == 0 && std::signbit(h[5]));
    CHECK(std::fabs(h[9] + 3e38f) <= 3e38f * 0x1p-11f);
    const Floats q = decode(DS_Q8, encode(DS_Q8, odd, 1, n), 1, n);
    CHECK(std::isnan(q[0]) && std::isnan(q[1]) && std::isnan(q[2]) && q[4] == 0 && q[6] == 1);
    CHECK(q[9] == -3e38f);
    for (const float value : {0.0f, FLT_TRUE_MIN, FLT_MIN, 1e-30f, 1.0f, 65504.0f, 1e30f}) {
        const Floats row(40, -value);
        const Floats halves = decode(DS_F16, encode(DS_F16, row, 1, 40), 1, 40);
        CHECK(std::fabs(halves[39] + value) <= value * 0x1p-11f);
        CHECK(std::fabs(decode(DS_Q8, encode(DS_Q8, row, 1, 40), 1, 40)[39] + value) <= value / 254 + 0x1p-100f);
    }
    const Floats limit(33, FLT_MAX);
    CHECK(std::isfinite(decode(DS_Q8, encode(DS_Q8, limit, 1, 33), 1, 33)[32]));
    for (const int32_t dtype : {DS_F16, DS_Q8}) {
        const Bytes all = encode(dtype, Floats(5, NOT_A_NUMBER), 1, 5);
        CHECK(all == encode(dtype, Floats(5, -NOT_A_NUMBER), 1, 5));
        CHECK(std::isnan(decode(dtype, all, 1, 5)[4]));
    }
}

void cpu_and_portable_halves_agree() {
    Floats x = numbers(4096 + 5);
    x[3] = INF, x[4] = NOT_A_NUMBER, x[5] = -NOT_A_NUMBER, x[6] = FLT_TRUE_MIN, x[7] = 0x1p-24f;
    const auto n = static_cast<int64_t>(x.size());
    const Bytes fast = encode(DS_F16, x, 1, n);
    // All 65536 halves, behind a scale of 1.
    Bytes every(4 + 2 * 65536);
    const float one = 1.0f;
    std::memcpy(every.data(), &one, 4);
    for (uint32_t i = 0; i < 65536; ++i) {
        every[4 + 2 * i] = static_cast<unsigned char>(i), every[5 + 2 * i] = static_cast<unsigned char>(i >> 8);
    }
    const Floats wide = decode(DS_F16, every, 1, 65536);
    ds_force_portable_half(true);
    CHECK(encode(DS_F16, x, 1, n) == fast);
    const Floats portable = decode(DS_F16, every, 1, 65536);
    ds_force_portable_half(false);
    CHECK(std::memcmp(wide.data(), portable.data(), 4 * 65536) == 0);
    CHECK(wide[0x3C00] == 1.0f && wide[0xC000] == -2.0f && wide[0x0001] == 0x1p-24f && wide[0x7BFF] == 65504.0f);
}

// Every 16 bits of the columns and the scale of a row, one at a time: read inside the buffers, or refused.
void refuses_broken_q8() {
    const int64_t cols = 40, k = 8, scale = 6 * k;
    const Bytes sound = encode(DS_Q8, numbers(static_cast<size_t>(cols)), 1, cols);
    Floats out(static_cast<size_t>(cols));
    for (const int64_t at : {int64_t{0}, 2 * k - 2, scale}) {
        int64_t taken = 0;
        for (uint32_t bits = 0; bits < 65536; ++bits) {
            Bytes data = sound;
            data[static_cast<size_t>(at)] = static_cast<unsigned char>(bits);
            data[static_cast<size_t>(at) + 1] = static_cast<unsigned char>(bits >> 8);
            const int32_t status = ds_decode(DS_Q8, data.data(), data.size(), 1, cols, out.data(), out.size());
            CHECK(status == DS_OK || status == DS_E_DATA);
            taken += status == DS_OK;
        }
        // All scales there are but 0, which a block below it rules out.
        CHECK(at < scale ? taken > 0 && taken <= cols : taken == (127 + 121 - 19) * 16 + 1);
    }
}

void checks_bounds() {
    const Floats x(64, 1.0f);
    for (const int32_t dtype : {DS_F32, DS_F16, DS_Q8}) {
        Bytes data = encode(dtype, x, 2, 32);
        Floats out(64);
        CHECK(ds_encode(dtype, x.data(), 2, 32, data.data(), data.size() - 1) == DS_E_SIZE);
        CHECK(ds_decode(dtype, data.data(), data.size() - 1, 2, 32, out.data(), 64) == DS_E_SIZE);
        CHECK(ds_decode(dtype, data.data(), data.size() + 1, 2, 32, out.data(), 64) == DS_E_SIZE);
        CHECK(ds_decode(dtype, data.data(), data.size(), 2, 32, out.data(), 63) == DS_E_SIZE);
        CHECK(ds_encoded_size(dtype, -1, 32) == DS_E_ARG && ds_encoded_size(dtype, 1, 0) == DS_E_ARG);
        CHECK(ds_encoded_size(dtype, INT64_MAX, INT64_MAX) == DS_E_ARG && ds_encoded_size(dtype, 1, 65537) == DS_E_ARG);
        CHECK(ds_encoded_size(dtype, 0, 32) == 0 && ds_encode(dtype, nullptr, 0, 32, nullptr, 0) == 0);
        if (dtype == DS_Q8) continue;
        for (const float scale : {NOT_A_NUMBER, INF, -1.0f}) {
            std::memcpy(data.data(), &scale, 4);
            const int32_t want = dtype == DS_F32 ? DS_OK : DS_E_DATA;
            CHECK(ds_decode(dtype, data.data(), data.size(), 2, 32, out.data(), 64) == want);
        }
    }
    refuses_broken_q8();
    CHECK(ds_encoded_size(0, 1, 1) == DS_E_ARG && ds_encoded_size(4, 1, 1) == DS_E_ARG);
    CHECK(ds_encoded_size(DS_Q8, 2, 33) == 2 * (48 + 2 + 3 + 33) && ds_encoded_size(DS_F16, 2, 33) == 2 * (4 + 66));
}

void checksums() {
    const std::string text = "123456789";  // the check value of the CRC catalogue
    CHECK(ds_crc32c(0, text.data(), 9) == 0xE3069283u && ds_crc32c_portable(0, text.data(), 9) == 0xE3069283u);
    const Bytes zeros(32);  // RFC 3720 B.4
    CHECK(ds_crc32c(0, zeros.data(), 32) == 0x8A9136AAu);
    Bytes data(1000);
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<unsigned char>(i * i);
    for (size_t cut = 0; cut < 40; ++cut) {
        const uint32_t whole = ds_crc32c(0, data.data(), data.size());
        const uint32_t first = ds_crc32c(0, data.data(), cut);
        CHECK(ds_crc32c(first, data.data() + cut, data.size() - cut) == whole);
        CHECK(ds_crc32c_portable(7, data.data() + cut, 100) == ds_crc32c(7, data.data() + cut, 100));
    }
    CHECK(ds_crc32c(5, nullptr, 0) == 5);
}

}  // namespace

void test_codec() {
    keeps_what_it_promises();
    keeps_outliers_apart();
    is_deterministic_off_the_numbers();
    cpu_and_portable_halves_agree();
    checks_bounds();
    checksums();
}
