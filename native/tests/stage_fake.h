// A llama.cpp made up for tests of the stage.
//
// What a row gives depends on all cells of its sequence, so cells lost, repeated or left over show in what comes out.
// A row that does not follow its sequence's cells, and two decodes at a time, fail a CHECK.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace stage_fake {

using Bytes = std::vector<uint8_t>;

constexpr int32_t EMBD = 40, VOCAB = 11, SLOTS = 3;  // 40: a q8 row has a short last block
constexpr int32_t CAPACITY = 5, OUTPUTS = 3, PROMPT_CAPACITY = 8;
constexpr size_t HEADER = 44, ROW = 11, ROOM = 4096;
constexpr uint8_t STEP = 1, RESULT = 2, NONE = 0, DRAWN = 1, CHECKED = 2;

struct Dist {
    uint32_t seed;
};

template <typename T>
void put(Bytes &to, T value) {
    const auto *bytes = reinterpret_cast<const uint8_t *>(&value);
    to.insert(to.end(), bytes, bytes + sizeof value);
}
template <typename T>
T get(const uint8_t *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

struct Cell {
    int32_t position;
    float value;
};
using Cells = std::vector<Cell>;

// A context and its memory. The graph has an input that can be overwritten, a layer to pause at, and an output; it runs
// in micro-batches of two rows, as ubatch may.
struct Fake {
    ds_tap *tap = nullptr;
    std::vector<Cells> cells;    // of each sequence
    std::vector<Cells> visible;  // of these, what layers with a window have
    int32_t window = 0;
    std::vector<float> logits;
    std::vector<int32_t> slots, positions, sizes;  // sizes: rows of every decode
    std::vector<int8_t> outputs;
    std::string output_name = "l_out-1", input_name = "inp_scaled";
    std::function<void(const std::function<void()> &)> at_pause = [](const std::function<void()> &pause) { pause(); };
    std::atomic<int32_t> *inside = nullptr;
    int32_t planes = 1, answer = 0, calls = 0, streams = 0;
    bool token_input = false, deaf = false;

    ~Fake() { ds_tap_free(tap); }
    static float past(const Cells &cells) {
        float sum = 0;
        for (const Cell &cell : cells) sum += cell.value + static_cast<float>(cell.position);
        return sum;
    }
    static float hidden(float in, int32_t position, float past) { return 2 * in + static_cast<float>(position) + past; }
    // The token with the largest logit; 0 for input that damaged frames bring.
    static int32_t token(float first, float past) {
        const float sum = first + past;
        return sum >= 0 && sum < 1e6f ? static_cast<int32_t>(2 * sum) % VOCAB : 0;
    }

    bool show(const std::string &name, std::vector<float> &values) {
        ggml_tensor node{name.c_str(), reinterpret_cast<unsigned char *>(values.data()), values.size() * 4};
        --*inside;  // others may come in here
        const bool on = !ds_tap_callback(&node, true, tap) || ds_tap_callback(&node, false, tap);
        CHECK(++*inside == 1);
        return on;
    }
    // What a row sees: all cells, and once more those in the window.
    float seen(int32_t sequence) const {
        float sum = past(cells[size_t(sequence)]);
        for (const Cell &cell : visible[size_t(sequence)]) {
            if (cell.position > cells[size_t(sequence)].back().position + 1 - window) sum += cell.value;
        }
        return sum;
    }
};

inline int32_t decode(void *context, ds_llama_batch batch) {
    Fake &fake = *static_cast<Fake *>(context);
    CHECK(++*fake.inside == 1);
    struct Leave {
        Fake &fake;
        ~Leave() { --*fake.inside; }
    } leave{fake};
    ++fake.calls;
    if (fake.answer != 0) return fake.answer;
    const int32_t n = batch.n_tokens;
    fake.sizes.push_back(n);
    fake.positions.assign(batch.pos, batch.pos + n * fake.planes);
    fake.slots.clear();
    std::vector<float> pasts;
    for (int32_t i = 0; i < n; ++i) {
        CHECK(batch.n_seq_id[i] == 1);
        const int32_t sequence = batch.seq_id[i][0];
        fake.slots.push_back(sequence);
        Cells &cells = fake.cells.at(size_t(sequence));
        CHECK(batch.pos[i] == static_cast<int32_t>(cells.size()));
        pasts.push_back(fake.seen(sequence));
        cells.push_back({batch.pos[i], batch.embd != nullptr ? batch.embd[size_t(i) * EMBD] : 0.0f});
        if (fake.window > 0) fake.visible[size_t(sequence)].push_back(cells.back());
    }
    fake.outputs.assign(batch.logits, batch.logits + n);
    fake.logits.assign(size_t(n) * VOCAB, 0.0f);
    CHECK((batch.token != nullptr) == fake.token_input && (batch.embd != nullptr) == !fake.token_input);
    for (int32_t at = 0; at < n; at += 2) {
        const int32_t end = std::min(at + 2, n);
        std::vector<float> values(size_t(end - at) * EMBD, -1.0f);
        if (batch.embd != nullptr) std::copy(batch.embd + at * EMBD, batch.embd + end * EMBD, values.begin());
        if (fake.tap != nullptr && !fake.show(fake.input_name, values)) return 0;
        if (fake.tap != nullptr) {
            fake.at_pause([&] { CHECK(fake.show("l_out-0", values)); });
        }
        for (int32_t i = at; i < end; ++i) {
            float *row = values.data() + size_t(i - at) * EMBD;
            fake.logits[size_t(i) * VOCAB + Fake::token(row[0], pasts[size_t(i)])] = 5.0f;
            for (int32_t c = 0; c < EMBD; ++c) row[c] = Fake::hidden(row[c], batch.pos[i], pasts[size_t(i)]);
        }
        if (fake.tap != nullptr && !fake.show(fake.output_name, values) && ds_tap_error(fake.tap) != DS_OK) return 0;
    }
    return 0;
}

inline float *logits(void *context, int32_t row) { return &static_cast<Fake *>(context)->logits[size_t(row) * VOCAB]; }

inline bool seq_rm(void *memory, int32_t sequence, int32_t from, int32_t to) {
    Fake &fake = *static_cast<Fake *>(memory);
    CHECK(to == -1);
    for (Cells *cells : {&fake.cells.at(size_t(sequence)), &fake.visible.at(size_t(sequence))}) {
        cells->erase(std::remove_if(cells->begin(), cells->end(), [&](Cell c) { return c.position >= from; }),
                     cells->end());
    }
    return true;
}

// --- cells as llama.cpp writes them: streams; of each the number of its cells, and they

inline void put_cache(Bytes &to, const Cells &cells, int32_t streams, int32_t own) {
    put(to, static_cast<uint32_t>(streams));
    for (int32_t s = 0; s < streams; ++s) {
        put(to, static_cast<uint32_t>(s == own ? cells.size() : 0));
        for (const Cell &cell : s == own ? cells : Cells{}) put(to, cell);
    }
}

inline Bytes written(const Fake &fake, int32_t sequence, uint32_t flags) {
    Bytes out;
    put<uint32_t>(out, 0xAF143CD8);
    put(out, sequence);
    const Cells &all = fake.cells.at(size_t(sequence));
    if (flags == 0 || fake.window == 0) put_cache(out, all, fake.streams, sequence);
    if (fake.window > 0) {
        Cells near;
        for (const Cell &cell : fake.visible.at(size_t(sequence))) {
            if (cell.position > all.back().position - fake.window) near.push_back(cell);
        }
        put_cache(out, near, fake.streams, sequence);
    }
    return out;
}

inline size_t state_size(void *context, int32_t sequence, uint32_t flags) {
    return written(*static_cast<Fake *>(context), sequence, flags).size();
}
inline size_t state_get(void *context, uint8_t *to, size_t size, int32_t sequence, uint32_t flags) {
    const Bytes out = written(*static_cast<Fake *>(context), sequence, flags);
    CHECK(out.size() <= size);
    std::copy(out.begin(), out.end(), to);
    return out.size();
}

// As llama.cpp: as many streams as the context has, and every byte there is.
inline const uint8_t *read_cache(const Fake &fake, const uint8_t *at, const uint8_t *end, Cells &cells) {
    CHECK(end - at >= 4 && get<int32_t>(at) == fake.streams);
    at += 4;
    for (int32_t s = 0; s < fake.streams; ++s) {
        CHECK(end - at >= 4);
        const uint32_t count = get<uint32_t>(at);
        at += 4;
        CHECK(end - at >= static_cast<std::ptrdiff_t>(count * sizeof(Cell)));
        if (count > 0) cells.clear();
        for (uint32_t i = 0; i < count; ++i, at += sizeof(Cell)) cells.push_back(get<Cell>(at));
    }
    return at;
}
inline size_t state_set(void *context, const uint8_t *from, size_t size, int32_t sequence, uint32_t flags) {
    Fake &fake = *static_cast<Fake *>(context);
    CHECK(flags == 0 && size >= 8 && get<uint32_t>(from) == 0xAF143CD8);
    if (fake.deaf) return 0;
    const uint8_t *const end = from + size;
    const uint8_t *at = read_cache(fake, from + 8, end, fake.cells.at(size_t(sequence)));
    if (fake.window > 0) at = read_cache(fake, at, end, fake.visible.at(size_t(sequence)));
    CHECK(at == end);
    return size;
}

inline Bytes written_whole(const Fake &fake) {
    CHECK(fake.streams == 1);
    Bytes out;
    put<uint32_t>(out, 5);
    for (const char c : std::string("llama")) put(out, c);
    put_cache(out, fake.cells[0], 1, 0);
    if (fake.window > 0) put_cache(out, fake.visible[0], 1, 0);
    return out;
}
inline size_t whole_size(void *context) { return written_whole(*static_cast<Fake *>(context)).size(); }
inline size_t whole_get(void *context, uint8_t *to, size_t size) {
    const Bytes out = written_whole(*static_cast<Fake *>(context));
    CHECK(out.size() <= size);
    std::copy(out.begin(), out.end(), to);
    return out.size();
}

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
    std::atomic<int32_t> inside{0};
    Fake fake, prompt;  // the context of steps, and the other
    ds_stage *stage = nullptr;
    ds_stage_config config{};

    explicit Stage(Place place, int32_t wire = DS_F32, bool injects = false, int32_t planes = 1, int32_t window = 0) {
        const bool first = place == Place::First || place == Place::Only;
        const bool last = place == Place::Last || place == Place::Only;
        for (Fake *each : {&fake, &prompt}) {
            CHECK(ds_tap_new(tensor_name, tensor_size, tensor_get, tensor_set, &each->tap) == DS_OK);
            CHECK(ds_tap_set_names(each->tap, last ? nullptr : "l_out-1", injects ? "inp_scaled" : nullptr) == DS_OK);
            each->inside = &inside;
            each->planes = planes;
            each->token_input = injects;
            each->window = window;
            each->streams = each == &fake ? SLOTS : 1;
            each->cells.resize(size_t(each->streams));
            each->visible.resize(size_t(each->streams));
        }
        config.steps = {&fake, &fake, fake.tap, CAPACITY, OUTPUTS};
        config.prompt = {&prompt, &prompt, prompt.tap, PROMPT_CAPACITY, 1};
        config.decode = decode;
        config.logits = logits;
        config.seq_rm = seq_rm;
        config.state_size = state_size;
        config.state_get = state_get;
        config.state_set = state_set;
        config.whole_size = whole_size;
        config.whole_get = whole_get;
        config.sample = sample;
        config.chain_remove = chain_remove;
        config.chain_add = chain_add;
        config.init_dist = init_dist;
        config.sampler_free = sampler_free;
        config.rows = first ? TABLE.data() : nullptr;
        config.n_rows = VOCAB;
        config.row_bytes = EMBD * 4;
        config.scale = 1.0f;
        config.n_embd = EMBD;
        config.n_vocab = VOCAB;
        config.slots = SLOTS;
        config.planes = planes;
        config.window = window;
        config.first = first;
        config.last = last;
        config.injects = injects;
        config.token_input = injects;
        CHECK(ds_stage_new(&config, sizeof(ds_llama_batch), &stage) == DS_OK);
        CHECK(ds_stage_tune(stage, wire, true) == DS_OK);
        for (int32_t slot = 0; last && slot < SLOTS; ++slot) sampler(slot, 1);
    }
    ~Stage() { ds_stage_free(stage); }
    Stage(const Stage &) = delete;
    Stage &operator=(const Stage &) = delete;

    void sampler(int32_t slot, int32_t mode, Chain *chain = nullptr, int32_t dist = -1, bool general = false) {
        CHECK(ds_stage_sampler(stage, slot, mode, chain, dist, 99, general) == DS_OK);
    }

    // From and into buffers of exactly their size, so that a step beyond either end is seen.
    int64_t run(const Bytes &frame, Bytes *out = nullptr, size_t room = ROOM, Bytes *feed = nullptr) {
        const std::unique_ptr<uint8_t[]> in(new uint8_t[frame.size()]), to(new uint8_t[room]);
        std::copy(frame.begin(), frame.end(), in.get());
        uint64_t fed = 0;
        const int64_t size = ds_stage_run(stage, in.get(), frame.size(), 77, to.get(), room, &fed);
        CHECK(size + static_cast<int64_t>(fed) <= static_cast<int64_t>(room) && size != 0);
        if (feed != nullptr && size > 0) feed->assign(to.get() + size, to.get() + size + fed);
        if (out != nullptr && size > 0) out->assign(to.get(), to.get() + size);
        return size;
    }
};

}  // namespace stage_fake
