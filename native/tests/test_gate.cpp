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

// A prompt of 100 pieces beside steps of ten pieces without a break: a piece between two steps would be 100 steps.
void steps_without_a_break_leave_a_prompt_half_of_the_time() {
    Gate gate;
    std::atomic<bool> done{false};
    int taken = 0;
    std::thread steps([&] {
        for (bool over = false; !over;) {
            const Pass pass(gate, true);
            std::this_thread::sleep_for(milliseconds(10));
            ++taken;
            over = done;
        }
    });
    {
        const Pass pass(gate, false);
        for (int piece = 0; piece < 100; ++piece) {
            std::this_thread::sleep_for(milliseconds(1));
            gate.pause();
        }
        done = true;
    }
    steps.join();
    CHECK(taken >= 4);
    CHECK(taken <= 40);
}

// A prompt that waits for nobody goes on, and steps that come now and then wait for a piece of it and no more.
void steps_that_come_now_and_then_go_first() {
    Gate gate;
    std::atomic<bool> over{false};
    std::atomic<int> pieces{0};
    int most = 0;
    std::thread prompt([&] {
        const Pass pass(gate, false);
        while (!over) {
            std::this_thread::sleep_for(milliseconds(2));
            ++pieces;
            gate.pause();
        }
    });
    for (int step = 0; step < 20; ++step) {
        std::this_thread::sleep_for(milliseconds(9));
        const int before = pieces.load();
        const Pass pass(gate, true);
        most = std::max(most, pieces.load() - before);
        over = step == 19;
        std::this_thread::sleep_for(milliseconds(1));
    }
    prompt.join();
    CHECK(pieces > 20);
    CHECK(most <= 2);
}

}  // namespace

void test_gate() {
    who_waited_longer_goes_first();
    what_was_long_ago_is_forgotten();
    steps_without_a_break_leave_a_prompt_half_of_the_time();
    steps_that_come_now_and_then_go_first();
}
