// A stage's work on llama.cpp: rows in, rows or tokens out, and whole decode frames without Python between.
//
// Theory. Two contexts share the slice's weights. `steps` holds a sequence for each slot and decodes what is generated,
// a row or a few at a time. `prompt` reads one prompt in large batches; when its last row is through, its cells move to
// the slot's sequence in `steps`. So a short decode can go first while a long one is under way: a prompt's decode stops
// for a moment at every layer (ds_tap_set_pause), and whoever waits there runs on the other context. Running streams
// wait for a part of a layer, not for a chunk of somebody's prompt, and chunks may be as large as is efficient. Where
// both have work without a break, each gets half of the time (gate.h).
//
// ds_stage_run takes exactly the frames that need nothing else: steps without operations, whose rows have a sampler
// known here. llama.cpp streams the whole slice through the caches while it runs; what comes before and after finds them
// cold. A few dozen Python calls cost 35 µs warm and 200 µs cold, here they are some hundred instructions. It answers
// DS_E_UNSUPPORTED, having done nothing, for all others; the general way is stage/worker.py. The layout of frames is
// defined in wire/frames.py; tests hold the two against each other, byte for byte.
//
// Invariants. Rows of a slot follow each other: rows at a position the slot holds already replace what is held from
// there on; rows that would leave a gap are DS_E_GAP. A slot is in one place: in `prompt` while its prompt is read (and
// not yet settled), else in `steps`. The gate is held whenever a context is used.
//
// Windows. Of one sequence of several llama.cpp writes only the cells that its next row can see: where layers have a
// window, older ones of theirs stay behind. A sequence that was moved so can be cut to where it then ended, and not to
// before; its `floor` says so. Cells of `prompt`, which has one sequence, are written as those of a whole context, in
// full: a floor rises only when a slot is read on from, or copied.
//
// Threads. One thread runs prompts (ds_stage_step with prompt, ds_stage_copy), one runs steps; both may be inside at
// the same time. Samplers of a slot are set before its rows come and are used by one of them at a time.
//
// llama.cpp's own functions come as addresses; its batch is passed by value and mirrored here. ds_stage_new checks its
// size against the installed llama-cpp-python's.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dwarfstar_native.h"
#include "gate.h"

namespace {

using dwarfstar::Gate;
using dwarfstar::Pass;

constexpr uint32_t MAGIC = 0x1A665344;  // "DSf\x1a"
constexpr uint32_t RESIDUE = 0x48674BC7;  // CRC32C of bytes followed by their own CRC32C
constexpr uint8_t VERSION = 5, KIND_STEP = 1, KIND_RESULT = 2, PAYLOAD_NONE = 0, WANT_DRAWN = 1, WANT_CHECKED = 2;
constexpr uint32_t MAX_POSITION = (1u << 24) - 1, MAX_TIMINGS = 256;
constexpr uint32_t STATE_MAGIC = 0xAF143CD8;  // llama.cpp's, before the cells of a sequence
constexpr uint32_t STATE_ALL = 0, STATE_WINDOWED = 1;  // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: caches with a window only
constexpr size_t STATE_HEAD = 8, COUNT = 4;  // of such cells: magic and sequence; the size of every number in it
constexpr size_t ALIGNMENT = 16, ROW_BYTES = 11, TIMING_BYTES = 8, RESULT_ROW_BYTES = 16, CRC_BYTES = 4;

#pragma pack(push, 1)
struct Header {
    uint32_t magic;
    uint8_t version, kind, payload, zero1;
    uint32_t epoch;
    uint16_t flags, timings;
    uint64_t number;
    uint32_t rows, cols;
    uint16_t ops, rounds;
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
    bool general = false;
    void *chain = nullptr;
    int32_t dist = -1;  // index of the drawing sampler in the chain; -1: the chain has none
    uint64_t seed = 0;
    int32_t next = -1, token = -1;  // what was drawn last: the position it belongs to, and it
    bool halted = false;            // draws nothing any more
};

using Clock = std::chrono::steady_clock;

uint64_t elapsed_us(Clock::time_point since) {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - since).count());
}

uint32_t clipped(uint64_t us) { return us > 0xFFFFFFFFull ? 0xFFFFFFFFu : static_cast<uint32_t>(us); }

uint32_t get(const uint8_t *from) {
    uint32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

void put(uint8_t *to, uint32_t value) { std::memcpy(to, &value, sizeof value); }

size_t padded(size_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

void pause_gate(void *gate) { static_cast<Gate *>(gate)->pause(); }

// The arrays of one llama_batch, and the decode of it.
class Side {
  public:
    Side(const ds_stage_config &config, const ds_stage_context &own)
        : own(own), config_(config), positions_(size_t(own.capacity) * config.planes), slots_(own.capacity),
          counts_(own.capacity, 1), pointers_(own.capacity), wants_(own.capacity) {
        for (int32_t i = 0; i < own.capacity; ++i) pointers_[i] = &slots_[i];
        batch_.pos = positions_.data();
        batch_.n_seq_id = counts_.data();
        batch_.seq_id = pointers_.data();
        batch_.logits = wants_.data();
        if (config.token_input) {
            tokens_.resize(own.capacity);
            batch_.token = tokens_.data();
        }
    }

    void row(int32_t i, int32_t n, int32_t position, int32_t sequence, bool want) {
        positions_[i] = position;
        // Multi-dimensional RoPE: the text position in the first three planes, 0 in the fourth.
        for (int32_t plane = 1; plane < config_.planes; ++plane) {
            positions_[size_t(plane) * n + i] = plane < 3 ? position : 0;
        }
        slots_[i] = sequence;
        wants_[i] = config_.last ? want : true;  // llama.cpp drops unmarked rows in its last layer
    }

    // The rows set before: hidden states in, hidden states out (or logits, on the last stage).
    int32_t decode(int32_t n, const float *rows, float *out) {
        batch_.n_tokens = n;
        if (!config_.token_input) batch_.embd = const_cast<float *>(rows);
        const uint64_t bytes = uint64_t(n) * config_.n_embd * sizeof(float);
        const bool taps = !config_.last || config_.injects;
        if (taps) {
            const int32_t status = ds_tap_begin(own.tap, config_.last ? nullptr : out, config_.last ? 0 : bytes,
                                                config_.injects ? rows : nullptr, config_.injects ? bytes : 0);
            if (status != DS_OK) return status;
        }
        error = config_.decode(own.context, batch_);
        if (error != 0) return DS_E_DECODE;
        if (taps) {
            if (ds_tap_error(own.tap) != DS_OK) return DS_E_OVERFLOW;
            if (!config_.last && ds_tap_captured(own.tap) != bytes) return DS_E_NAME;
            if (config_.injects && ds_tap_injected(own.tap) != bytes) return DS_E_NAME;
        }
        return DS_OK;
    }

    ds_stage_context own;
    int32_t error = 0;  // what llama_decode answered last

  private:
    const ds_stage_config &config_;
    std::vector<int32_t> positions_, slots_, counts_, tokens_;
    std::vector<int32_t *> pointers_;
    std::vector<int8_t> wants_;
    ds_llama_batch batch_{};
};

// A step frame; its parts point into it, unaligned.
struct Frame {
    Header header;
    const uint8_t *positions, *tokens, *slots, *wants, *timings, *payload;

    int32_t position(uint32_t i) const { return read<int32_t>(positions, i); }
    int32_t token(uint32_t i) const { return read<int32_t>(tokens, i); }
    int32_t slot(uint32_t i) const { return read<uint16_t>(slots, i); }

    template <typename T> static T read(const uint8_t *from, uint32_t i) {
        T value;
        std::memcpy(&value, from + size_t(i) * sizeof value, sizeof value);
        return value;
    }
};

}  // namespace

struct ds_stage {
    ds_stage_config config;
    Gate gate;
    Side steps, prompt;
    std::vector<std::unique_ptr<Side>> own;  // for each slot, or none
    std::vector<Sampler> samplers;
    std::vector<int32_t> held;  // positions of each slot in `steps`
    std::vector<int32_t> floor;  // positions (but 0) each can be cut to
    int32_t prompt_slot = -1, prompt_held = 0, prompt_floor = 0;  // what `prompt` holds
    bool unsettled = false;                                       // and `steps` does not have it yet
    bool reading = false;                                         // a decode of it is under way
    std::atomic<int32_t> error{0};
    int32_t wire = DS_F32;
    bool batched = false;
    bool apart;  // prompts have a context of their own
    std::vector<float> input, output;
    std::vector<ResultRow> drawn;
    std::vector<uint32_t> drawn_from;  // the frame's row behind which each was drawn
    std::vector<bool> ends;            // by token: no row goes on behind it
    std::vector<int32_t> ids;
    std::vector<uint8_t> given;  // by `give`, until it is fetched

    explicit ds_stage(const ds_stage_config &c)
        : config(c), steps(config, config.steps), prompt(config, config.prompt), samplers(c.slots), held(c.slots, 0),
          floor(c.slots, 0), apart(c.prompt.context != c.steps.context) {
        for (int32_t slot = 0; config.own != nullptr && slot < config.slots; ++slot) {
            own.push_back(std::make_unique<Side>(config, config.own[slot]));
        }
        config.own = nullptr;  // the caller's, and it may go
        if (apart && config.prompt.tap != nullptr) ds_tap_set_pause(config.prompt.tap, pause_gate, &gate);
    }
    ~ds_stage() {
        if (apart && config.prompt.tap != nullptr) ds_tap_set_pause(config.prompt.tap, nullptr, nullptr);
    }

    // Where a slot's steps run, as which sequence, and of how many.
    Side &side(int32_t slot) { return own.empty() ? steps : *own[slot]; }
    int32_t sequence(int32_t slot) const { return own.empty() ? slot : 0; }
    int32_t streams() const { return own.empty() ? config.slots : 1; }

    Side &side(bool of_prompt, int32_t slot) { return of_prompt && apart ? prompt : side(slot); }

    bool cut(int32_t slot, int32_t position) {
        return config.seq_rm(side(slot).own.memory, sequence(slot), position, -1);
    }

    // Where a sequence of `positions` can be cut to after llama.cpp has written it alone.
    int32_t floor_after(int32_t positions) const {
        return config.window > 0 && positions > config.window ? positions - 1 : 0;
    }

    // Bytes of the first of two caches, the one without a window; 0 where there is one cache.
    size_t first_cache(void *context, int32_t sequence, size_t all) const {
        return config.window > 0 ? all - config.state_size(context, sequence, STATE_WINDOWED) : 0;
    }

    int32_t load(void *context, int32_t sequence, const uint8_t *state, const uint8_t *end) {
        return config.state_set(context, state, size_t(end - state), sequence, STATE_ALL) == 0 ? DS_E_MEMORY : DS_OK;
    }

    // llama.cpp writes a cache as the number of its streams, which are a context's sequences, and for each of them the
    // number of its cells and they; of one sequence alone that is 0 for all others. What is read must have as many
    // streams as the context it is for, so zeros come and go. State is there for the moment only, as large as the cells.
    int32_t prompt_to_slot(int32_t slot) {
        const uint32_t streams = static_cast<uint32_t>(this->streams());
        const size_t zeros = COUNT * (streams - 1), size = config.whole_size(prompt.own.context);
        std::vector<uint8_t> state(zeros + STATE_HEAD + size + zeros);
        uint8_t *const data = state.data() + zeros + STATE_HEAD;
        if (size < COUNT || config.whole_get(prompt.own.context, data, size) != size) return DS_E_SIZE;
        const size_t name = COUNT + get(data);  // a whole context begins with the architecture's
        if (name > size || size - name < 2 * COUNT || get(data + name) != 1) return DS_E_SIZE;
        const size_t all = config.state_size(prompt.own.context, 0, STATE_ALL);
        const size_t first = first_cache(prompt.own.context, 0, all);
        uint8_t *const start = data + name - zeros - STATE_HEAD, *end = data + size;
        if (first > 0) {  // the zeros of the second cache come last, those of the first cache first
            if (first > size - name - COUNT || get(data + name + first) != 1) return DS_E_SIZE;
            put(data + name + first, streams);
            end += zeros;
        }
        put(start, STATE_MAGIC);
        put(start + COUNT, 0);
        put(start + STATE_HEAD, streams);
        std::memset(start + STATE_HEAD + COUNT, 0, zeros);
        return load(side(slot).own.context, sequence(slot), start, end);
    }

    // A slot's sequence as the only one of a context would be written: in [start, end) of `state`. second: where in it
    // the second cache begins; 0: there is one. The inverse is `from_alone`.
    int32_t alone(int32_t slot, std::vector<uint8_t> &state, uint8_t *&start, uint8_t *&end, size_t &second) {
        void *const context = side(slot).own.context;
        const int32_t sequence = this->sequence(slot);
        const uint32_t streams = static_cast<uint32_t>(this->streams());
        const size_t before = COUNT * sequence, after = COUNT * (streams - 1 - sequence);
        const size_t size = config.state_size(context, sequence, STATE_ALL);
        const size_t least = STATE_HEAD + COUNT * (1 + streams);  // one cache, empty
        state.resize(size);
        uint8_t *const data = state.data();
        if (size < least || config.state_get(context, data, size, sequence, STATE_ALL) != size) return DS_E_SIZE;
        if (get(data + STATE_HEAD) != streams) return DS_E_SIZE;
        const size_t first = first_cache(context, sequence, size);
        start = data + before;
        end = data + size - after;
        second = 0;
        if (first > 0) {
            const uint8_t *const from = data + STATE_HEAD + first;
            if (first + least > size || get(from) != streams) return DS_E_SIZE;
            const size_t cells = size - STATE_HEAD - first - COUNT - before - after;
            end = data + STATE_HEAD + first - after;
            second = size_t(end - start);
            put(end, 1);
            std::memmove(end + COUNT, from + COUNT + before, cells);
            end += COUNT + cells;
        }
        put(start, STATE_MAGIC);
        put(start + COUNT, 0);
        put(start + STATE_HEAD, 1);
        return DS_OK;
    }

    int32_t slot_to_prompt(int32_t slot) {
        std::vector<uint8_t> state;
        uint8_t *start, *end;
        size_t second;
        if (const int32_t status = alone(slot, state, start, end, second); status != DS_OK) return status;
        return load(prompt.own.context, 0, start, end);
    }

    // The zeros of a cache come behind its cells here: a reader takes the cells of whatever stream has some.
    int32_t from_alone(int32_t slot, const uint8_t *data, size_t size, size_t second) {
        const uint32_t streams = static_cast<uint32_t>(this->streams());
        const size_t zeros = COUNT * (streams - 1), first = second > 0 ? second : size;
        if (first < STATE_HEAD + COUNT || get(data) != STATE_MAGIC || get(data + STATE_HEAD) != 1) return DS_E_SIZE;
        if (second > 0 && (size - second < COUNT || get(data + second) != 1)) return DS_E_SIZE;
        std::vector<uint8_t> state(size + 2 * zeros);
        uint8_t *const to = state.data(), *end = to + first + zeros;
        std::memcpy(to, data, first);
        put(to + STATE_HEAD, streams);
        if (second > 0) {
            std::memcpy(end, data + second, size - second);
            put(end, streams);
            end += size - second + zeros;
        }
        return load(side(slot).own.context, sequence(slot), to, end);
    }

    // What a slot holds before `position`, for another process: a number of 8 bytes (`second`), and its cells alone.
    // What it held from there on is forgotten.
    int32_t give(int32_t slot, int32_t position, std::vector<uint8_t> &out) {
        if (!apart && config.slots > 1) return DS_E_UNSUPPORTED;  // its cells are of a kind that is not moved
        if (prompt_slot == slot) {
            if (const int32_t status = settle(); status != DS_OK) return status;
            if (position < prompt_held) prompt_slot = -1;
        }
        if (position == 0) return DS_E_GAP;
        if (const int32_t status = trim(slot, position); status != DS_OK) return status;
        std::vector<uint8_t> state;
        uint8_t *start, *end;
        size_t second;
        if (const int32_t status = alone(slot, state, start, end, second); status != DS_OK) return status;
        const uint64_t where = second;
        out.resize(sizeof where + size_t(end - start));
        std::memcpy(out.data(), &where, sizeof where);
        std::memcpy(out.data() + sizeof where, start, size_t(end - start));
        return DS_OK;
    }

    // A slot takes what one of another process gave, and holds nothing else; nothing at all if that fails.
    int32_t take(int32_t slot, int32_t position, int32_t floor_given, const uint8_t *data, size_t size) {
        if (!apart && config.slots > 1) return DS_E_UNSUPPORTED;
        if (prompt_slot == slot) {
            prompt_slot = -1;
            unsettled = false;
        }
        uint64_t second;
        if (const int32_t status = trim(slot, 0); status != DS_OK || position == 0) return status;
        if (size <= sizeof second) return DS_E_SIZE;
        std::memcpy(&second, data, sizeof second);
        data += sizeof second;
        size -= sizeof second;
        if (second >= size || (second > 0 && config.window == 0)) return DS_E_SIZE;
        if (const int32_t status = from_alone(slot, data, size, size_t(second)); status != DS_OK) {
            config.seq_rm(side(slot).own.memory, sequence(slot), -1, -1);  // the first of two caches may have been set
            return status;
        }
        held[slot] = position;
        floor[slot] = std::max(floor_given, floor_after(position));
        return DS_OK;
    }

    int32_t slot_to_slot(int32_t source, int32_t target) {
        void *const context = side(source).own.context;
        const size_t size = config.state_size(context, sequence(source), STATE_ALL);
        std::vector<uint8_t> state(size);
        uint8_t *const data = state.data();
        if (config.state_get(context, data, size, sequence(source), STATE_ALL) != size) return DS_E_SIZE;
        return load(side(target).own.context, sequence(target), data, data + size);
    }

    // What the prompt's context holds goes to its slot.
    int32_t settle() {
        if (!unsettled) return DS_OK;
        if (const int32_t status = prompt_to_slot(prompt_slot); status != DS_OK) return status;
        // At a pause there are cells whose rows are not through yet.
        if (reading && !cut(prompt_slot, prompt_held)) return DS_E_GAP;
        held[prompt_slot] = prompt_held;
        floor[prompt_slot] = prompt_floor;
        unsettled = false;
        return DS_OK;
    }

    // The prompt's context holds `position` positions of the slot, and nothing else.
    int32_t take_prompt(int32_t slot, int32_t position) {
        if (prompt_slot == slot && position <= prompt_held) {
            if (position > 0 && position < prompt_floor) return DS_E_GAP;
            if (position < prompt_held && !config.seq_rm(prompt.own.memory, 0, position, -1)) return DS_E_GAP;
            if (position == 0) prompt_floor = 0;
            prompt_held = position;
            return position < held[slot] ? trim(slot, position) : DS_OK;
        }
        if (prompt_slot == slot && unsettled) return DS_E_GAP;
        if (const int32_t status = settle(); status != DS_OK) return status;
        if (const int32_t status = trim(slot, position); status != DS_OK) return status;
        prompt_slot = -1;
        config.seq_rm(prompt.own.memory, 0, -1, -1);
        if (position > 0) {
            if (const int32_t status = slot_to_prompt(slot); status != DS_OK) return status;
        }
        prompt_slot = slot;
        prompt_held = position;
        prompt_floor = std::max(floor[slot], floor_after(position));
        return DS_OK;
    }

    // The slot holds `position` positions in `steps`.
    int32_t trim(int32_t slot, int32_t position) {
        if (position > held[slot] || (position > 0 && position < floor[slot])) return DS_E_GAP;
        if (position < held[slot] && !cut(slot, position)) return DS_E_GAP;
        if (position == 0) floor[slot] = 0;
        held[slot] = position;
        return DS_OK;
    }

    // What the slot holds in `steps` is about to change by rows at `position`.
    int32_t take_step(int32_t slot, int32_t position) {
        if (prompt_slot == slot) {
            if (const int32_t status = settle(); status != DS_OK) return status;
            if (reading || position < prompt_held) prompt_slot = -1;
        }
        return trim(slot, position);
    }

    int32_t fail(Side &of, int32_t status) {
        error = of.error;
        return status;
    }

    int32_t step_prompt(int32_t n, const float *rows, int32_t position, int32_t slot, const uint8_t *want, float *out) {
        if (!apart) return step_slot(n, rows, position, slot, want, out);
        if (const int32_t status = take_prompt(slot, position); status != DS_OK) return status;
        bool ends = false;
        for (int32_t i = 0; i < n; ++i) {
            prompt.row(i, n, position + i, 0, want[i] != 0);
            ends = ends || want[i] != 0;
        }
        reading = true;
        const int32_t status = prompt.decode(n, rows, out);
        reading = false;
        if (prompt_slot != slot) return status == DS_OK ? DS_OK : fail(prompt, status);  // given away at a pause
        if (status != DS_OK) {
            config.seq_rm(prompt.own.memory, 0, position, -1);
            return fail(prompt, status);
        }
        prompt_held = position + n;
        unsettled = true;
        return ends ? settle() : DS_OK;
    }

    int32_t step_slot(int32_t n, const float *rows, int32_t position, int32_t slot, const uint8_t *want, float *out) {
        if (const int32_t status = take_step(slot, position); status != DS_OK) return status;
        Side &of = side(slot);
        for (int32_t i = 0; i < n; ++i) of.row(i, n, position + i, sequence(slot), want[i] != 0);
        if (const int32_t status = of.decode(n, rows, out); status != DS_OK) {
            cut(slot, position);
            return fail(of, status);
        }
        held[slot] = position + n;
        return DS_OK;
    }

    int32_t draw(Side &of, int32_t row, int32_t slot, int32_t position, int32_t guess) {
        Sampler &sampler = samplers[slot];
        if (sampler.mode == Mode::None) return DS_E_RANGE;
        if (sampler.halted) return DS_E_GUESS;
        if (guess >= 0 && (sampler.next != position || sampler.token != guess)) return DS_E_GUESS;
        int32_t token;
        if (sampler.mode == Mode::Greedy) {
            token = ds_argmax(config.logits(of.own.context, row), config.n_vocab);
        } else {
            if (sampler.dist >= 0) {
                // A new generator for each position: what is drawn depends on (seed, position) only.
                config.sampler_free(config.chain_remove(sampler.chain, sampler.dist));
                config.chain_add(sampler.chain, config.init_dist(ds_draw_seed(sampler.seed, position)));
            }
            token = config.sample(sampler.chain, of.own.context, row);
        }
        sampler.next = position + 1;
        sampler.token = token;
        return token;
    }

    bool parse(const uint8_t *data, size_t size, Frame &frame) const;
    bool usable(const Frame &frame) const;
    int32_t run_rows(const Frame &frame);
    int32_t run_together(const Frame &frame);
    int32_t draw_row(const Frame &frame, uint32_t i, int32_t row);
    size_t go_on(const Frame &frame, uint8_t *out, size_t room);
    int64_t run(const uint8_t *data, size_t size, uint32_t wait_us, uint8_t *out, size_t room, uint64_t *feed);
};

bool ds_stage::parse(const uint8_t *data, size_t size, Frame &frame) const {
    if (size < sizeof(Header) + CRC_BYTES) return false;
    Header &h = frame.header;
    std::memcpy(&h, data, sizeof h);
    if (h.magic != MAGIC || h.version != VERSION || h.kind != KIND_STEP || h.flags != 0) return false;
    if (h.ops != 0 || h.op_bytes != 0 || h.timings >= MAX_TIMINGS) return false;
    if (h.rows == 0 || h.rows > uint32_t(config.steps.capacity)) return false;
    const size_t n = h.rows;
    frame.positions = data + sizeof(Header);
    frame.tokens = frame.positions + 4 * n;
    frame.slots = frame.tokens + 4 * n;
    frame.wants = frame.slots + 2 * n;
    frame.timings = frame.wants + n;
    const size_t payload_at = padded(sizeof(Header) + ROW_BYTES * n + h.timings * TIMING_BYTES);
    frame.payload = data + payload_at;
    return payload_at + h.payload_bytes + CRC_BYTES == size && ds_crc32c(0, data, size) == RESIDUE;
}

bool ds_stage::usable(const Frame &frame) const {
    const Header &h = frame.header;
    int32_t wanted = 0;
    for (uint32_t i = 0; i < h.rows; ++i) {
        const int32_t position = frame.position(i), slot = frame.slot(i);
        if (position < 0 || uint32_t(position) > MAX_POSITION || slot >= config.slots) return false;
        if (frame.wants[i] > WANT_CHECKED || frame.token(i) < 0) return false;
        if (i > 0 && slot == frame.slot(i - 1) && position != frame.position(i - 1) + 1) return false;
        if (config.last && frame.wants[i]) {
            if (samplers[slot].mode == Mode::None || samplers[slot].general) return false;
            ++wanted;
        }
    }
    if (wanted > config.steps.outputs) return false;  // llama.cpp has room for so many rows of logits, and aborts
    if (config.first) return h.payload == PAYLOAD_NONE && h.payload_bytes == 0;
    return h.cols == uint32_t(config.n_embd) && h.payload >= DS_F32 && h.payload <= DS_Q8 &&
           ds_encoded_size(h.payload, h.rows, h.cols) == int64_t(h.payload_bytes);
}

// The token behind frame row i, which was row `row` of its decode, joins `drawn`.
int32_t ds_stage::draw_row(const Frame &frame, uint32_t i, int32_t row) {
    if (!config.last || !frame.wants[i]) return DS_OK;
    const int32_t slot = frame.slot(i);
    const int32_t guess = frame.wants[i] == WANT_CHECKED ? frame.token(i) : -1;
    const int32_t token = draw(side(slot), row, slot, frame.position(i), guess);
    if (token == DS_E_GUESS) return DS_OK;
    if (token < 0) return token;
    drawn.push_back(ResultRow{static_cast<uint16_t>(slot), 0, token, 0.0});
    drawn_from.push_back(i);
    return DS_OK;
}

// Rows of different slots as one decode. They are sorted by slot: llama.cpp would sort them, and results come as sorted.
int32_t ds_stage::run_together(const Frame &frame) {
    const int32_t n = static_cast<int32_t>(frame.header.rows);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t status = take_step(frame.slot(i), frame.position(i));
        if (status != DS_OK) return status;
    }
    for (int32_t i = 0; i < n; ++i) steps.row(i, n, frame.position(i), frame.slot(i), frame.wants[i] != 0);
    const int32_t status = steps.decode(n, input.data(), config.last ? nullptr : output.data());
    for (int32_t i = 0; i < n; ++i) {
        if (status != DS_OK) {
            config.seq_rm(steps.own.memory, frame.slot(i), frame.position(i), -1);
        } else {
            held[frame.slot(i)] = frame.position(i) + 1;
        }
    }
    if (status != DS_OK) return fail(steps, status);
    for (int32_t i = 0; i < n; ++i) {
        if (const int32_t error_of_draw = draw_row(frame, i, i); error_of_draw != DS_OK) return error_of_draw;
    }
    return DS_OK;
}

// Rows of a slot after those of another: each run of them one decode, or each row where batches are not worth it.
int32_t ds_stage::run_rows(const Frame &frame) {
    const uint32_t n = frame.header.rows;
    for (uint32_t start = 0, end; start < n; start = end) {
        end = start + 1;
        while (batched && own.empty() && end < n && frame.slot(end) == frame.slot(start)) ++end;
        const size_t at = size_t(start) * config.n_embd;
        const int32_t status =
            step_slot(static_cast<int32_t>(end - start), input.data() + at, frame.position(start), frame.slot(start),
                      frame.wants + start, config.last ? nullptr : output.data() + at);
        if (status != DS_OK) return status;
        for (uint32_t i = start; i < end; ++i) {
            const int32_t error_of_draw = draw_row(frame, i, static_cast<int32_t>(i - start));
            if (error_of_draw != DS_OK) return error_of_draw;
        }
    }
    return DS_OK;
}

// The frame with which the first stage goes on: a row behind each token drawn that does not end its text. Its bytes; 0
// if there is none.
size_t ds_stage::go_on(const Frame &frame, uint8_t *out, size_t room) {
    size_t n = 0;
    for (size_t k = 0; k < drawn.size(); ++k) {
        const uint32_t i = drawn_from[k];
        const size_t token = static_cast<size_t>(drawn[k].token);
        if (frame.wants[i] != WANT_DRAWN || frame.position(i) >= int32_t(MAX_POSITION)) return 0;
        if (token < ends.size() && ends[token]) continue;
        drawn_from[n] = static_cast<uint32_t>(k);  // from here on: of `drawn`, and never ahead of k
        ++n;
    }
    const size_t end = padded(sizeof(Header) + n * ROW_BYTES);
    if (n == 0 || end + CRC_BYTES > room) return 0;
    uint8_t *positions = out + sizeof(Header), *tokens = positions + 4 * n, *slots = tokens + 4 * n, *wants = slots + 2 * n;
    std::memset(out, 0, end);
    for (size_t k = 0; k < n; ++k) {
        const ResultRow &row = drawn[drawn_from[k]];
        put(positions + 4 * k, static_cast<uint32_t>(held[row.slot]));
        put(tokens + 4 * k, static_cast<uint32_t>(row.token));
        std::memcpy(slots + 2 * k, &row.slot, sizeof row.slot);
        wants[k] = WANT_DRAWN;
    }
    Header h = frame.header;
    h.payload = PAYLOAD_NONE;
    h.timings = 0;
    h.rows = static_cast<uint32_t>(n);
    h.cols = h.payload_bytes = 0;
    h.rounds = static_cast<uint16_t>(frame.header.rounds - 1);
    std::memcpy(out, &h, sizeof h);
    put(out + end, ds_crc32c(0, out, end));
    return end + CRC_BYTES;
}

int64_t ds_stage::run(const uint8_t *data, size_t size, uint32_t wait_us, uint8_t *out, size_t room, uint64_t *feed) {
    Frame frame;
    *feed = 0;
    if (!parse(data, size, frame) || !usable(frame)) return DS_E_UNSUPPORTED;
    const Pass pass(gate, true);
    const auto started = Clock::now();
    const Header &in = frame.header;
    const uint32_t n = in.rows;
    const size_t values = size_t(n) * config.n_embd;
    input.resize(values);
    int32_t status;
    if (config.first) {
        ids.resize(n);
        for (uint32_t i = 0; i < n; ++i) ids[i] = frame.token(i);
        status = ds_embed_rows(config.to_float, config.rows, config.n_rows, config.row_bytes, config.n_embd, ids.data(),
                               n, config.scale, input.data());
    } else {
        status = ds_decode(in.payload, frame.payload, in.payload_bytes, n, config.n_embd, input.data(), values);
    }
    if (status != DS_OK) return DS_E_UNSUPPORTED;  // a bad id, damaged data: the general way says so
    if (!config.last) output.resize(values);
    drawn.clear();
    drawn_from.clear();
    bool apart = batched && own.empty() && n > 1;  // every row of a slot of its own, sorted
    for (uint32_t i = 1; i < n; ++i) apart = apart && frame.slot(i) > frame.slot(i - 1);
    status = apart ? run_together(frame) : run_rows(frame);
    if (status != DS_OK) return status;

    Header h = in;
    h.timings = static_cast<uint16_t>(h.timings + 1);
    size_t at = sizeof(Header);
    const size_t old_timings = size_t(in.timings) * TIMING_BYTES;
    const auto timing = [&](size_t where) {
        const uint32_t pair[2] = {clipped(elapsed_us(started)), wait_us};
        std::memcpy(out + where, frame.timings, old_timings);
        std::memcpy(out + where + old_timings, pair, sizeof pair);
        return where + old_timings + sizeof pair;
    };
    if (config.last) {
        const size_t bytes = drawn.size() * RESULT_ROW_BYTES;
        const size_t rows_at = at + size_t(h.timings) * TIMING_BYTES;
        if (rows_at + bytes + CRC_BYTES > room) return DS_E_SIZE;
        timing(at);
        if (bytes > 0) std::memcpy(out + rows_at, drawn.data(), bytes);
        h.kind = KIND_RESULT;
        h.payload = PAYLOAD_NONE;
        h.rows = static_cast<uint32_t>(drawn.size());
        h.cols = 0;
        h.payload_bytes = static_cast<uint32_t>(bytes);
        at = rows_at + bytes;
        if (in.rounds > 0) *feed = go_on(frame, out + at + CRC_BYTES, room - at - CRC_BYTES);
        h.rounds = *feed > 0 ? in.rounds : 0;
    } else {
        const size_t rows_bytes = size_t(n) * ROW_BYTES;
        const size_t payload_at = padded(at + rows_bytes + size_t(h.timings) * TIMING_BYTES);
        const int64_t payload = ds_encoded_size(wire, n, config.n_embd);
        if (payload < 0 || payload_at + size_t(payload) + CRC_BYTES > room) return DS_E_SIZE;
        std::memcpy(out + at, data + sizeof(Header), rows_bytes);
        const int64_t written = ds_encode(wire, output.data(), n, config.n_embd, out + payload_at, size_t(payload));
        if (written != payload) return DS_E_SIZE;
        at = timing(at + rows_bytes);
        std::memset(out + at, 0, payload_at - at);
        h.payload = static_cast<uint8_t>(wire);
        h.cols = static_cast<uint32_t>(config.n_embd);
        h.payload_bytes = static_cast<uint32_t>(payload);
        at = payload_at + size_t(payload);
    }
    std::memcpy(out, &h, sizeof h);
    const uint32_t crc = ds_crc32c(0, out, at);
    std::memcpy(out + at, &crc, sizeof crc);
    return int64_t(at + CRC_BYTES);
}

namespace {

bool sound(const ds_stage_config &c, const ds_stage_context &own) {
    return own.context != nullptr && own.memory != nullptr && own.capacity > 0 && own.outputs > 0 &&
           (own.tap != nullptr || (c.last && !c.injects));
}

bool sound(const ds_stage_config &c) {
    if (!sound(c, c.steps) || !sound(c, c.prompt) || c.n_embd <= 0 || c.slots <= 0 || c.planes <= 0) return false;
    if (c.decode == nullptr || c.seq_rm == nullptr) return false;
    if (c.state_size == nullptr || c.state_get == nullptr || c.state_set == nullptr) return false;
    if (c.whole_size == nullptr || c.whole_get == nullptr || c.window < 0) return false;
    if (!c.last) return true;
    return c.logits != nullptr && c.sample != nullptr && c.chain_remove != nullptr && c.chain_add != nullptr &&
           c.init_dist != nullptr && c.sampler_free != nullptr && c.n_vocab > 0;
}

// Runs work that allocates; out of memory becomes a status.
template <typename Work> auto guarded(Work work) -> decltype(work()) {
    try {
        return work();
    } catch (const std::bad_alloc &) {
        return DS_E_MEMORY;
    }
}

}  // namespace

extern "C" {

int32_t ds_stage_new(const ds_stage_config *config, size_t batch_bytes, ds_stage **out) {
    if (config == nullptr || out == nullptr || batch_bytes != sizeof(ds_llama_batch) || !sound(*config)) return DS_E_ARG;
    return guarded([&]() -> int32_t {
        *out = new ds_stage(*config);
        return DS_OK;
    });
}

void ds_stage_free(ds_stage *stage) { delete stage; }

int32_t ds_stage_tune(ds_stage *stage, int32_t wire, bool batched) {
    if (stage == nullptr || wire < DS_F32 || wire > DS_Q8) return DS_E_ARG;
    stage->wire = wire;
    stage->batched = batched;
    return DS_OK;
}

int32_t ds_stage_step(ds_stage *stage, bool prompt, int32_t n, const float *rows, int32_t position, int32_t slot,
                      const uint8_t *wants, float *out) {
    if (stage == nullptr || rows == nullptr || wants == nullptr || (out == nullptr && !stage->config.last)) {
        return DS_E_ARG;
    }
    if (slot < 0 || slot >= stage->config.slots || position < 0) return DS_E_ARG;
    const ds_stage_context &own = stage->side(prompt, slot).own;
    if (n <= 0 || n > own.capacity) return DS_E_ARG;
    if (uint32_t(position) + uint32_t(n) - 1 > MAX_POSITION) return DS_E_ARG;
    int32_t wanted = 0;
    for (int32_t i = 0; i < n; ++i) wanted += wants[i] != 0;
    if (stage->config.last && wanted > own.outputs) return DS_E_ARG;
    return guarded([&]() -> int32_t {
        const Pass pass(stage->gate, !prompt);
        return prompt ? stage->step_prompt(n, rows, position, slot, wants, out)
                      : stage->step_slot(n, rows, position, slot, wants, out);
    });
}

int32_t ds_stage_error(const ds_stage *stage) { return stage == nullptr ? 0 : stage->error.load(); }

int32_t ds_stage_copy(ds_stage *stage, int32_t source, int32_t target, int32_t position) {
    if (stage == nullptr || position < 0) return DS_E_ARG;
    const int32_t slots = stage->config.slots;
    if (source < 0 || source >= slots || target < 0 || target >= slots) return DS_E_ARG;
    return guarded([&]() -> int32_t {
        const Pass pass(stage->gate, false);
        ds_stage &s = *stage;
        if (s.prompt_slot == source) {
            if (const int32_t status = s.settle(); status != DS_OK) return status;
        }
        const int32_t floor = std::max(s.floor[source], s.floor_after(s.held[source]));
        if (position > s.held[source] || (position > 0 && position < floor)) return DS_E_GAP;
        if (source == target) return DS_OK;
        if (s.prompt_slot == target) {
            s.prompt_slot = -1;
            s.unsettled = false;
        }
        if (const int32_t status = s.trim(target, 0); status != DS_OK || position == 0) return status;
        if (const int32_t status = s.slot_to_slot(source, target); status != DS_OK) return status;
        s.held[target] = s.held[source];
        s.floor[target] = floor;
        return s.trim(target, position);
    });
}

int64_t ds_stage_give(ds_stage *stage, int32_t slot, int32_t position) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots || position < 0) return DS_E_ARG;
    return guarded([&]() -> int64_t {
        const Pass pass(stage->gate, false);
        const int32_t status = stage->give(slot, position, stage->given);
        return status == DS_OK ? int64_t(stage->given.size()) : status;
    });
}

int32_t ds_stage_given(ds_stage *stage, void *out, size_t size) {
    if (stage == nullptr || out == nullptr) return DS_E_ARG;
    if (size != stage->given.size()) return DS_E_SIZE;
    std::memcpy(out, stage->given.data(), size);
    std::vector<uint8_t>().swap(stage->given);
    return DS_OK;
}

int32_t ds_stage_take(ds_stage *stage, int32_t slot, int32_t position, int32_t floor, const void *data, size_t size) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots) return DS_E_ARG;
    if (position < 0 || (data == nullptr && position > 0) || uint32_t(position) > MAX_POSITION || floor < 0 || floor > position) return DS_E_ARG;
    return guarded([&]() -> int32_t {
        const Pass pass(stage->gate, false);
        return stage->take(slot, position, floor, static_cast<const uint8_t *>(data), size);
    });
}

int32_t ds_stage_clear(ds_stage *stage) {
    if (stage == nullptr) return DS_E_ARG;
    const Pass pass(stage->gate, false);
    for (int32_t slot = 0; slot < stage->config.slots; ++slot) {
        stage->config.seq_rm(stage->side(slot).own.memory, stage->sequence(slot), -1, -1);
        stage->held[slot] = stage->floor[slot] = 0;
    }
    if (stage->apart) stage->config.seq_rm(stage->prompt.own.memory, 0, -1, -1);
    stage->prompt_slot = -1;
    stage->unsettled = false;
    return DS_OK;
}

int32_t ds_stage_sampler(ds_stage *stage, int32_t slot, int32_t mode, void *chain, int32_t dist, uint64_t seed,
                         bool general) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots || mode < 0 || mode > 2 ||
        (mode == 2 && chain == nullptr)) {
        return DS_E_ARG;
    }
    Sampler sampler;
    sampler.mode = static_cast<Mode>(mode);
    sampler.general = general;
    sampler.chain = chain;
    sampler.dist = dist;
    sampler.seed = seed;
    stage->samplers[slot] = sampler;
    return DS_OK;
}

int32_t ds_stage_draw(ds_stage *stage, bool prompt, int32_t row, int32_t slot, int32_t position, int32_t guess) {
    if (stage == nullptr || !stage->config.last || slot < 0 || slot >= stage->config.slots) return DS_E_ARG;
    return stage->draw(stage->side(prompt, slot), row, slot, position, guess);
}

int32_t ds_stage_halt(ds_stage *stage, int32_t slot) {
    if (stage == nullptr || slot < 0 || slot >= stage->config.slots) return DS_E_ARG;
    stage->samplers[slot].halted = true;
    return DS_OK;
}

int32_t ds_stage_ends(ds_stage *stage, const int32_t *tokens, int32_t n) {
    if (stage == nullptr || n < 0 || (tokens == nullptr && n > 0)) return DS_E_ARG;
    return guarded([&]() -> int32_t {
        std::vector<bool> ends(size_t(stage->config.n_vocab), false);
        for (int32_t i = 0; i < n; ++i) {
            if (tokens[i] < 0 || tokens[i] >= stage->config.n_vocab) return DS_E_RANGE;
            ends[size_t(tokens[i])] = true;
        }
        stage->ends.swap(ends);
        return DS_OK;
    });
}

int64_t ds_stage_run(ds_stage *stage, const void *frame, size_t size, uint32_t wait_us, void *out, size_t room,
                     uint64_t *feed) {
    if (stage == nullptr || frame == nullptr || out == nullptr || feed == nullptr) return DS_E_ARG;
    return guarded([&]() -> int64_t {
        return stage->run(static_cast<const uint8_t *>(frame), size, wait_us, static_cast<uint8_t *>(out), room, feed);
    });
}

int32_t ds_stage_held(const ds_stage *stage, int32_t slot, int32_t *floor) {
    if (stage == nullptr || floor == nullptr || slot < 0 || slot >= stage->config.slots) return DS_E_ARG;
    const bool read = stage->prompt_slot == slot && stage->unsettled;
    *floor = read ? stage->prompt_floor : stage->floor[slot];
    return read ? stage->prompt_held : stage->held[slot];
}

uint64_t ds_stage_busy_us(const ds_stage *stage) { return stage == nullptr ? 0 : stage->gate.busy_us(); }

uint32_t ds_draw_seed(uint64_t seed, int32_t position) {
    uint64_t x = seed + (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    const uint32_t low = static_cast<uint32_t>(x);
    return low == 0xFFFFFFFFu ? 0xFFFFFFFEu : low;  // llama.cpp takes that one for "choose one yourself"
}

}  // extern "C"
