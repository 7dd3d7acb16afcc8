// How fast this machine reads memory: the bound on decoding, which reads every weight once a token.
//
// Each thread owns its part of the buffer and writes it first, so that the pages are real and lie on its own memory
// node. All wait for one start; each counts what it read until the deadline.
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "dwarfstar_native.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t CHUNK_WORDS = (1u << 20) / 8;  // the clock is read once a MiB, that is, for nothing
constexpr uint64_t MIN_THREAD_BYTES = 1u << 20;

struct Part {
    uint64_t bytes = 0;
    Clock::time_point end;
};

uint64_t sum_words(const uint64_t *data, uint64_t n) {
    uint64_t lane[8] = {};
    for (uint64_t i = 0; i + 8 <= n; i += 8) {
        for (uint64_t j = 0; j < 8; ++j) lane[j] += data[i + j];
    }
    uint64_t sum = 0;
    for (const uint64_t value : lane) sum += value;
    return sum;
}

class Probe {
  public:
    Probe(int32_t threads, uint64_t words, double seconds) : words_(words), seconds_(seconds), parts_(threads) {}

    double run() {
        std::vector<std::thread> threads;
        bool started = true;
        try {
            threads.reserve(parts_.size());
            for (Part &part : parts_) threads.emplace_back([this, &part] { work(part); });
        } catch (const std::exception &) {
            started = false;
        }
        while (ready_.load() < threads.size()) std::this_thread::yield();
        if (!started || failed_.load()) seconds_ = 0;
        const Clock::time_point begin = Clock::now();
        deadline_ = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds_));
        go_.store(true, std::memory_order_release);
        for (std::thread &thread : threads) thread.join();
        if (!started || failed_.load()) return DS_E_MEMORY;
        uint64_t bytes = 0;
        Clock::time_point end = begin;
        for (const Part &part : parts_) {
            bytes += part.bytes;
            if (part.end > end) end = part.end;
        }
        return static_cast<double>(bytes) / std::chrono::duration<double>(end - begin).count() / 1e9;
    }

  private:
    void work(Part &part) {
        std::unique_ptr<uint64_t[]> data(new (std::nothrow) uint64_t[words_]);
        if (data) {
            for (uint64_t i = 0; i < words_; ++i) data[i] = i;
        } else {
            failed_.store(true);
        }
        ready_.fetch_add(1);
        while (!go_.load(std::memory_order_acquire)) std::this_thread::yield();
        uint64_t sum = 0;
        uint64_t at = 0;
        do {  // at least one chunk, so that a result is never 0
            if (!data) break;
            const uint64_t n = CHUNK_WORDS < words_ - at ? CHUNK_WORDS : words_ - at;
            sum += sum_words(data.get() + at, n);
            part.bytes += 8 * n;
            at = at + n == words_ ? 0 : at + n;
            part.end = Clock::now();
        } while (part.end < deadline_);
        sink_.fetch_add(sum);  // a use of the sum: without it no memory would be read
    }

    uint64_t words_;
    double seconds_;
    std::vector<Part> parts_;
    Clock::time_point deadline_;
    std::atomic<size_t> ready_{0};
    std::atomic<bool> go_{false}, failed_{false};
    std::atomic<uint64_t> sink_{0};
};

}  // namespace

extern "C" double ds_memory_bandwidth(int32_t threads, uint64_t bytes, double seconds) {
    if (threads < 1 || threads > DS_PROBE_MAX_THREADS || bytes > DS_PROBE_MAX_BYTES) return DS_E_ARG;
    if (!(seconds > 0.0) || seconds > DS_PROBE_MAX_SECONDS) return DS_E_ARG;
    const uint64_t each = bytes / static_cast<uint64_t>(threads);
    if (each < MIN_THREAD_BYTES) return DS_E_ARG;
    try {
        return Probe(threads, each / 64 * 8, seconds).run();
    } catch (const std::exception &) {
        return DS_E_MEMORY;
    }
}
