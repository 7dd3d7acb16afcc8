// What slots hold: rows that follow or replace, guesses, several slots in a frame, and the two contexts.
#include <chrono>
#include <thread>

#include "stage_frames.h"

namespace {

using namespace stage_fake;

constexpr std::chrono::seconds PATIENCE{20};  // of a test that would otherwise hang

// Rows of a slot from `position` on; tokens as given.
std::vector<Row> rows_of(uint16_t slot, int32_t position, const std::vector<int32_t> &tokens, uint8_t wants = DRAWN) {
    std::vector<Row> out;
    for (const int32_t token : tokens) out.push_back({position++, slot, wants, token});
    return out;
}

std::vector<float> step(Stage &stage, bool prompt, const std::vector<Row> &rows, int32_t want = DS_OK) {
    const auto in = embedded(rows);
    std::vector<float> out(in.size());
    std::vector<uint8_t> wants;
    for (const Row &row : rows) wants.push_back(row.wants);
    CHECK(ds_stage_step(stage.stage, prompt, static_cast<int32_t>(rows.size()), in.data(), rows[0].position,
                        rows[0].slot, wants.data(), out.data()) == want);
    return out;
}

// The rows give what the model gives that holds what came before.
void check_rows(Stage &stage, Model &model, bool prompt, const std::vector<Row> &rows) {
    CHECK(step(stage, prompt, rows) == model.through(embedded(rows), rows));
}

void rows_replace_what_their_slot_held() {
    Stage stage(Place::Middle);
    Model model;
    Bytes out;
    for (const auto &rows : {rows_of(1, 0, {1, 2, 3, 4, 5}), rows_of(0, 0, {9, 8}), rows_of(1, 5, {6}),
                             rows_of(1, 3, {7, 8, 9, 1}), rows_of(1, 6, {2}), rows_of(1, 0, {3, 3}),
                             rows_of(1, 2, {5}), rows_of(0, 2, {7})}) {
        CHECK(stage.run(rows_frame(DS_F32, rows), &out) > 0);
        check_step(out, rows, DS_F32, model.through(embedded(rows), rows), {});
    }
}

void a_gap_is_refused_and_changes_nothing() {
    Stage stage(Place::Middle);
    Model model;
    check_rows(stage, model, false, rows_of(1, 0, {1, 2, 3}));
    const int32_t before = stage.fake.calls;
    CHECK(stage.run(rows_frame(DS_F32, rows_of(1, 4, {5}))) == DS_E_GAP);
    CHECK(stage.run(rows_frame(DS_F32, rows_of(2, 1, {5}))) == DS_E_GAP);
    for (const bool prompt : {false, true}) {
        step(stage, prompt, rows_of(1, 4, {5}), DS_E_GAP);
        step(stage, prompt, rows_of(2, 1, {5}), DS_E_GAP);
    }
    for (const int32_t source : {1, 2}) CHECK(ds_stage_copy(stage.stage, source, 0, 4) == DS_E_GAP);
    CHECK(stage.fake.calls == before && stage.prompt.calls == 0);
    check_rows(stage, model, false, rows_of(1, 3, {5}));
}

void rows_of_several_slots_are_as_alone() {
    const std::vector<std::vector<Row>> frames = {
        {{0, 2, 1, 4}, {1, 2, 1, 5}, {0, 0, 1, 6}},  // runs of rows, and a slot before the one before
        {{2, 2, 1, 7}, {1, 0, 1, 8}, {0, 1, 0, 9}},
        {{2, 0, 1, 1}, {1, 1, 1, 2}, {3, 2, 1, 3}},  // one row each, sorted
        {{3, 0, 0, 1}, {4, 0, 1, 2}, {2, 1, 1, 3}},
        {{4, 0, 1, 2}, {5, 0, 1, 2}, {4, 2, 1, 3}},  // the first one replaces what the frame before gave
    };
    for (const bool batched : {false, true}) {
        Stage middle(Place::Middle), last(Place::Last);
        Model model, model_of_last;
        Bytes out;
        std::vector<int32_t> sizes;
        CHECK(ds_stage_tune(middle.stage, DS_F32, batched) == DS_OK);
        CHECK(ds_stage_tune(last.stage, DS_F32, batched) == DS_OK);
        for (const auto &rows : frames) {
            CHECK(middle.run(rows_frame(DS_F32, rows), &out) > 0);
            check_step(out, rows, DS_F32, model.through(embedded(rows), rows), {});
            CHECK(last.run(rows_frame(DS_F32, rows), &out) > 0);
            const auto tokens = model_of_last.draws(embedded(rows), rows);
            std::vector<Drawn> want;
            for (size_t i = 0; i < rows.size(); ++i) {
                if (rows[i].wants) want.push_back({rows[i].slot, tokens[i]});
            }
            check_result(out, want);
        }
        const std::vector<int32_t> together = {2, 1, 1, 1, 1, 3, 2, 1, 2, 1}, apart(15, 1);
        CHECK(middle.fake.sizes == (batched ? together : apart) && last.fake.sizes == middle.fake.sizes);
    }
}

void guesses_are_answered_while_they_are_right() {
    for (const bool batched : {false, true}) {
        Stage last(Place::Last);
        CHECK(ds_stage_tune(last.stage, DS_F32, batched) == DS_OK);
        // The undisturbed text after one token.
        Model model;
        std::vector<int32_t> text = {4};
        for (int32_t i = 0; i < 12; ++i) {
            const auto rows = rows_of(1, i, {text.back()});
            text.push_back(model.draws(embedded(rows), rows)[0]);
        }
        const auto wrong = [&](int32_t i) { return (text[size_t(i)] + 1) % VOCAB; };
        const auto run = [&](std::vector<Row> rows) {
            Bytes out;
            CHECK(last.run(rows_frame(DS_F32, rows), &out) > 0);
            return out;
        };
        const auto known = [&](int32_t i) { return Row{i, 1, DRAWN, text[size_t(i)]}; };
        const auto guess = [&](int32_t i) { return Row{i, 1, CHECKED, text[size_t(i)]}; };
        const auto bad = [&](int32_t i) { return Row{i, 1, CHECKED, wrong(i)}; };
        const auto drawn = [&](int32_t from, int32_t to) {
            std::vector<Drawn> want;
            for (int32_t i = from; i < to; ++i) want.push_back({1, text[size_t(i)]});
            return want;
        };
        check_result(run({known(0), guess(1), guess(2)}), drawn(1, 4));    // all right
        check_result(run({guess(3), bad(4), guess(5)}), drawn(4, 5));      // over frames; what follows a wrong one is void
        check_result(run({guess(6), guess(7)}), {});                       // of the same run, sent before it was known
        check_result(run({known(4), guess(5), bad(6)}), drawn(5, 7));      // the right one replaces it
        check_result(run({bad(6)}), {});                                   // again wrong
        check_result(run({guess(6), guess(7)}), drawn(7, 9));              // right at last: it was drawn for its position
        check_result(run({known(8)}), drawn(9, 10));
        check_result(run({{9, 1, NONE, text[9]}, {10, 1, CHECKED, text[10]}}), {});  // nothing was drawn behind 9
        check_result(run({known(9), guess(10)}), drawn(10, 12));
    }
}

// ---- the prompt's context

void a_prompt_goes_to_its_slot() {
    for (const int32_t window : {0, 4}) {
        Stage stage(Place::Middle, DS_F32, false, 1, window), plain(Place::Middle, DS_F32, false, 1, window);
        const auto both = [&](bool prompt, const std::vector<Row> &rows) {
            CHECK(step(stage, prompt, rows) == step(plain, false, rows));
        };
        step(stage, false, rows_of(0, 0, {1, 2}));
        both(true, rows_of(1, 0, {1, 2, 3, 4, 5}, NONE));
        CHECK(stage.fake.cells[1].empty());
        both(true, rows_of(1, 5, {6, 7, 8}));
        CHECK(stage.fake.cells[1].size() == 8 && stage.fake.cells[0].size() == 2);
        CHECK(stage.fake.visible[1].size() == (window > 0 ? 8 : 0));  // in full, so that it can be cut anywhere
        both(false, rows_of(1, 8, {9}));
        both(false, rows_of(1, 9, {1}));
        both(true, rows_of(1, 6, {5, 4}));    // the prompt's context has it still
        both(false, rows_of(1, 8, {3}));
        both(true, rows_of(2, 0, {7, 7, 7, 7}));  // another slot's prompt
        both(false, rows_of(2, 4, {2}));
        both(false, rows_of(1, 9, {2}));
        both(true, rows_of(1, 7, {1, 2, 3}, NONE));  // back from the slot
        both(false, rows_of(1, 10, {3}));            // a step may end a prompt, too
        both(true, rows_of(1, 11, {1, 2}));
        both(false, rows_of(1, 13, {4}));
        if (window == 0) {
            both(true, rows_of(1, 2, {6, 5}));
            both(true, rows_of(0, 0, {6}, NONE));
            both(true, rows_of(1, 3, {6}));
        } else {  // rows before position 7 stayed behind when the slot was read on from there
            step(stage, true, rows_of(1, 2, {6}), DS_E_GAP);
            step(stage, false, rows_of(1, 6, {6}), DS_E_GAP);
            both(true, rows_of(1, 0, {6, 6, 6}));
            both(false, rows_of(1, 2, {6}));
        }
    }
}

void copies_go_on_as_their_source() {
    for (const int32_t window : {0, 4}) {
        Stage stage(Place::Middle, DS_F32, false, 1, window), plain(Place::Middle, DS_F32, false, 1, window);
        const auto both = [&](bool prompt, const std::vector<Row> &rows) {
            CHECK(step(stage, prompt, rows) == step(plain, false, rows));
        };
        const std::vector<int32_t> tokens = {1, 2, 3, 4};
        both(true, rows_of(0, 0, tokens, NONE));           // still in the prompt's context
        step(stage, true, rows_of(2, 0, {9, 9, 9, 9, 9}));  // to be replaced
        CHECK(ds_stage_copy(stage.stage, 0, 2, 3) == DS_OK);
        step(plain, false, rows_of(2, 0, {1, 2, 3}));
        both(false, rows_of(2, 3, {7}));
        CHECK(ds_stage_copy(stage.stage, 2, 2, 4) == DS_OK);
        both(true, rows_of(2, 4, {8, 1}));
        both(false, rows_of(0, 4, {5}));  // the source as before
        CHECK(ds_stage_copy(stage.stage, 0, 1, 2) == (window > 0 ? DS_E_GAP : DS_OK));  // its window is over
        CHECK(ds_stage_copy(stage.stage, 0, 1, 4) == DS_OK);
        step(plain, false, rows_of(1, 0, tokens));
        both(false, rows_of(1, 4, {6, 7}));
        CHECK(ds_stage_copy(stage.stage, 0, 1, 0) == DS_OK && stage.fake.cells[1].empty());
        both(true, rows_of(1, 0, {2, 2}));
    }
}

void a_failed_prompt_leaves_its_slot_sound() {
    Stage stage(Place::Middle);
    Model model;
    check_rows(stage, model, false, rows_of(1, 0, {1, 2, 3}));
    stage.prompt.answer = 1;
    step(stage, true, rows_of(1, 0, {5, 6}), DS_E_DECODE);
    CHECK(ds_stage_error(stage.stage) == 1);
    step(stage, false, rows_of(1, 3, {4}), DS_E_GAP);  // it was given away
    stage.prompt.answer = 0;
    check_rows(stage, model, true, rows_of(1, 0, {5, 6}));
    stage.fake.deaf = true;
    step(stage, true, rows_of(1, 2, {7}), DS_E_MEMORY);
    stage.fake.deaf = false;
    check_rows(stage, model, true, rows_of(1, 0, {5, 6}));
    check_rows(stage, model, false, rows_of(1, 2, {3}));
    CHECK(ds_stage_clear(stage.stage) == DS_OK);
    for (const bool prompt : {false, true}) step(stage, prompt, rows_of(1, 1, {4}), DS_E_GAP);
    CHECK(stage.prompt.cells[0].empty());
    for (const Cells &cells : stage.fake.cells) CHECK(cells.empty());
}

// ---- the gate

// A prompt in a thread of its own; at every pause the steps given run until `go` says they are through.
struct Overtaken {
    Stage stage{Place::Middle};
    std::atomic<int32_t> turn{0}, done{0};

    void at_every_pause() {
        stage.prompt.at_pause = [this](const std::function<void()> &pause) {
            const auto end = std::chrono::steady_clock::now() + PATIENCE;
            const int32_t mine = ++turn;
            while (done < mine) {
                CHECK(std::chrono::steady_clock::now() < end);
                pause();
            }
        };
    }
};

void steps_go_before_a_prompt_at_every_layer() {
    Overtaken o;
    Model model;
    check_rows(o.stage, model, false, rows_of(0, 0, {1}));
    o.at_every_pause();
    const auto rows = rows_of(1, 0, {1, 2, 3, 4, 5, 6, 7, 8});
    constexpr int32_t PAUSES = PROMPT_CAPACITY / 2;
    std::vector<float> read;
    std::thread prompt([&] { read = step(o.stage, true, rows); });
    Bytes out;
    for (int32_t i = 1; i <= PAUSES; ++i) {
        while (o.turn < i) std::this_thread::yield();
        const auto one = rows_of(0, i, {i});
        CHECK(o.stage.run(rows_frame(DS_F32, one), &out) > 0);
        check_step(out, one, DS_F32, model.through(embedded(one), one), {});
        CHECK(o.stage.prompt.calls == 1 && o.stage.fake.cells[1].empty());  // it runs still
        ++o.done;
    }
    prompt.join();
    CHECK(read == through(embedded(rows), rows) && o.stage.fake.cells[1].size() == rows.size());
    CHECK(ds_stage_busy_us(o.stage.stage) < 1000000ull * 60 * 10);
}

// The slot of a prompt is given to a step while it is read: what the prompt gives is for nothing.
void a_slot_given_away_in_the_middle_of_a_prompt() {
    for (const int32_t read : {0, 2}) {
        Overtaken o;
        Model model;
        if (read > 0) check_rows(o.stage, model, true, rows_of(1, 0, {1, 2}, NONE));
        o.at_every_pause();
        std::thread prompt([&] { step(o.stage, true, rows_of(1, read, {3, 4})); });
        while (o.turn < 1) std::this_thread::yield();
        check_rows(o.stage, model, false, rows_of(1, read, {9}));
        ++o.done;
        prompt.join();
        o.stage.prompt.at_pause = [](const std::function<void()> &pause) { pause(); };
        check_rows(o.stage, model, false, rows_of(1, read + 1, {8}));
        check_rows(o.stage, model, true, rows_of(1, read + 2, {7, 6}));
        check_rows(o.stage, model, false, rows_of(1, read + 4, {5}));
    }
}

// Both threads at full speed; every row must give what it gives alone.
void two_threads_at_once() {
    Stage stage(Place::Last);
    const auto prompt_rows = rows_of(1, 0, {5, 4, 3, 2, 1, 6, 7}, NONE);
    const int32_t after = draws(embedded(prompt_rows), prompt_rows).back();
    std::thread prompts([&] {
        auto rows = prompt_rows;
        rows.back().wants = DRAWN;
        for (int32_t i = 0; i < 300; ++i) {
            for (Row &row : rows) row.slot = static_cast<uint16_t>(1 + i % 2);
            step(stage, true, rows);
            CHECK(ds_stage_draw(stage.stage, true, 6, rows[0].slot, 6, -1) == after);
        }
    });
    Model model;
    Bytes out;
    for (int32_t i = 0; i < 600; ++i) {
        const auto rows = rows_of(0, i % 50, {i % VOCAB});
        CHECK(stage.run(rows_frame(DS_F32, rows), &out) > 0);
        check_result(out, {{0, model.draws(embedded(rows), rows)[0]}});
    }
    prompts.join();
}

}  // namespace

void test_stage_slots() {
    rows_replace_what_their_slot_held();
    a_gap_is_refused_and_changes_nothing();
    rows_of_several_slots_are_as_alone();
    guesses_are_answered_while_they_are_right();
    a_prompt_goes_to_its_slot();
    copies_go_on_as_their_source();
    a_failed_prompt_leaves_its_slot_sound();
    steps_go_before_a_prompt_at_every_layer();
    a_slot_given_away_in_the_middle_of_a_prompt();
    two_threads_at_once();
}
