// Who may compute on a stage's core: one thread that runs steps, or one that reads prompts.
//
// Steps go first, for somebody waits for each of their tokens; a prompt gets in when none waits, and lets them go before
// it at its pauses, of which llama.cpp offers two a layer. That alone starves prompts where steps come without a break,
// as many streams on one stage do: each prompt gets half a layer between two frames. So each side's waiting for the
// other is counted, and a prompt that waited longer than the steps goes first, until they are even: while both have
// work, each has half of the time.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace dwarfstar {

// The count of waiting. What was long ago does not matter, so it is bounded.
class Balance {
  public:
    static constexpr int64_t MOST_US = 100000;

    void prompt_waited(int64_t us) { owed_us_ = std::min(owed_us_ + us, MOST_US); }
    void steps_waited(int64_t us) { owed_us_ = std::max(owed_us_ - us, -MOST_US); }
    bool prompt_first() const { return owed_us_ > 0; }

  private:
    int64_t owed_us_ = 0;
};

class Gate {
  public:
    void enter(bool steps) {
        std::unique_lock<std::mutex> lock(mutex_);
        take(lock, steps);
    }

    void leave() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            let_go();
        }
        free_.notify_all();
    }

    // Called by a prompt that holds the gate.
    void pause() {
        if (steps_.waiting == 0) return;  // looked at without the lock, as this is called at every layer
        std::unique_lock<std::mutex> lock(mutex_);
        count();
        if (balance_.prompt_first()) return;
        let_go();
        free_.notify_all();
        take(lock, false);  // under the same lock: on a core they share, this thread may not run before steps are through
    }

    uint64_t busy_us() const { return busy_us_; }

  private:
    using Clock = std::chrono::steady_clock;
    struct Side {
        std::atomic<int> waiting{0};
        Clock::time_point since;  // when it began to wait, or was last counted
    };

    static int64_t us(Clock::time_point from, Clock::time_point to) {
        return std::chrono::duration_cast<std::chrono::microseconds>(to - from).count();
    }

    void take(std::unique_lock<std::mutex> &lock, bool steps) {
        Side &mine = steps ? steps_ : prompt_;
        const Side &other = steps ? prompt_ : steps_;
        if (mine.waiting++ == 0) mine.since = Clock::now();
        free_.wait(lock, [&] { return !held_ && (other.waiting == 0 || balance_.prompt_first() != steps); });
        --mine.waiting;
        held_ = true;
        for_steps_ = steps;
        since_ = Clock::now();
    }

    void let_go() {
        count();
        held_ = false;
        busy_us_ += us(since_, Clock::now());
    }

    // What the other side waited for the one that holds the gate.
    void count() {
        Side &other = for_steps_ ? prompt_ : steps_;
        if (other.waiting == 0) return;
        const auto now = Clock::now();
        const int64_t waited = us(std::max(other.since, since_), now);
        for_steps_ ? balance_.prompt_waited(waited) : balance_.steps_waited(waited);
        other.since = now;
    }

    std::mutex mutex_;
    std::condition_variable free_;
    Side steps_, prompt_;
    bool held_ = false, for_steps_ = false;
    Clock::time_point since_;
    Balance balance_;
    std::atomic<uint64_t> busy_us_{0};
};

class Pass {
  public:
    Pass(Gate &gate, bool steps) : gate_(gate) { gate_.enter(steps); }
    ~Pass() { gate_.leave(); }
    Pass(const Pass &) = delete;
    Pass &operator=(const Pass &) = delete;

  private:
    Gate &gate_;
};

}  // namespace dwarfstar
