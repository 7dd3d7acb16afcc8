// Frames through a stage whose llama.cpp is made up: what comes out is computed here a second time, from the layout.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace {

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
    // The token with the largest logit.
    static int32_t token(float first, int32_t position) { return (static_cast<int32_t>(first) + position) % VOCAB; }

    bool show(const std::string &name, std::vector<float> &values) {
        ggml_tensor node{name.c_str(), reinterpret_cast<unsigned char *>(values.data()), values.size() * 4};
        return !ds_tap_callback(&node, true, tap) || ds_tap_callback(&node, false, tap);
    }
};

int32_t decode(void *context, ds_llama_batch batch) {
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

float *logits(void *context, int32_t row) { return &static_cast<Fake *>(context)->logits[size_t(row) * VOCAB]; }

// A chain of samplers: `sample` gives the last one's seed, so that draws show which generator was in place.
using Chain = std::vector<Dist *>;
int32_t sample(void *chain, void *, int32_t row) {
    return static_cast<int32_t>(static_cast<Chain *>(chain)->back()->seed % 1000) * 10 + row;
}
void *chain_remove(void *chain, int32_t index) {
    auto &all = *static_cast<Chain *>(chain);
    Dist *out = all.at(size_t(index));
    all.erase(all.begin() + index);
    return out;
}
void chain_add(void *chain, void *sampler) { static_cast<Chain *>(chain)->push_back(static_cast<Dist *>(sampler)); }
void *init_dist(uint32_t seed) { return new Dist{seed}; }
void sampler_free(void *sampler) { delete static_cast<Dist *>(sampler); }

std::vector<float> table() {
    std::vector<float> rows(size_t(VOCAB) * EMBD);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 97) - 30;
    return rows;
}
const std::vector<float> TABLE = table();

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
const std::vector<Row> ROWS = {{7, 2, 0}, {8, 2, 1}, {0, 0, 1}};

template <typename T>
void put(Bytes &to, T value) {
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

void seal(Bytes &frame) {
    const uint32_t crc = ds_crc32c(0, frame.data(), frame.size() - 4);
    std::memcpy(frame.data() + frame.size() - 4, &crc, 4);
}

Bytes header(uint8_t kind, uint8_t payload, size_t timings, size_t rows, uint32_t cols, size_t payload_bytes) {
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

Bytes step_frame(const std::vector<Row> &rows, uint8_t payload, uint32_t cols, const Bytes &data,
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

const std::vector<int32_t> IDS = {4, 10, 0, 1, 2};

Bytes tokens_frame(const std::vector<Row> &rows = ROWS, const std::vector<uint32_t> &timings = {}) {
    Bytes data;
    for (size_t i = 0; i < rows.size(); ++i) put(data, IDS[i % IDS.size()]);
    return step_frame(rows, TOKENS, 0, data, timings);
}

std::vector<float> embedded(size_t n) {
    std::vector<float> out;
    for (size_t i = 0; i < n; ++i) {
        const auto row = TABLE.begin() + IDS[i % IDS.size()] * EMBD;
        out.insert(out.end(), row, row + EMBD);
    }
    return out;
}

Bytes encoded(int32_t wire, const std::vector<float> &values) {
    const auto rows = static_cast<int64_t>(values.size()) / EMBD;
    Bytes out(static_cast<size_t>(ds_encoded_size(wire, rows, EMBD)));
    CHECK(ds_encode(wire, values.data(), rows, EMBD, out.data(), out.size()) == static_cast<int64_t>(out.size()));
    return out;
}

std::vector<float> decoded(int32_t wire, const Bytes &data, size_t rows) {
    std::vector<float> out(rows * EMBD);
    CHECK(ds_decode(wire, data.data(), data.size(), int64_t(rows), EMBD, out.data(), out.size()) == DS_OK);
    return out;
}

Bytes rows_frame(int32_t wire = DS_F32, const std::vector<Row> &rows = ROWS, const std::vector<uint32_t> &timings = {}) {
    return step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, embedded(rows.size())), timings);
}

std::vector<float> through(std::vector<float> values, const std::vector<Row> &rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
        for (size_t c = i * EMBD; c < (i + 1) * EMBD; ++c) {
            values[c] = Fake::hidden(values[c], rows[i].position, rows[i].slot);
        }
    }
    return values;
}

// The measured time is the one thing that is taken from the frame given, not computed.
void check_step(const Bytes &out, const std::vector<Row> &rows, int32_t wire, const std::vector<float> &values,
                std::vector<uint32_t> timings) {
    const size_t at = HEADER + 7 * rows.size() + 4 * timings.size();
    timings.insert(timings.end(), {get<uint32_t>(out, at), 77});
    CHECK(out == step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, values), timings));
}

void check_result(const Bytes &out, const std::vector<Row> &rows, const std::vector<int32_t> &tokens,
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

void hidden_states_go_in_and_out() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage first(Place::First, wire), middle(Place::Middle, wire);
        for (size_t n = 1; n <= CAPACITY; ++n) {
            std::vector<Row> rows;
            for (size_t i = 0; i < n; ++i) rows.push_back({int32_t(i) + 5, uint16_t(i % SLOTS), uint8_t(i % 2)});
            CHECK(first.run(tokens_frame(rows), &out) > 0);
            check_step(out, rows, wire, through(embedded(n), rows), {});
            const auto seen = decoded(wire, encoded(wire, embedded(n)), n);
            CHECK(middle.run(rows_frame(wire, rows, {11, 12, 13, 14}), &out) > 0);
            check_step(out, rows, wire, through(seen, rows), {11, 12, 13, 14});
            CHECK(middle.fake.outputs == std::vector<int8_t>(n, 1));  // llama.cpp drops the rows that are not outputs
        }
    }
}

void exact_input_is_injected() {
    Stage middle(Place::Middle, DS_F32, true), last(Place::Last, DS_F32, true);
    Bytes out;
    CHECK(middle.run(rows_frame(), &out) > 0);
    check_step(out, ROWS, DS_F32, through(embedded(3), ROWS), {});
    CHECK(last.run(rows_frame(), &out) > 0);
    check_result(out, ROWS, {Fake::token(embedded(3)[EMBD], 8), Fake::token(embedded(3)[2 * EMBD], 0)});
    middle.fake.input_name = last.fake.input_name = "elsewhere";  // a llama.cpp that names its tensors otherwise
    CHECK(middle.run(rows_frame()) == DS_E_NAME && last.run(rows_frame()) == DS_E_NAME);
}

void tokens_come_out_at_the_end() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage last(Place::Last);
        const auto seen = decoded(wire, encoded(wire, embedded(3)), 3);
        CHECK(last.run(rows_frame(wire, ROWS, {1, 2}), &out) > 0);
        check_result(out, ROWS, {Fake::token(seen[EMBD], 8), Fake::token(seen[2 * EMBD], 0)}, {1, 2});
        CHECK(last.fake.outputs == (std::vector<int8_t>{0, 1, 1}));
        CHECK(last.fake.slots == (std::vector<int32_t>{2, 2, 0}));
    }
    Stage only(Place::Only);
    CHECK(only.run(tokens_frame(), &out) > 0);
    check_result(out, ROWS, {Fake::token(embedded(3)[EMBD], 8), Fake::token(embedded(3)[2 * EMBD], 0)});
    const std::vector<Row> quiet = {{3, 1, 0}};
    CHECK(only.run(tokens_frame(quiet), &out) > 0);
    check_result(out, quiet, {});
}

void chains_draw_by_seed_and_position() {
    Stage last(Place::Last);
    Chain seeded{new Dist{1}, new Dist{2}}, fixed{new Dist{3}};
    CHECK(ds_stage_sampler(last.stage, 2, 2, &seeded, 1, 99) == DS_OK);
    CHECK(ds_stage_sampler(last.stage, 0, 2, &fixed, -1, 99) == DS_OK);
    const int32_t want = static_cast<int32_t>(ds_draw_seed(99, 8) % 1000) * 10 + 1;
    Bytes out;
    for (int i = 0; i < 3; ++i) {  // again the same, however often it was drawn
        CHECK(last.run(rows_frame(), &out) > 0);
        check_result(out, ROWS, {want, 32});
    }
    CHECK(ds_stage_draw(last.stage, 1, 2, 8) == want && ds_stage_draw(last.stage, 2, 0, 5) == 32);
    CHECK(seeded.size() == 2 && seeded[0]->seed == 1 && fixed.size() == 1);
    CHECK(ds_stage_sampler(last.stage, 2, 0, nullptr, -1, 0) == DS_OK);
    CHECK(ds_stage_draw(last.stage, 1, 2, 8) == DS_E_RANGE);
    CHECK(last.run(rows_frame()) == DS_E_UNSUPPORTED);
    for (Chain *chain : {&seeded, &fixed}) {
        for (Dist *dist : *chain) delete dist;
    }
    CHECK(ds_draw_seed(99, 8) != ds_draw_seed(99, 9) && ds_draw_seed(99, 8) != ds_draw_seed(98, 8));
}

void rope_positions_in_four_planes() {
    Stage middle(Place::Middle, DS_F32, false, 4);
    CHECK(middle.run(rows_frame()) > 0);
    CHECK(middle.fake.positions == (std::vector<int32_t>{7, 8, 0, 7, 8, 0, 7, 8, 0, 0, 0, 0}));
}

// Nothing may be done with a frame that is not taken: the general way runs it once more.
void refused(Stage &stage, const Bytes &frame) {
    const int32_t before = stage.fake.calls;
    CHECK(stage.run(frame) == DS_E_UNSUPPORTED && stage.fake.calls == before);
}

void damaged_frames_are_left_alone() {
    Stage first(Place::First), middle(Place::Middle), last(Place::Last);
    const Bytes tokens = tokens_frame(ROWS, {5, 6}), rows = rows_frame(DS_Q8, ROWS, {5, 6});
    Stage *const stages[] = {&first, &middle, &last};
    for (Stage *stage : stages) {
        const Bytes &good = stage == &first ? tokens : rows;
        CHECK(stage->run(good) > 0);
        for (size_t size = 0; size < good.size(); ++size) {
            refused(*stage, Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)));
        }
        for (size_t at = 0; at < good.size(); ++at) {
            Bytes bad = good;
            bad[at] ^= 0xFF;
            refused(*stage, bad);
        }
        Bytes longer = good;
        longer.push_back(0);
        refused(*stage, longer);
    }
}

// With a right checksum: what a peer of ours that is broken, or not ours, could send.
void frames_that_lie_do_no_harm() {
    Stage first(Place::First), middle(Place::Middle), last(Place::Last);
    const Bytes tokens = tokens_frame(ROWS, {5, 6}), rows = rows_frame(DS_Q8, ROWS, {5, 6});
    Stage *const stages[] = {&first, &middle, &last};
    for (Stage *stage : stages) {
        const Bytes &good = stage == &first ? tokens : rows;
        for (size_t at = 0; at + 4 < good.size(); ++at) {
            for (const int flip : {0x01, 0x02, 0x04, 0x80, 0xFF}) {
                Bytes bad = good;
                bad[at] ^= static_cast<uint8_t>(flip);
                seal(bad);
                const int64_t size = stage->run(bad);
                CHECK(size > 0 || size == DS_E_UNSUPPORTED);
                // Epoch, lane and number may be anything; what says how long and of what kind the rest is, may not.
                const bool counts = (at >= 4 && at < 7) || (at >= 28 && at < 32) || (at >= 36 && at < 44);
                if (at < 4 || counts) CHECK(size == DS_E_UNSUPPORTED);
            }
        }
        for (size_t size = 4; size < good.size(); ++size) {
            Bytes bad(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
            seal(bad);
            refused(*stage, bad);
        }
    }
}

void what_needs_the_general_way() {
    Stage first(Place::First), middle(Place::Middle), last(Place::Last);
    refused(middle, tokens_frame());
    refused(last, tokens_frame());
    refused(first, rows_frame());
    refused(first, step_frame({}, 0, 0, {}));
    refused(middle, step_frame(ROWS, 0, EMBD, {}));
    refused(middle, step_frame(ROWS, DS_F32, EMBD - 1, Bytes(3 * 4 * (EMBD - 1))));
    refused(middle, step_frame(ROWS, DS_F32, EMBD, Bytes(3 * 4 * EMBD - 1)));
    Bytes ids(12, 0xFF);  // −1, thrice
    refused(first, step_frame(ROWS, TOKENS, 0, ids));
    ids.assign(12, 0);
    ids[8] = VOCAB;
    refused(first, step_frame(ROWS, TOKENS, 0, ids));
    for (const Row &bad : {Row{-1, 0, 0}, Row{1 << 24, 0, 0}, Row{0, SLOTS, 0}, Row{0, 0xFFFF, 0}, Row{0, 0, 2}}) {
        refused(first, tokens_frame({ROWS[0], bad}));
    }
    CHECK(first.run(tokens_frame({{(1 << 24) - 1, SLOTS - 1, 1}})) > 0);
    Bytes broken = encoded(DS_F16, embedded(3));
    std::fill_n(broken.begin(), 4, 0xFF);  // a scale that is no number
    refused(middle, step_frame(ROWS, DS_F16, EMBD, broken));
    refused(middle, rows_frame(DS_F32, std::vector<Row>(CAPACITY + 1)));
    CHECK(middle.run(rows_frame(DS_F32, std::vector<Row>(CAPACITY))) > 0);
    CHECK(middle.run(rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 255))) > 0);
    refused(middle, rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 256)));
    // A row of a slot that has no sampler matters only if a token is wanted behind it, and only at the end.
    CHECK(ds_stage_sampler(last.stage, 2, 0, nullptr, -1, 0) == DS_OK);
    refused(last, rows_frame());
    CHECK(last.run(rows_frame(DS_F32, {ROWS[0], ROWS[2]})) > 0);
}

void the_room_given_is_kept_to() {
    Stage middle(Place::Middle, DS_F16), last(Place::Last);
    Stage *const stages[] = {&middle, &last};
    for (Stage *stage : stages) {
        Bytes out, again;
        CHECK(stage->run(rows_frame(), &out) == static_cast<int64_t>(out.size()));
        CHECK(stage->run(rows_frame(), &again, out.size()) == static_cast<int64_t>(out.size()));
        for (size_t room = 0; room < out.size(); ++room) CHECK(stage->run(rows_frame(), nullptr, room) == DS_E_SIZE);
    }
}

void llama_cpp_may_refuse() {
    Stage middle(Place::Middle), last(Place::Last);
    Stage *const stages[] = {&middle, &last};
    for (Stage *stage : stages) {
        stage->fake.answer = 1;
        CHECK(stage->run(rows_frame()) == DS_E_DECODE && ds_stage_error(stage->stage) == 1);
        stage->fake.answer = 0;
        CHECK(stage->run(rows_frame()) > 0 && ds_stage_error(stage->stage) == 0);
    }
    middle.fake.output_name = "l_out-2";
    CHECK(middle.run(rows_frame()) == DS_E_NAME);
    middle.fake.output_name = "l_out-1";
    CHECK(middle.run(rows_frame()) > 0);
}

void rows_without_frames() {
    Stage middle(Place::Middle), last(Place::Last);
    const auto in = embedded(2);
    const int32_t positions[] = {4, 5};
    const uint16_t slots[] = {1, 1};
    const uint8_t wants[] = {0, 1};
    const std::vector<Row> rows = {{4, 1, 0}, {5, 1, 1}};
    std::vector<float> out(2 * EMBD);
    CHECK(ds_stage_step(middle.stage, 2, in.data(), positions, slots, wants, out.data()) == DS_OK);
    CHECK(out == through(in, rows));
    CHECK(ds_stage_step(last.stage, 2, in.data(), positions, slots, wants, nullptr) == DS_OK);
    CHECK(ds_stage_draw(last.stage, 1, 1, 5) == Fake::token(in[EMBD], 5));
    for (const int32_t n : {0, -1, CAPACITY + 1}) {
        CHECK(ds_stage_step(middle.stage, n, in.data(), positions, slots, wants, out.data()) == DS_E_ARG);
    }
    CHECK(ds_stage_step(middle.stage, 2, in.data(), positions, slots, wants, nullptr) == DS_E_ARG);
    CHECK(ds_stage_step(nullptr, 2, in.data(), positions, slots, wants, out.data()) == DS_E_ARG);
    for (const int32_t slot : {-1, SLOTS}) {
        CHECK(ds_stage_draw(last.stage, 1, slot, 5) == DS_E_ARG);
        CHECK(ds_stage_sampler(last.stage, slot, 1, nullptr, -1, 0) == DS_E_ARG);
    }
    CHECK(ds_stage_sampler(last.stage, 0, 3, nullptr, -1, 0) == DS_E_ARG);
    CHECK(ds_stage_sampler(last.stage, 0, 2, nullptr, -1, 0) == DS_E_ARG);
    CHECK(ds_stage_run(nullptr, in.data(), 8, 0, out.data(), 8) == DS_E_ARG);
}

void configurations_that_cannot_be() {
    Stage good(Place::Last);
    ds_stage *out = nullptr;
    CHECK(ds_stage_new(&good.config, sizeof(ds_llama_batch) + 8, &out) == DS_E_ARG);  // another llama.cpp
    const auto bad = [&](auto change) {
        ds_stage_config config = good.config;
        change(config);
        CHECK(ds_stage_new(&config, sizeof(ds_llama_batch), &out) == DS_E_ARG && out == nullptr);
    };
    bad([](ds_stage_config &c) { c.decode = nullptr; });
    bad([](ds_stage_config &c) { c.context = nullptr; });
    bad([](ds_stage_config &c) { c.logits = nullptr; });
    bad([](ds_stage_config &c) { c.capacity = 0; });
    bad([](ds_stage_config &c) { c.n_embd = -1; });
    bad([](ds_stage_config &c) { c.slots = 0; });
    bad([](ds_stage_config &c) { c.injects = true; });  // without a tap
    bad([](ds_stage_config &c) { c.last = false; });    // likewise
}

}  // namespace

void test_stage() {
    hidden_states_go_in_and_out();
    exact_input_is_injected();
    tokens_come_out_at_the_end();
    chains_draw_by_seed_and_position();
    rope_positions_in_four_planes();
    damaged_frames_are_left_alone();
    frames_that_lie_do_no_harm();
    what_needs_the_general_way();
    the_room_given_is_kept_to();
    llama_cpp_may_refuse();
    rows_without_frames();
    configurations_that_cannot_be();
}
