// A llama.cpp made up for tests of the stage, and frames built from the layout a second time, apart from stage.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace stage_fake {

using Bytes = std::vector<uint8_t>;

constexpr int32_t EMBD = 40, VOCAB = 11, CAPACITY = 5, SLOTS = 3;  // 40: a q8 row has a short last block
constexpr size_t HEADER = 44, ROOM = 4096;
constexpr uint8_t STEP = 1, RESULT = 2, TOKENS = 4;

struct Dist {
    uint32_t seed;
};

// The graph has an input that can be overwritten and an output; it runs in micro-batches of two rows, as ubatch may.
struct Fake {
    ds_tap *tap = nullptr;
    std::vector<float> logits;
    std::vector<int32_t> slots, positions;
    std::vector<int8_t> outputs;
    std::string output_name = "l_out-1", input_name = "inp_scaled";
    int32_t planes = 1, answer = 0, calls = 0;
    bool injected = false, token_input = false;

    ~Fake() { ds_tap_free(tap); }
    static float hidden(float in, int32_t position, int32_t slot) {
        return 2 * in + static_cast<float>(position) + 100 * static_cast<float>(slot);
    }
    // The token with the largest logit; 0 for input that damaged frames bring.
    static int32_t token(float first, int32_t position) {
        return first >= 0 && first < 1000 ? (static_cast<int32_t>(first) + position) % VOCAB : 0;
    }

    bool show(const std::string &name, std::vector<float> &values) {
        ggml_tensor node{name.c_str(), reinterpret_cast<unsigned char *>(values.data()), values.size() * 4};
        return !ds_tap_callback(&node, true, tap) || ds_tap_callback(&node, false, tap);
    }
};

inline int32_t decode(void *context, ds_llama_batch batch) {
    Fake &fake = *static_cast<Fake *>(context);
    ++fake.calls;
    if (fake.answer != 0) return fake.answer;
    const int32_t n = batch.n_tokens;
    fake.positions.assign(batch.pos, batch.pos + n * fake.planes);
    fake.slots.clear();
    for (int32_t i = 0; i < n; ++i) {
        CHECK(batch.n_seq_id[i] == 1);
        fake.slots.push_back(batch.seq_id[i][0]);
    }
    fake.outputs.assign(batch.logits, batch.logits + n);
    fake.logits.assign(size_t(n) * VOCAB, 0.0f);
    CHECK((batch.token != nullptr) == fake.token_input && (batch.embd != nullptr) == !fake.token_input);
    for (int32_t at = 0; at < n; at += 2) {
        const int32_t end = std::min(at + 2, n);
        std::vector<float> values(size_t(end - at) * EMBD, -1.0f);
        if (batch.embd != nullptr) std::copy(batch.embd + at * EMBD, batch.embd + end * EMBD, values.begin());
        if (fake.tap != nullptr && !fake.show(fake.input_name, values)) return 0;
        for (int32_t i = at; i < end; ++i) {
            float *row = values.data() + size_t(i - at) * EMBD;
            fake.logits[size_t(i) * VOCAB + Fake::token(row[0], batch.pos[i])] = 5.0f;
            for (int32_t c = 0; c < EMBD; ++c) row[c] = Fake::hidden(row[c], batch.pos[i], batch.seq_id[i][0]);
        }
        if (fake.tap != nullptr && !fake.show(fake.output_name, values) && ds_tap_error(fake.tap) != DS_OK) return 0;
    }
    return 0;
}

inline float *logits(void *context, int32_t row) { return &static_cast<Fake *>(context)->logits[size_t(row) * VOCAB]; }

// A chain of samplers: `sample` gives the last one's seed, so that draws show which generator was in place.
using Chain = std::vector<Dist *>;
inline int32_t sample(void *chain, void *, int32_t row) {
    return static_cast<int32_t>(static_cast<Chain *>(chain)->back()->seed % 1000) * 10 + row;
}
inline void *chain_remove(void *chain, int32_t index) {
    auto &all = *static_cast<Chain *>(chain);
    Dist *out = all.at(size_t(index));
    all.erase(all.begin() + index);
    return out;
}
inline void chain_add(void *chain, void *sampler) {
    static_cast<Chain *>(chain)->push_back(static_cast<Dist *>(sampler));
}
inline void *init_dist(uint32_t seed) { return new Dist{seed}; }
inline void sampler_free(void *sampler) { delete static_cast<Dist *>(sampler); }

inline std::vector<float> table() {
    std::vector<float> rows(size_t(VOCAB) * EMBD);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 97) * 0.5f;
    return rows;
}
inline const std::vector<float> TABLE = table();

enum class Place { First, Middle, Last, Only };

struct Stage {
    Fake fake;
    ds_stage *stage = nullptr;
    ds_stage_config config{};

    explicit Stage(Place place, int32_t wire = DS_F32, bool injects = false, int32_t planes = 1) {
        const bool first = place == Place::First || place == Place::Only;
        const bool last = place == Place::Last || place == Place::Only;
        if (!last || injects) {
            CHECK(ds_tap_new(tensor_name, tensor_size, tensor_get, tensor_set, &fake.tap) == DS_OK);
            CHECK(ds_tap_set_names(fake.tap, last ? nullptr : "l_out-1", injects ? "inp_scaled" : nullptr) == DS_OK);
        }
        fake.planes = planes;
        fake.token_input = injects;
        config.context = &fake;
        config.decode = decode;
        config.logits = logits;
        config.sample = sample;
        config.chain_remove = chain_remove;
        config.chain_add = chain_add;
        config.init_dist = init_dist;
        config.sampler_free = sampler_free;
        config.tap = fake.tap;
        config.rows = first ? TABLE.data() : nullptr;
        config.n_rows = VOCAB;
        config.row_bytes = EMBD * 4;
        config.scale = 1.0f;
        config.n_embd = EMBD;
        config.n_vocab = VOCAB;
        config.capacity = CAPACITY;
        config.slots = SLOTS;
        config.planes = planes;
        config.wire = wire;
        config.first = first;
        config.last = last;
        config.injects = injects;
        config.token_input = injects;
        CHECK(ds_stage_new(&config, sizeof(ds_llama_batch), &stage) == DS_OK);
        for (int32_t slot = 0; last && slot < SLOTS; ++slot) {
            CHECK(ds_stage_sampler(stage, slot, 1, nullptr, -1, 0) == DS_OK);
        }
    }
    ~Stage() { ds_stage_free(stage); }
    Stage(const Stage &) = delete;
    Stage &operator=(const Stage &) = delete;

    // From and into buffers of exactly their size, so that a step beyond either end is seen.
    int64_t run(const Bytes &frame, Bytes *out = nullptr, size_t room = ROOM) {
        const std::unique_ptr<uint8_t[]> in(new uint8_t[frame.size()]), to(new uint8_t[room]);
        std::copy(frame.begin(), frame.end(), in.get());
        const int64_t size = ds_stage_run(stage, in.get(), frame.size(), 77, to.get(), room);
        CHECK(size <= static_cast<int64_t>(room) && size != 0);
        if (out != nullptr && size > 0) out->assign(to.get(), to.get() + size);
        return size;
    }
};

struct Row {
    int32_t position;
    uint16_t slot;
    uint8_t wants;
};
inline const std::vector<Row> ROWS = {{7, 2, 0}, {8, 2, 1}, {9, 2, 1}};

template <typename T>
inline void put(Bytes &to, T value) {
    const auto *bytes = reinterpret_cast<const uint8_t *>(&value);
    to.insert(to.end(), bytes, bytes + sizeof value);
}
template <typename T>
T get(const Bytes &from, size_t at) {
    T value;
    CHECK(at + sizeof value <= from.size());
    std::memcpy(&value, from.data() + at, sizeof value);
    return value;
}

inline void seal(Bytes &frame) {
    const uint32_t crc = ds_crc32c(0, frame.data(), frame.size() - 4);
    std::memcpy(frame.data() + frame.size() - 4, &crc, 4);
}

inline Bytes header(uint8_t kind, uint8_t payload, size_t timings, size_t rows, uint32_t cols, size_t payload_bytes) {
    Bytes out{'D', 'S', 'f', 0x1A, 1, kind, payload, 0};
    put<uint32_t>(out, 9);  // epoch
    put<uint16_t>(out, 3);  // lane
    put<uint16_t>(out, static_cast<uint16_t>(timings));
    put<uint64_t>(out, 0x123456789Aull);
    put<uint32_t>(out, static_cast<uint32_t>(rows));
    put<uint32_t>(out, cols);
    put<uint32_t>(out, 0);  // operations, zero
    put<uint32_t>(out, 0);
    put<uint32_t>(out, static_cast<uint32_t>(payload_bytes));
    CHECK(out.size() == HEADER);
    return out;
}

inline Bytes step_frame(const std::vector<Row> &rows, uint8_t payload, uint32_t cols, const Bytes &data,
                 const std::vector<uint32_t> &timings = {}) {
    Bytes out = header(STEP, payload, timings.size() / 2, rows.size(), cols, data.size());
    for (const Row &row : rows) put(out, row.position);
    for (const Row &row : rows) put(out, row.slot);
    for (const Row &row : rows) put(out, row.wants);
    for (const uint32_t value : timings) put(out, value);
    while (out.size() % 16 != 0) out.push_back(0);
    out.insert(out.end(), data.begin(), data.end());
    out.resize(out.size() + 4);
    seal(out);
    return out;
}

inline const std::vector<int32_t> IDS = {4, 10, 0, 1, 2};

inline Bytes tokens_frame(const std::vector<Row> &rows = ROWS, const std::vector<uint32_t> &timings = {}) {
    Bytes data;
    for (size_t i = 0; i < rows.size(); ++i) put(data, IDS[i % IDS.size()]);
    return step_frame(rows, TOKENS, 0, data, timings);
}

inline std::vector<float> embedded(size_t n) {
    std::vector<float> out;
    for (size_t i = 0; i < n; ++i) {
        const auto row = TABLE.begin() + IDS[i % IDS.size()] * EMBD;
        out.insert(out.end(), row, row + EMBD);
    }
    return out;
}

inline Bytes encoded(int32_t wire, const std::vector<float> &values) {
    const auto rows = static_cast<int64_t>(values.size()) / EMBD;
    Bytes out(static_cast<size_t>(ds_encoded_size(wire, rows, EMBD)));
    CHECK(ds_encode(wire, values.data(), rows, EMBD, out.data(), out.size()) == static_cast<int64_t>(out.size()));
    return out;
}

inline std::vector<float> decoded(int32_t wire, const Bytes &data, size_t rows) {
    std::vector<float> out(rows * EMBD);
    CHECK(ds_decode(wire, data.data(), data.size(), int64_t(rows), EMBD, out.data(), out.size()) == DS_OK);
    return out;
}

inline Bytes rows_frame(int32_t wire = DS_F32, const std::vector<Row> &rows = ROWS,
                 const std::vector<uint32_t> &timings = {}) {
    return step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, embedded(rows.size())), timings);
}

inline std::vector<float> through(std::vector<float> values, const std::vector<Row> &rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
        for (size_t c = i * EMBD; c < (i + 1) * EMBD; ++c) {
            values[c] = Fake::hidden(values[c], rows[i].position, rows[i].slot);
        }
    }
    return values;
}

// The measured time is the one thing that is taken from the frame given, not computed.
inline void check_step(const Bytes &out, const std::vector<Row> &rows, int32_t wire, const std::vector<float> &values,
                std::vector<uint32_t> timings) {
    const size_t at = HEADER + 7 * rows.size() + 4 * timings.size();
    timings.insert(timings.end(), {get<uint32_t>(out, at), 77});
    CHECK(out == step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, values), timings));
}

inline void check_result(const Bytes &out, const std::vector<Row> &rows, const std::vector<int32_t> &tokens,
                  std::vector<uint32_t> timings = {}) {
    timings.insert(timings.end(), {get<uint32_t>(out, HEADER + 4 * timings.size()), 77});
    Bytes want = header(RESULT, 0, timings.size() / 2, tokens.size(), 0, tokens.size() * 16);
    for (const uint32_t value : timings) put(want, value);
    size_t at = 0;
    for (const Row &row : rows) {
        if (!row.wants) continue;
        put(want, row.slot);
        put<uint16_t>(want, 0);
        put(want, tokens.at(at++));
        put(want, 0.0);
    }
    want.resize(want.size() + 4);
    seal(want);
    CHECK(at == tokens.size() && out == want);
}

}  // namespace stage_fake
