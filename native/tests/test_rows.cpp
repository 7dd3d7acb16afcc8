// Embedding rows, argmax, log-probabilities and the bandwidth probe.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace {

using Floats = std::vector<float>;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

void widen(const void *x, float *y, int64_t k) {
    for (int64_t i = 0; i < k; ++i) y[i] = static_cast<const signed char *>(x)[i];
}

void embeds() {
    const std::vector<signed char> bytes = {1, 2, 3, 4, 5, 6};
    const Floats rows = {1, 2, 3, 4, 5, 6};
    const int32_t ids[] = {2, 0, 2};
    Floats out(6);
    CHECK(ds_embed_rows(widen, bytes.data(), 3, 2, 2, ids, 3, 1.0f, out.data()) == DS_OK);
    CHECK((out == Floats{5, 6, 1, 2, 5, 6}));
    CHECK(ds_embed_rows(nullptr, rows.data(), 3, 8, 2, ids, 3, 0.5f, out.data()) == DS_OK);
    CHECK((out == Floats{2.5f, 3, 0.5f, 1, 2.5f, 3}));
    const int32_t high[] = {0, 3}, low[] = {0, -1};
    CHECK(ds_embed_rows(widen, bytes.data(), 3, 2, 2, high, 2, 1.0f, out.data()) == DS_E_RANGE);
    CHECK(ds_embed_rows(widen, bytes.data(), 3, 2, 2, low, 2, 1.0f, out.data()) == DS_E_RANGE);
    CHECK(ds_embed_rows(nullptr, rows.data(), 3, 4, 2, ids, 3, 1.0f, out.data()) == DS_E_SIZE);
    CHECK(ds_embed_rows(nullptr, nullptr, 0, 8, 2, nullptr, 0, 1.0f, nullptr) == DS_OK);
}

// llama_sampler_greedy_apply.
int32_t greedy(const Floats &x) {
    int32_t best = 0;
    for (int32_t i = 1; i < static_cast<int32_t>(x.size()); ++i) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

void picks_as_greedy_does() {
    const int32_t n = 75;
    uint32_t state = 1;
    for (int round = 0; round < 400; ++round) {
        Floats x(n);
        for (float &value : x) {
            state = state * 1664525u + 1013904223u;
            const uint32_t pick = state >> 27;  // few values: ties are common
            value = pick == 0 ? NOT_A_NUMBER : pick == 1 ? -INF : pick == 2 && round % 7 == 0 ? INF : static_cast<float>(pick);
        }
        CHECK(ds_argmax(x.data(), n) == greedy(x));
    }
    const Floats low(n, -INF), none(n, NOT_A_NUMBER);
    CHECK(ds_argmax(low.data(), n) == 0 && ds_argmax(none.data(), n) == 0);
    CHECK(ds_argmax(low.data(), 0) == DS_E_ARG && ds_argmax(nullptr, 5) == DS_E_ARG);
}

void ranks_log_probabilities() {
    const Floats x = {1, 3, NOT_A_NUMBER, 3, -INF, 2};
    int32_t ids[20];
    float values[20], chosen = 0;
    CHECK(ds_top_logprobs(x.data(), 6, 0, 3, ids, values, &chosen) == 3);
    const double sum = std::log(std::exp(1.0) + 2 * std::exp(3.0) + std::exp(2.0));
    CHECK(ids[0] == 1 && ids[1] == 3 && ids[2] == 5);
    CHECK(std::fabs(values[0] - (3 - sum)) < 1e-6 && std::fabs(values[2] - (2 - sum)) < 1e-6);
    CHECK(std::fabs(chosen - (1 - sum)) < 1e-6);
    CHECK(ds_top_logprobs(x.data(), 6, 4, 20, ids, values, &chosen) == 6 && chosen == -INF && ids[3] == 0);
    CHECK(ds_top_logprobs(x.data(), 6, 0, 0, nullptr, nullptr, &chosen) == 0);
    CHECK(ds_top_logprobs(x.data(), 6, 6, 1, ids, values, &chosen) == DS_E_RANGE);
    CHECK(ds_top_logprobs(x.data(), 6, 0, 21, ids, values, &chosen) == DS_E_ARG);
    const Floats broken = {1, INF};
    CHECK(ds_top_logprobs(broken.data(), 2, 0, 1, ids, values, &chosen) == DS_E_DATA);
}

void probes() {
    CHECK(ds_memory_bandwidth(2, 4 << 20, 0.001) > 0);
    CHECK(ds_memory_bandwidth(0, 4 << 20, 0.001) == DS_E_ARG && ds_memory_bandwidth(1, 10, 0.001) == DS_E_ARG);
    CHECK(ds_memory_bandwidth(1, 4 << 20, NOT_A_NUMBER) == DS_E_ARG && ds_memory_bandwidth(1, 4 << 20, 1e9) == DS_E_ARG);
    CHECK(ds_memory_bandwidth(1, DS_PROBE_MAX_BYTES + 1, 0.001) == DS_E_ARG);
}

}  // namespace

void test_rows() {
    embeds();
    picks_as_greedy_does();
    ranks_log_probabilities();
    probes();
}
