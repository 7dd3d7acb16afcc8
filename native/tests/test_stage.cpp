// Frames through a stage whose llama.cpp is made up: what comes out is what stage_fake.h computes from the layout.
#include "stage_fake.h"

namespace {

using namespace stage_fake;

void hidden_states_go_in_and_out() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage first(Place::First, wire), middle(Place::Middle, wire);
        for (size_t n = 1; n <= CAPACITY; ++n) {
            std::vector<Row> rows;
            for (size_t i = 0; i < n; ++i) rows.push_back({int32_t(i) + 5, uint16_t(n % SLOTS), uint8_t(i % 2)});
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
    check_result(out, ROWS, {Fake::token(embedded(3)[EMBD], 8), Fake::token(embedded(3)[2 * EMBD], 9)});
    middle.fake.input_name = last.fake.input_name = "elsewhere";  // a llama.cpp that names its tensors otherwise
    CHECK(middle.run(rows_frame()) == DS_E_NAME && last.run(rows_frame()) == DS_E_NAME);
}

void tokens_come_out_at_the_end() {
    Bytes out;
    for (const int32_t wire : {DS_F32, DS_F16, DS_Q8}) {
        Stage last(Place::Last);
        const auto seen = decoded(wire, encoded(wire, embedded(3)), 3);
        CHECK(last.run(rows_frame(wire, ROWS, {1, 2}), &out) > 0);
        check_result(out, ROWS, {Fake::token(seen[EMBD], 8), Fake::token(seen[2 * EMBD], 9)}, {1, 2});
        CHECK(last.fake.outputs == (std::vector<int8_t>{0, 1, 1}));
        CHECK(last.fake.slots == (std::vector<int32_t>{2, 2, 2}));
    }
    Stage only(Place::Only);
    CHECK(only.run(tokens_frame(), &out) > 0);
    check_result(out, ROWS, {Fake::token(embedded(3)[EMBD], 8), Fake::token(embedded(3)[2 * EMBD], 9)});
    const std::vector<Row> quiet = {{3, 1, 0}};
    CHECK(only.run(tokens_frame(quiet), &out) > 0);
    check_result(out, quiet, {});
}

void chains_draw_by_seed_and_position() {
    Stage last(Place::Last);
    Chain seeded{new Dist{1}, new Dist{2}}, fixed{new Dist{3}};
    CHECK(ds_stage_sampler(last.stage, 2, 2, &seeded, 1, 99) == DS_OK);
    CHECK(ds_stage_sampler(last.stage, 0, 2, &fixed, -1, 99) == DS_OK);
    const auto want = [](int32_t row, int32_t position) {
        return static_cast<int32_t>(ds_draw_seed(99, position) % 1000) * 10 + row;
    };
    Bytes out;
    for (int i = 0; i < 3; ++i) {  // again the same, however often it was drawn
        CHECK(last.run(rows_frame(), &out) > 0);
        check_result(out, ROWS, {want(1, 8), want(2, 9)});
        const std::vector<Row> other = {{5, 0, 1}, {6, 0, 1}};
        CHECK(last.run(rows_frame(DS_F32, other), &out) > 0);
        check_result(out, other, {30, 31});
    }
    CHECK(ds_stage_draw(last.stage, 1, 2, 8) == want(1, 8) && ds_stage_draw(last.stage, 2, 0, 5) == 32);
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
    CHECK(middle.fake.positions == (std::vector<int32_t>{7, 8, 9, 7, 8, 9, 7, 8, 9, 0, 0, 0}));
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
                // Version, kind, payload; rows; operations; bytes of them and of the payload. (A timing less may hide
                // in the padding, and epoch, lane and number may be anything.)
                const bool counts = (at >= 4 && at < 7) || (at >= 24 && at < 28) || at == 32 || at == 33 ||
                                    (at >= 36 && at < 44);
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
    Bytes ids(12, 0xFF);  // −1, thrice
    refused(first, step_frame(ROWS, TOKENS, 0, ids));
    ids.assign(12, 0);
    ids[8] = VOCAB;
    refused(first, step_frame(ROWS, TOKENS, 0, ids));
    for (const Row &bad : {Row{-1, 2, 0}, Row{1 << 24, 2, 0}, Row{0, 2, 2}}) {
        refused(first, tokens_frame({ROWS[0], bad}));
    }
    for (const uint16_t slot : {uint16_t(SLOTS), uint16_t(0xFFFF)}) refused(first, tokens_frame({{0, slot, 1}}));
    CHECK(first.run(tokens_frame({{(1 << 24) - 1, SLOTS - 1, 1}})) > 0);
    Bytes broken = encoded(DS_F16, embedded(3));
    std::fill_n(broken.begin(), 4, 0xFF);  // a scale that is no number
    refused(middle, step_frame(ROWS, DS_F16, EMBD, broken));
    refused(middle, rows_frame(DS_F32, std::vector<Row>(CAPACITY + 1)));
    CHECK(middle.run(rows_frame(DS_F32, std::vector<Row>(CAPACITY))) > 0);
    CHECK(middle.run(rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 255))) > 0);
    refused(middle, rows_frame(DS_F32, ROWS, std::vector<uint32_t>(2 * 256)));
    // llama.cpp has room for the logits of one row per slot and aborts beyond.
    CHECK(last.run(rows_frame(DS_F32, std::vector<Row>(SLOTS, {1, 1, 1}))) > 0);
    refused(last, rows_frame(DS_F32, std::vector<Row>(SLOTS + 1, {1, 1, 1})));
    CHECK(middle.run(rows_frame(DS_F32, std::vector<Row>(SLOTS + 1, {1, 1, 1}))) > 0);
    // A row of a slot that has no sampler matters only if a token is wanted behind it, and only at the end.
    CHECK(ds_stage_sampler(last.stage, 2, 0, nullptr, -1, 0) == DS_OK);
    refused(last, rows_frame());
    CHECK(last.run(rows_frame(DS_F32, {ROWS[0]})) > 0 && last.run(rows_frame(DS_F32, {{3, 0, 1}})) > 0);
}

// Each slot has a cache of its own, and llama.cpp would reorder the rows of several.
void rows_of_several_slots() {
    Stage first(Place::First), middle(Place::Middle), last(Place::Last);
    for (const std::vector<Row> &rows : {std::vector<Row>{{7, 2, 0}, {8, 2, 1}, {0, 0, 1}}, {{1, 0, 1}, {1, 1, 1}}}) {
        refused(first, tokens_frame(rows));
        refused(middle, rows_frame(DS_F32, rows));
        refused(last, rows_frame(DS_F32, rows));
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
    rows_of_several_slots();
    the_room_given_is_kept_to();
    llama_cpp_may_refuse();
    rows_without_frames();
    configurations_that_cannot_be();
}
