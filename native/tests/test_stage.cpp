// Frames through a stage whose llama.cpp is made up: what comes out is what stage_frames.h computes from the layout.
#include "stage_frames.h"

namespace {

using namespace stage_fake;

void hidden_states_go_in_and_out() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage first(Place::First, wire), middle(Place::Middle, wire);
        for (size_t n = 1; n <= CAPACITY; ++n) {
            std::vector<Row> rows;
            for (size_t i = 0; i < n; ++i) rows.push_back({int32_t(i), uint16_t(n % SLOTS), uint8_t(i % 3)});
            CHECK(first.run(tokens_frame(rows), &out) > 0);
            check_step(out, rows, wire, through(embedded(rows), rows), {});
            const auto seen = decoded(wire, encoded(wire, embedded(rows)), n);
            CHECK(middle.run(rows_frame(wire, rows, {11, 12, 13, 14}), &out) > 0);
            check_step(out, rows, wire, through(seen, rows), {11, 12, 13, 14});
            CHECK(middle.fake.outputs == std::vector<int8_t>(n, 1));  // llama.cpp drops the rows that are not outputs
        }
    }
}

void exact_input_is_injected() {
    Stage middle(Place::Middle, DS_F32, true), last(Place::Last, DS_F32, true);
    Bytes out;
    // The fake's cells hold nothing of rows that it was not given in its batch.
    const auto past = [](size_t i) { return i == 2 ? 1.0f : 0.0f; };
    auto want = embedded(ROWS);
    for (size_t i = 0; i < want.size(); ++i) want[i] = Fake::hidden(want[i], int32_t(i / EMBD), past(i / EMBD));
    CHECK(middle.run(rows_frame(), &out) > 0);
    check_step(out, ROWS, DS_F32, want, {});
    CHECK(last.run(rows_frame(), &out) > 0);
    const auto in = embedded(ROWS);
    check_result(out, {{2, Fake::token(in[EMBD], past(1))}, {2, Fake::token(in[2 * EMBD], past(2))}});
    middle.fake.input_name = last.fake.input_name = "elsewhere";  // a llama.cpp that names its tensors otherwise
    CHECK(middle.run(rows_frame()) == DS_E_NAME && last.run(rows_frame()) == DS_E_NAME);
}

void tokens_come_out_at_the_end() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage last(Place::Last);
        const auto want = draws(decoded(wire, encoded(wire, embedded(ROWS)), 3), ROWS);
        CHECK(last.run(rows_frame(wire, ROWS, {1, 2}), &out) > 0);
        check_result(out, {{2, want[1]}, {2, want[2]}}, {1, 2});
        CHECK(last.fake.outputs == (std::vector<int8_t>{0, 1, 1}));
        CHECK(last.fake.slots == (std::vector<int32_t>{2, 2, 2}));
    }
    Stage only(Place::Only);
    const auto want = draws(embedded(ROWS), ROWS);
    CHECK(only.run(tokens_frame(), &out) > 0);
    check_result(out, {{2, want[1]}, {2, want[2]}});
    CHECK(only.run(tokens_frame({{0, 1, NONE}}), &out) > 0);
    check_result(out, {});
}

void chains_draw_by_seed_and_position() {
    Stage last(Place::Last);
    Chain seeded{new Dist{1}, new Dist{2}}, fixed{new Dist{3}};
    last.sampler(2, 2, &seeded, 1);
    last.sampler(0, 2, &fixed);
    const auto want = [](int32_t row, int32_t position) {
        return static_cast<int32_t>(ds_draw_seed(99, position) % 1000) * 10 + row;
    };
    Bytes out;
    for (int i = 0; i < 3; ++i) {  // again the same, however often it was drawn
        CHECK(last.run(rows_frame(), &out) > 0);
        check_result(out, {{2, want(1, 1)}, {2, want(2, 2)}});
        CHECK(last.run(rows_frame(DS_F32, {{0, 0, DRAWN}, {1, 0, DRAWN}}), &out) > 0);
        check_result(out, {{0, 30}, {0, 31}});
    }
    CHECK(ds_stage_draw(last.stage, false, 1, 2, 8, -1) == want(1, 8));
    CHECK(ds_stage_draw(last.stage, false, 2, 0, 5, -1) == 32);
    CHECK(seeded.size() == 2 && seeded[0]->seed == 1 && fixed.size() == 1);
    last.sampler(2, 0);
    CHECK(ds_stage_draw(last.stage, false, 1, 2, 8, -1) == DS_E_RANGE);
    CHECK(last.run(rows_frame()) == DS_E_UNSUPPORTED);
    for (Chain *chain : {&seeded, &fixed}) {
        for (Dist *dist : *chain) delete dist;
    }
    CHECK(ds_draw_seed(99, 8) != ds_draw_seed(99, 9) && ds_draw_seed(99, 8) != ds_draw_seed(98, 8));
}

void rows_go_on_by_themselves() {
    const std::vector<Row> rows = {{0, 0, DRAWN}, {0, 1, DRAWN}, {0, 2, DRAWN}};
    Stage last(Place::Last), middle(Place::Middle);
    const auto want = draws(embedded(rows), rows);
    Bytes out, feed;
    CHECK(middle.run(rows_frame(DS_F32, rows, {}, 5), &out, ROOM, &feed) > 0 && feed.empty());
    check_step(out, rows, DS_F32, through(embedded(rows), rows), {}, 5);
    const auto frame = rows_frame(DS_F32, rows, {1, 2}, 5);
    const auto all = [&](uint16_t rounds) {
        check_result(out, {{0, want[0]}, {1, want[1]}, {2, want[2]}}, {1, 2}, rounds);
    };
    CHECK(last.run(frame, &out, ROOM, &feed) > 0);
    all(5);
    CHECK(feed == tokens_frame({{1, 0, DRAWN, want[0]}, {1, 1, DRAWN, want[1]}, {1, 2, DRAWN, want[2]}}, {}, 4));
    CHECK(last.run(rows_frame(DS_F32, rows, {1, 2}, 0), &out, ROOM, &feed) > 0 && feed.empty());
    all(0);
    // A text that ends stays behind; so does a slot that is halted, which draws nothing either.
    CHECK(ds_stage_ends(last.stage, &want[1], 1) == DS_OK);
    std::vector<Row> going;
    for (size_t i = 0; i < 3; ++i) {
        if (want[i] != want[1]) going.push_back({1, uint16_t(i), DRAWN, want[i]});
    }
    CHECK(!going.empty() && last.run(frame, &out, ROOM, &feed) > 0);
    all(5);
    CHECK(feed == tokens_frame(going, {}, 4));
    CHECK(ds_stage_halt(last.stage, 0) == DS_OK && last.run(frame, &out, ROOM, &feed) > 0);
    going.erase(going.begin());
    check_result(out, {{1, want[1]}, {2, want[2]}}, {1, 2}, going.empty() ? 0 : 5);
    CHECK(feed == (going.empty() ? Bytes() : tokens_frame(going, {}, 4)));
    last.sampler(0, 1);  // it has a sampler again
    CHECK(last.run(rows_frame(DS_F32, rows, {1, 2}, 0), &out) > 0);
    all(0);
    CHECK(ds_stage_ends(last.stage, want.data(), 3) == DS_OK && last.run(frame, &out, ROOM, &feed) > 0 && feed.empty());
    all(0);
    // Guesses do not go on by themselves.
    const std::vector<Row> guessed = {{0, 0, DRAWN}, {1, 0, CHECKED, want[0]}};
    CHECK(ds_stage_ends(last.stage, nullptr, 0) == DS_OK);
    CHECK(last.run(rows_frame(DS_F32, guessed, {}, 5), &out, ROOM, &feed) > 0 && feed.empty());
    const int32_t strange[] = {-1, 1 << 30};
    for (const int32_t &token : strange) CHECK(ds_stage_ends(last.stage, &token, 1) == DS_E_RANGE);
    CHECK(ds_stage_ends(last.stage, nullptr, 1) == DS_E_ARG && ds_stage_ends(nullptr, nullptr, 0) == DS_E_ARG);
    for (const int32_t slot : {-1, SLOTS}) CHECK(ds_stage_halt(last.stage, slot) == DS_E_ARG);
}

void rope_positions_in_four_planes() {
    Stage middle(Place::Middle, DS_F32, false, 4);
    CHECK(middle.run(rows_frame()) > 0);
    CHECK(middle.fake.positions == (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0}));
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
                CHECK(size > 0 || size == DS_E_UNSUPPORTED || size == DS_E_GAP);
                // Version, kind, payload; flags; rows; operations; bytes of them and of the payload. (A timing less may
                // hide in the padding, and epoch and number may be anything.)
                const bool counts = (at >= 4 && at < 7) || at == 12 || at == 13 || (at >= 24 && at < 28) || at == 32 ||
                                    at == 33 || (at >= 36 && at < 44);
                if (at < 4 || counts) CHECK(size == DS_E_UNSUPPORTED);
            }
        }
        for (const size_t more : {1, 4, 16}) {
            Bytes bad = good;
            bad.resize(good.size() + more);
            seal(bad);
            refused(*stage, bad);
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
    for (const int32_t token : {VOCAB, INT32_MAX}) refused(first, tokens_frame({ROWS[0], {1, 2, 0, token}}));
    Bytes negative = tokens_frame();
    negative[HEADER + 4 * 3 + 3] |= 0x80;
    seal(negative);
    refused(first, negative);
    for (const Row &bad : {Row{-1, 2, 0}, Row{1 << 24, 2, 0}, Row{2, 2, 0}, Row{1, 2, 3}}) {
        refused(first, tokens_frame({ROWS[0], bad}));
    }
    for (const uint16_t slot : {uint16_t(SLOTS), uint16_t(0xFFFF)}) refused(first, tokens_frame({{0, slot, 1}}));
    CHECK(first.run(tokens_frame({{0, SLOTS - 1, 1}})) > 0);
    Bytes prompt = tokens_frame();
    prompt[12] = 1;
    seal(prompt);
    refused(first, prompt);
    Bytes broken = encoded(DS_F16, embedded(ROWS));
    std::fill_n(broken.begin(), 4, 0xFF);  // a scale that is no number
    refused(middle, step_frame(ROWS, DS_F16, EMBD, broken));
    const auto rows = [](int32_t n, uint8_t wants) {
        std::vector<Row> out;
        for (int32_t i = 0; i < n; ++i) out.push_back({i, 1, wants});
        return rows_frame(DS_F32, out);
    };
    refused(middle, rows(CAPACITY + 1, NONE));
    CHECK(middle.run(rows(CAPACITY, NONE)) > 0);
    CHECK(middle.run(rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 255))) > 0);
    refused(middle, rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 256)));
    // llama.cpp has room for the logits of so many rows and aborts beyond.
    CHECK(last.run(rows(OUTPUTS, DRAWN)) > 0);
    refused(last, rows(OUTPUTS + 1, DRAWN));
    CHECK(last.run(rows(OUTPUTS + 1, NONE)) > 0 && middle.run(rows(OUTPUTS + 1, DRAWN)) > 0);
    // A row of a slot that has no sampler, or wants more than tokens, matters only if a token is wanted, at the end.
    for (const int32_t mode : {0, 1}) {
        last.sampler(2, mode, nullptr, -1, true);
        refused(last, rows_frame());
        CHECK(last.run(rows_frame(DS_F32, {ROWS[0]})) > 0 && last.run(rows_frame(DS_F32, {{0, 0, DRAWN}})) > 0);
    }
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
        CHECK(stage->run(rows_frame()) > 0);
    }
    middle.fake.output_name = "l_out-2";
    CHECK(middle.run(rows_frame()) == DS_E_NAME);
    middle.fake.output_name = "l_out-1";
    CHECK(middle.run(rows_frame()) > 0);
    CHECK(middle.run(rows_frame(DS_F32, {{4, 2, 1}})) == DS_E_GAP);
}

void rows_without_frames() {
    Stage middle(Place::Middle), last(Place::Last);
    const std::vector<Row> rows = {{0, 1, NONE}, {1, 1, DRAWN}};
    const auto in = embedded(rows);
    const uint8_t wants[] = {NONE, DRAWN};
    std::vector<float> out(2 * EMBD);
    for (const bool prompt : {false, true}) {
        CHECK(ds_stage_step(middle.stage, prompt, 2, in.data(), 0, 1, wants, out.data()) == DS_OK);
        CHECK(out == through(in, rows));
        CHECK(ds_stage_step(last.stage, prompt, 2, in.data(), 0, 1, wants, nullptr) == DS_OK);
        CHECK(ds_stage_draw(last.stage, prompt, 1, 1, 1, -1) == draws(in, rows)[1]);
    }
    const auto step = [&](ds_stage *stage, int32_t n, int32_t position, int32_t slot, bool to = true) {
        return ds_stage_step(stage, false, n, in.data(), position, slot, wants, to ? out.data() : nullptr);
    };
    for (const int32_t n : {0, -1, CAPACITY + 1}) CHECK(step(middle.stage, n, 0, 1) == DS_E_ARG);
    for (const int32_t slot : {-1, SLOTS}) CHECK(step(middle.stage, 2, 0, slot) == DS_E_ARG);
    for (const int32_t position : {-1, (1 << 24) - 1}) CHECK(step(middle.stage, 2, position, 1) == DS_E_ARG);
    CHECK(step(middle.stage, 2, 0, 1, false) == DS_E_ARG && step(nullptr, 2, 0, 1) == DS_E_ARG);
    const uint8_t both[] = {DRAWN, CHECKED};
    CHECK(ds_stage_step(last.stage, true, 2, in.data(), 0, 1, both, nullptr) == DS_E_ARG);  // one a prompt
    for (const int32_t slot : {-1, SLOTS}) {
        CHECK(ds_stage_draw(last.stage, false, 1, slot, 5, -1) == DS_E_ARG);
        CHECK(ds_stage_sampler(last.stage, slot, 1, nullptr, -1, 0, false) == DS_E_ARG);
        CHECK(ds_stage_copy(last.stage, slot, 0, 0) == DS_E_ARG && ds_stage_copy(last.stage, 0, slot, 0) == DS_E_ARG);
    }
    CHECK(ds_stage_draw(middle.stage, false, 1, 1, 1, -1) == DS_E_ARG);
    CHECK(ds_stage_sampler(last.stage, 0, 3, nullptr, -1, 0, false) == DS_E_ARG);
    CHECK(ds_stage_sampler(last.stage, 0, 2, nullptr, -1, 0, false) == DS_E_ARG);
    CHECK(ds_stage_copy(last.stage, 0, 1, -1) == DS_E_ARG && ds_stage_clear(nullptr) == DS_E_ARG);
    for (const int32_t wire : {0, 4}) CHECK(ds_stage_tune(last.stage, wire, false) == DS_E_ARG);
    uint64_t feed = 0;
    CHECK(ds_stage_run(nullptr, in.data(), 8, 0, out.data(), 8, &feed) == DS_E_ARG);
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
    bad([](ds_stage_config &c) { c.steps.context = nullptr; });
    bad([](ds_stage_config &c) { c.prompt.memory = nullptr; });
    bad([](ds_stage_config &c) { c.state_set = nullptr; });
    bad([](ds_stage_config &c) { c.whole_get = nullptr; });
    bad([](ds_stage_config &c) { c.window = -1; });
    bad([](ds_stage_config &c) { c.logits = nullptr; });
    bad([](ds_stage_config &c) { c.steps.capacity = 0; });
    bad([](ds_stage_config &c) { c.prompt.outputs = 0; });
    bad([](ds_stage_config &c) { c.n_embd = -1; });
    bad([](ds_stage_config &c) { c.slots = 0; });
    bad([](ds_stage_config &c) {
        c.injects = true;
        c.steps.tap = nullptr;
    });
    bad([](ds_stage_config &c) {
        c.last = false;
        c.prompt.tap = nullptr;
    });
}

}  // namespace

void test_stage() {
    hidden_states_go_in_and_out();
    exact_input_is_injected();
    tokens_come_out_at_the_end();
    chains_draw_by_seed_and_position();
    rows_go_on_by_themselves();
    rope_positions_in_four_planes();
    damaged_frames_are_left_alone();
    frames_that_lie_do_no_harm();
    what_needs_the_general_way();
    the_room_given_is_kept_to();
    llama_cpp_may_refuse();
    rows_without_frames();
    configurations_that_cannot_be();
}
