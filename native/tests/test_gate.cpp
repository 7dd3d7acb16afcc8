// Two threads at the gate, one of which always comes back at once.
#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "gate.h"

namespace {

using dwarfstar::Balance;
using dwarfstar::Gate;
using dwarfstar::Pass;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

void who_waited_longer_goes_first() {
    Balance balance;
    CHECK(!balance.prompt_first());
    balance.prompt_waited(20000);
    CHECK(balance.prompt_first());
    balance.steps_waited(15000);
    CHECK(balance.prompt_first());
    balance.steps_waited(5000);
    CHECK(!balance.prompt_first());
}

void what_was_long_ago_is_forgotten() {
    Balance balance;
    for (int i = 0; i < 1000; ++i) balance.prompt_waited(Balance::MOST_US);
    balance.steps_waited(Balance::MOST_US);
    CHECK(!balance.prompt_first());
    for (int i = 0; i < 1000; ++i) balance.steps_waited(Balance::MOST_US);
    balance.prompt_waited(Balance::MOST_US);
    CHECK(!balance.prompt_first());
    balance.prompt_waited(1);
    CHECK(balance.prompt_first());
}

int64_t us_since(Clock::time_point then) {
    return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - then).count();
}

// A prompt of short pieces beside long steps without a break: a piece between two steps would be a tenth of the time.
// What each holds the gate for is measured, as a machine that has other work makes both longer.
void steps_without_a_break_leave_a_prompt_half_of_the_time() {
    Gate gate;
    std::atomic<bool> done{false};
    int64_t steps_us = 0, prompt_us = 0;
    std::thread steps([&] {
        for (bool over = false; !over;) {
            const Pass pass(gate, true);
            const auto began = Clock::now();
            std::this_thread::sleep_for(milliseconds(10));
            steps_us += us_since(began);
            over = done;
        }
    });
    {
        const Pass pass(gate, false);
        for (int piece = 0; piece < 100; ++piece) {
            const auto began = Clock::now();
            std::this_thread::sleep_for(milliseconds(1));
            prompt_us += us_since(began);
            gate.pause();
        }
        done = true;
    }
    steps.join();
    CHECK(steps_us > prompt_us / 4);
    CHECK(steps_us < 3 * prompt_us);
}

// Steps that come now and then wait for a piece of a prompt and no more.
void steps_that_come_now_and_then_go_first() {
    constexpr int STEPS = 20;
    Gate gate;
    std::atomic<bool> over{false};
    std::atomic<int> pieces{0};
    int waited_for = 0;
    std::thread prompt([&] {
        const Pass pass(gate, false);
        while (!over) {
            std::this_thread::sleep_for(milliseconds(2));
            ++pieces;
            gate.pause();
        }
    });
    for (int step = 0; step < STEPS; ++step) {
        std::this_thread::sleep_for(milliseconds(9));
        const int before = pieces.load();
        const Pass pass(gate, true);
        waited_for += pieces.load() - before;
        over = step == STEPS - 1;
        std::this_thread::sleep_for(milliseconds(1));
    }
    prompt.join();
    CHECK(pieces > STEPS);
    CHECK(waited_for <= 2 * STEPS);
}

}  // namespace

void test_gate() {
    who_waited_longer_goes_first();
    what_was_long_ago_is_forgotten();
    steps_without_a_break_leave_a_prompt_half_of_the_time();
    steps_that_come_now_and_then_go_first();
}
