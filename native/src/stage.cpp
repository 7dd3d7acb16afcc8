// The hot path of a stage: one frame in, one frame out, without Python between.
//
// Theory. In decode a frame carries one row or a few, and llama.cpp streams the whole slice through the caches while
// it runs; whatever comes before and after finds them cold. A few dozen Python calls cost 35 µs warm and 200 µs cold,
// here they are some hundred instructions. ds_stage_run takes exactly the frames that need nothing else: step frames
// without operations, whose sampled rows have a sampler known here. It answers DS_E_UNSUPPORTED, having done nothing,
// for all others; the general way is stage/worker.py, which uses ds_stage_step and ds_stage_draw for its llama.cpp
// calls. The layout of frames is defined in wire/frames.py; tests hold the two against each other, byte for byte.
//
// llama.cpp's own functions come as addresses; its batch is passed by value and mirrored here. native.py checks its
// size against the installed llama-cpp-python's.
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "dwarfstar_native.h"

namespace {

constexpr uint32_t MAGIC = 0x1A665344;  // "DSf\x1a"
constexpr uint32_t RESIDUE = 0x48674BC7;  // CRC32C of bytes followed by their own CRC32C
constexpr uint8_t VERSION = 1, KIND_STEP = 1, KIND_RESULT = 2, PAYLOAD_TOKENS = 4;
constexpr uint32_t MAX_POSITION = (1u << 24) - 1, MAX_TIMINGS = 256;
constexpr size_t ALIGNMENT = 16, ROW_BYTES = 7, TIMING_BYTES = 8, RESULT_ROW_BYTES = 16, CRC_BYTES = 4;

#pragma pack(push, 1)
struct Header {
    uint32_t magic;
    uint8_t version, kind, payload, zero1;
    uint32_t epoch;
    uint16_t lane, timings;
    uint64_t number;
    uint32_t rows, cols;
    uint16_t ops, zero2;
    uint32_t op_bytes, payload_bytes;
};
struct ResultRow {
    uint16_t slot, top;
    int32_t token;
    double logprob;
};
#pragma pack(pop)
static_assert(sizeof(Header) == 44 && sizeof(ResultRow) == RESULT_ROW_BYTES, "the layout of wire/frames.py");

enum class Mode : uint8_t { None, Greedy, Chain };

struct Sampler {
    Mode mode = Mode::None;
    void *chain = nullptr;
    int32_t dist = -1;  // index of the drawing sampler in the chain; -1: the chain has none
    uint64_t seed = 0;
};

using Clock = std::chrono::steady_clock;

uint32_t microseconds(Clock::duration d) {
    const auto us = std::chrono::duration_cast<std::chrono::microseconds>(d).count();
    return us > 0xFFFFFFFFll ? 0xFFFFFFFFu : static_cast<uint32_t>(us);
}

size_t padded(size_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

}  // namespace

struct ds_stage {
    ds_stage_config config;
    std::vector<int32_t> positions, slots, counts, tokens;
    std::vector<int32_t *> slot_pointers;
    std::vector<int8_t> wants;
    std::vector<Sampler> samplers;
    std::vector<float> input, output;
    ds_llama_batch batch{};
    int32_t error = 0;  // what llama_decode answered last

    explicit ds_stage(const ds_stage_config &c)
        : config(c), positions(size_t(c.capacity) * c.planes), slots(c.capacity), counts(c.capacity, 1),
          slot_pointers(c.capacity), wants(c.capacity), samplers(c.slots) {
        for (int32_t i = 0; i < c.capacity; ++i) slot_pointers[i] = &slots[i];
        batch.pos = positions.data();
        batch.n_seq_id = counts.data();
        batch.seq_id = slot_pointers.data();
        batch.logits = wants.data();
        if (c.token_input) {
            tokens.resize(c.capacity);
            batch.token = tokens.data();
        }
    }

    // As LlamaSlice.step promises: hidden states in, hidden states out (or logits, on the last stage).
    int32_t step(int32_t n, const float *rows, const int32_t *at, const uint16_t *of, const uint8_t *want, float *out) {
        if (n <= 0 || n > config.capacity) return DS_E_ARG;
        for (int32_t i = 0; i < n; ++i) {
            positions[i] = at[i];
            slots[i] = of[i];
            wants[i] = config.last ? static_cast<int8_t>(want[i]) : 1;
        }
        // Multi-dimensional RoPE: the text position in the first three planes, 0 in the fourth.
        for (int32_t plane = 1; plane < config.planes; ++plane) {
            for (int32_t i = 0; i < n; ++i) positions[size_t(plane) * n + i] = plane < 3 ? at[i] : 0;
        }
        batch.n_tokens = n;
        if (!config.token_input) batch.embd = const_cast<float *>(rows);
        const uint64_t bytes = uint64_t(n) * config.n_embd * sizeof(float);
        const bool taps = !config.last || config.injects;
        if (taps) {
            const int32_t status = ds_tap_begin(config.tap, config.last ? nullptr : out, config.last ? 0 : bytes,
                                                config.injects ? rows : nullptr, config.injects ? bytes : 0);
            if (status != DS_OK) return status;
        }
        error = config.decode(config.context, batch);
        if (error != 0) return DS_E_DECODE;
        if (taps) {
            if (ds_tap_error(config.tap) != DS_OK) return DS_E_OVERFLOW;
            if (!config.last && ds_tap_captured(config.tap) != bytes) return DS_E_NAME;
            if (config.injects && ds_tap_injected(config.tap) != bytes) return DS_E_NAME;
        }
        return DS_OK;
    }

    // The token behind batch row `row`, whose position is `position`; or a negative status.
    int32_t draw(int32_t row, int32_t slot, int32_t position) {
        Sampler &sampler = samplers[slot];
        if (sampler.mode == Mode::None) return DS_E_RANGE;
        if (sampler.mode == Mode::Greedy) {
            return ds_argmax(config.logits(config.context, row), config.n_vocab);
        }
        if (sampler.dist >= 0) {
            // A new generator for each position: what is drawn depends on (seed, position) only.
            config.sampler_free(config.chain_remove(sampler.chain, sampler.dist));
            config.chain_add(sampler.chain, config.init_dist(ds_draw_seed(sampler.seed, position)));
        }
        return config.sample(sampler.chain, config.context, row);
    }

    int64_t run(const uint8_t *data, size_t size, uint32_t wait_us, uint8_t *out, size_t room);
};

namespace {

// A step frame this file can run; its parts point into the frame.
struct Step {
    Header header;
    const int32_t *positions;
    const uint16_t *slots;
    const uint8_t *wants, *timings, *payload;
};

bool parse(const ds_stage &stage, const uint8_t *data, size_t size, Step &step) {
    if (size < sizeof(Header) + CRC_BYTES) return false;
    Header &h = step.header;
    std::memcpy(&h, data, sizeof h);
    if (h.magic != MAGIC || h.version != VERSION || h.kind != KIND_STEP || h.ops != 0 || h.op_bytes != 0) return false;
    if (h.rows == 0 || h.rows > uint32_t(stage.config.capacity) || h.timings >= MAX_TIMINGS) return false;
    const size_t slots_at = sizeof(Header) + size_t(h.rows) * 4, wants_at = slots_at + size_t(h.rows) * 2;
    const size_t timings_at = wants_at + h.rows, payload_at = padded(timings_at + h.timings * TIMING_BYTES);
    if (payload_at + h.payload_bytes + CRC_BYTES != size || ds_crc32c(0, data, size) != RESIDUE) return false;
    step.positions = reinterpret_cast<const int32_t *>(data + sizeof(Header));
    step.slots = reinterpret_cast<const uint16_t *>(data + slots_at);
    step.wants = data + wants_at;
    step.timings = data + timings_at;
    step.payload = data + payload_at;
    return true;
}

bool usable(const ds_stage &stage, const Step &step) {
    const ds_stage_config &c = stage.config;
    const Header &h = step.header;
    int32_t wanted = 0;
    for (uint32_t i = 0; i < h.rows; ++i) {
        int32_t position;
        uint16_t slot;
        std::memcpy(&position, step.positions + i, sizeof position);
        std::memcpy(&slot, step.slots + i, sizeof slot);
        // llama.cpp would reorder the rows of several slots.
        if (i > 0 && std::memcmp(step.slots + i, step.slots, sizeof slot) != 0) return false;
        if (position < 0 || uint32_t(position) > MAX_POSITION || slot >= c.slots || step.wants[i] > 1) return false;
        if (c.last && step.wants[i] && stage.samplers[slot].mode == Mode::None) return false;
        wanted += step.wants[i];
    }
    if (c.last && wanted > c.slots) return false;  // llama.cpp has room for a row of logits per slot, and aborts
    if (c.first) return h.payload == PAYLOAD_TOKENS && h.payload_bytes == uint64_t(h.rows) * 4;
    return h.cols == uint32_t(c.n_embd) && h.payload >= DS_F32 && h.payload <= DS_Q8 &&
           ds_encoded_size(h.payload, h.rows, h.cols) == int64_t(h.payload_bytes);
}

}  // namespace

int64_t ds_stage::run(const uint8_t *data, size_t size, uint32_t wait_us, uint8_t *out, size_t room) {
    const auto started = Clock::now();
    Step s;
    if (!parse(*this, data, size, s) || !usable(*this, s)) return DS_E_UNSUPPORTED;
    const ds_stage_config &c = config;
    const uint32_t n = s.header.rows;
    const size_t values = size_t(n) * c.n_embd;
    input.resize(values);
    int32_t status;
    if (c.first) {
        status = ds_embed_rows(c.to_float, c.rows, c.n_rows, c.row_bytes, c.n_embd,
                               reinterpret_cast<const int32_t *>(s.payload), n, c.scale, input.data());
        if (status != DS_OK) return DS_E_UNSUPPORTED;  // a bad id: the general way says so
    } else {
        status = ds_decode(s.header.payload, s.payload, s.header.payload_bytes, n, c.n_embd, input.data(), values);
        if (status != DS_OK) return DS_E_UNSUPPORTED;
    }
    if (!c.last) output.resize(values);
    // Rows may lie unaligned in the frame; x86 and ARMv8 read them all the same, and step copies them first.
    status = step(int32_t(n), input.data(), s.positions, s.slots, s.wants, c.last ? nullptr : output.data());
    if (status != DS_OK) return status;

    Header h = s.header;
    h.timings = static_cast<uint16_t>(h.timings + 1);
    size_t at = sizeof(Header);
    const size_t old_timings = size_t(s.header.timings) * TIMING_BYTES;
    const auto timing = [&](size_t where) {
        const uint32_t pair[2] = {microseconds(Clock::now() - started), wait_us};
        std::memcpy(out + where, s.timings, old_timings);
        std::memcpy(out + where + old_timings, pair, sizeof pair);
        return where + old_timings + sizeof pair;
    };
    if (c.last) {
        uint32_t wanted = 0;
        for (uint32_t i = 0; i < n; ++i) wanted += s.wants[i];
        const size_t rows_at = at + size_t(h.timings) * TIMING_BYTES, end = rows_at + wanted * RESULT_ROW_BYTES;
        if (end + CRC_BYTES > room) return DS_E_SIZE;
        size_t row_at = rows_at;
        for (uint32_t i = 0; i < n; ++i) {
            if (!s.wants[i]) continue;
            ResultRow row{};
            int32_t position;
            std::memcpy(&row.slot, s.slots + i, sizeof row.slot);
            std::memcpy(&position, s.positions + i, sizeof position);
            row.token = draw(int32_t(i), row.slot, position);
            if (row.token < 0) return row.token;
            std::memcpy(out + row_at, &row, sizeof row);
            row_at += sizeof row;
        }
        timing(at);
        h.kind = KIND_RESULT;
        h.payload = 0;
        h.rows = wanted;
        h.cols = 0;
        h.payload_bytes = wanted * RESULT_ROW_BYTES;
        at = end;
    } else {
        const size_t rows_bytes = size_t(n) * ROW_BYTES;
        const size_t payload_at = padded(at + rows_bytes + size_t(h.timings) * TIMING_BYTES);
        const int64_t payload = ds_encoded_size(c.wire, n, c.n_embd);
        if (payload < 0 || payload_at + size_t(payload) + CRC_BYTES > room) return DS_E_SIZE;
        std::memcpy(out + at, data + sizeof(Header), rows_bytes);
        const int64_t written = ds_encode(c.wire, output.data(), n, c.n_embd, out + payload_at, size_t(payload));
        if (written != payload) return DS_E_SIZE;
        at = timing(at + rows_bytes);
        std::memset(out + at, 0, payload_at - at);
        h.payload = static_cast<uint8_t>(c.wire);
        h.cols = static_cast<uint32_t>(c.n_embd);
        h.payload_bytes = static_cast<uint32_t>(payload);
        at = payload_at + size_t(payload);
    }
    std::memcpy(out, &h, sizeof h);
    const uint32_t crc = ds_crc32c(0, out, at);
    std::memcpy(out + at, &crc, sizeof crc);
    return int64_t(at + CRC_BYTES);
}

extern "C" {

int32_t ds_stage_new(const ds_stage_config *config, size_t batch_bytes, ds_stage **out) {
    if (config == nullptr || out == nullptr || batch_bytes != sizeof(ds_llama_batch)) return DS_E_ARG;
    const ds_stage_config &c = *config;
    if (c.context == nullptr || c.decode == nullptr || c.n_embd <= 0 || c.capacity <= 0 || c.slots <= 0 ||
        c.planes <= 0 || ((!c.last || c.injects) && c.tap == nullptr) ||
        (c.last && (c.logits == nullptr || c.sample == nullptr || c.chain_remove == nullptr || c.chain_add == nullptr ||
                    c.init_dist == nullptr || c.sampler_free == nullptr || c.n_vocab <= 0))) {
        return DS_E_ARG;
    }
    try {
        *out = new ds_stage(c);
    } catch (const std::bad_alloc &) {
        return DS_E_MEMORY;
    }
    return DS_OK;
}

void ds_stage_free(ds_stage *stage) { delete stage; }

int32_t ds_stage_step(ds_stage *stage, int32_t n, const float *rows, const int32_t *positions, const uint16_t *slots,
                      const uint8_t *wants, float *out) {
    if (stage == nullptr || rows == nullptr || positions == nullptr || slots == nullptr || wants == nullptr ||
        (out == nullptr && !stage->config.last)) {
        return DS_E_ARG;
    }
    return stage->step(n, rows, positions, slots, wants, out);
}

int32_t ds_stage_error(const ds_stage *stage) { return stage == nullptr ? 0 : stage->error; }

int32_t ds_stage_sampler(ds_stage *stage, int32_t slot, int32_t mode, void *chain, int32_t dist, uint64_t seed) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots || mode < 0 || mode > 2 ||
        (mode == 2 && chain == nullptr)) {
        return DS_E_ARG;
    }
    stage->samplers[slot] = Sampler{static_cast<Mode>(mode), chain, dist, seed};
    return DS_OK;
}

int32_t ds_stage_draw(ds_stage *stage, int32_t row, int32_t slot, int32_t position) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots) return DS_E_ARG;
    return stage->draw(row, slot, position);
}

int64_t ds_stage_run(ds_stage *stage, const void *frame, size_t size, uint32_t wait_us, void *out, size_t room) {
    if (stage == nullptr || frame == nullptr || out == nullptr) return DS_E_ARG;
    try {
        return stage->run(static_cast<const uint8_t *>(frame), size, wait_us, static_cast<uint8_t *>(out), room);
    } catch (const std::bad_alloc &) {
        return DS_E_MEMORY;
    }
}

uint32_t ds_draw_seed(uint64_t seed, int32_t position) {
    uint64_t x = seed + (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    const uint32_t low = static_cast<uint32_t>(x);
    return low == 0xFFFFFFFFu ? 0xFFFFFFFEu : low;  // llama.cpp takes that one for "choose one yourself"
}

}  // extern "C"
