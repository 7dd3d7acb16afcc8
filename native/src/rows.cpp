// Embedding rows on the way in, logits rows on the way out.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "dwarfstar_native.h"

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The maximum, NaN left out; −inf if there is nothing else. Sixteen lanes, so that compilers vectorise it: with one
// they may not, for the order of comparisons would show.
float maximum(const float *x, int32_t n) {
    float lane[16];
    for (float &value : lane) value = LOWEST;
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int32_t j = 0; j < 16; ++j) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    }
    float best = LOWEST;
    for (; i < n; ++i) best = x[i] > best ? x[i] : best;
    for (const float value : lane) best = value > best ? value : best;
    return best;
}

// The log of Σ exp(x − top), in double: 100 000 terms of f32 would lose three digits. The terms themselves are f32
// exponentials, right to 1e-7.
double log_sum_exp(const float *x, int32_t n, float top) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        if (x[i] == x[i]) sum += static_cast<double>(std::exp(x[i] - top));
    }
    return std::log(sum);
}

}  // namespace

extern "C" {

int32_t ds_embed_rows(ds_to_float_fn to_float, const void *base, int64_t n_rows, int64_t row_bytes, int64_t n_embd,
                      const int32_t *ids, int64_t n, float scale, float *out) {
    if (n < 0 || n_rows < 0 || row_bytes <= 0 || n_embd <= 0) return DS_E_ARG;
    if (n == 0) return DS_OK;
    if (base == nullptr || ids == nullptr || out == nullptr) return DS_E_ARG;
    if (to_float == nullptr && row_bytes != 4 * n_embd) return DS_E_SIZE;
    for (int64_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= n_rows) return DS_E_RANGE;
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t *row = static_cast<const uint8_t *>(base) + ids[i] * row_bytes;
        float *to = out + i * n_embd;
        if (to_float == nullptr) {
            std::memcpy(to, row, static_cast<size_t>(row_bytes));
        } else {
            to_float(row, to, n_embd);
        }
        if (scale != 1.0f) {  // 1 must not turn a signalling NaN quiet, and costs a pass
            for (int64_t c = 0; c < n_embd; ++c) to[c] *= scale;
        }
    }
    return DS_OK;
}

int32_t ds_argmax(const float *logits, int32_t n) {
    if (logits == nullptr || n <= 0) return DS_E_ARG;
    if (logits[0] != logits[0]) return 0;  // llama.cpp starts at 0 and moves only to something greater
    const float best = maximum(logits, n);
    int32_t i = 0;
    while (logits[i] != best) ++i;
    return i;
}

int32_t ds_top_logprobs(const float *logits, int32_t n, int32_t chosen, int32_t k, int32_t *out_ids,
                        float *out_logprobs, float *out_chosen) {
    if (logits == nullptr || out_chosen == nullptr || n <= 0 || k < 0 || k > DS_MAX_TOP) return DS_E_ARG;
    if (k > 0 && (out_ids == nullptr || out_logprobs == nullptr)) return DS_E_ARG;
    if (chosen < 0 || chosen >= n) return DS_E_RANGE;
    const float top = maximum(logits, n);
    if (!(std::fabs(top) <= FLT_MAX)) return DS_E_DATA;
    const double shift = log_sum_exp(logits, n, top);
    const auto logprob = [&](float x) { return static_cast<float>((static_cast<double>(x) - top) - shift); };
    *out_chosen = logprob(logits[chosen]);

    // Insertion into a short sorted list: ids come in order and only a strictly greater logit moves up, so ties
    // keep the lower id first. NaN is as good as impossible.
    int32_t ids[DS_MAX_TOP];
    float best[DS_MAX_TOP];
    int32_t held = 0;
    for (int32_t i = 0; i < n && k > 0; ++i) {
        const float x = logits[i] == logits[i] ? logits[i] : LOWEST;
        if (held == k && !(x > best[held - 1])) continue;
        int32_t at = held < k ? held++ : held - 1;
        for (; at > 0 && x > best[at - 1]; --at) {
            best[at] = best[at - 1];
            ids[at] = ids[at - 1];
        }
        best[at] = x;
        ids[at] = i;
    }
    for (int32_t j = 0; j < held; ++j) {
        out_ids[j] = ids[j];
        out_logprobs[j] = logprob(best[j]);
    }
    return held;
}
}
