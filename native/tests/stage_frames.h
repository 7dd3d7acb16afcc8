// Frames built from the layout a second time, apart from stage.cpp, and what the model of stage_fake.h makes of them.
#pragma once

#include "stage_fake.h"

namespace stage_fake {

struct Row {
    int32_t position;
    uint16_t slot;
    uint8_t wants;
    int32_t token = -1;  // -1: as IDS has it
};
inline const std::vector<Row> ROWS = {{0, 2, NONE}, {1, 2, DRAWN}, {2, 2, DRAWN}};

template <typename T>
T get(const Bytes &from, size_t at) {
    CHECK(at + sizeof(T) <= from.size());
    return get<T>(from.data() + at);
}

inline void seal(Bytes &frame) {
    const uint32_t crc = ds_crc32c(0, frame.data(), frame.size() - 4);
    std::memcpy(frame.data() + frame.size() - 4, &crc, 4);
}

inline Bytes header(uint8_t kind, uint8_t payload, size_t timings, size_t rows, uint32_t cols, size_t payload_bytes,
                    uint16_t rounds = 0) {
    Bytes out{'D', 'S', 'f', 0x1A, 5, kind, payload, 0};
    put<uint32_t>(out, 9);  // epoch
    put<uint16_t>(out, 0);  // flags
    put<uint16_t>(out, static_cast<uint16_t>(timings));
    put<uint64_t>(out, 0x123456789Aull);
    put<uint32_t>(out, static_cast<uint32_t>(rows));
    put<uint32_t>(out, cols);
    put<uint16_t>(out, 0);  // operations
    put<uint16_t>(out, rounds);
    put<uint32_t>(out, 0);
    put<uint32_t>(out, static_cast<uint32_t>(payload_bytes));
    CHECK(out.size() == HEADER);
    return out;
}

inline const std::vector<int32_t> IDS = {4, 10, 0, 1, 2};

inline int32_t id(const std::vector<Row> &rows, size_t i) {
    return rows[i].token >= 0 ? rows[i].token : IDS[i % IDS.size()];
}

inline Bytes step_frame(const std::vector<Row> &rows, uint8_t payload, uint32_t cols, const Bytes &data,
                        const std::vector<uint32_t> &timings = {}, uint16_t rounds = 0) {
    Bytes out = header(STEP, payload, timings.size() / 2, rows.size(), cols, data.size(), rounds);
    for (const Row &row : rows) put(out, row.position);
    for (size_t i = 0; i < rows.size(); ++i) put(out, id(rows, i));
    for (const Row &row : rows) put(out, row.slot);
    for (const Row &row : rows) put(out, row.wants);
    for (const uint32_t value : timings) put(out, value);
    while (out.size() % 16 != 0) out.push_back(0);
    out.insert(out.end(), data.begin(), data.end());
    out.resize(out.size() + 4);
    seal(out);
    return out;
}

inline Bytes tokens_frame(const std::vector<Row> &rows = ROWS, const std::vector<uint32_t> &timings = {},
                          uint16_t rounds = 0) {
    return step_frame(rows, NONE, 0, {}, timings, rounds);
}

inline std::vector<float> embedded(const std::vector<Row> &rows) {
    std::vector<float> out;
    for (size_t i = 0; i < rows.size(); ++i) {
        const auto row = TABLE.begin() + id(rows, i) * EMBD;
        out.insert(out.end(), row, row + EMBD);
    }
    return out;
}

inline Bytes encoded(int32_t wire, const std::vector<float> &values) {
    const auto rows = static_cast<int64_t>(values.size()) / EMBD;
    Bytes out(static_cast<size_t>(ds_encoded_size(wire, rows, EMBD)));
    CHECK(ds_encode(wire, values.data(), rows, EMBD, out.data(), out.size()) == static_cast<int64_t>(out.size()));
    return out;
}

inline std::vector<float> decoded(int32_t wire, const Bytes &data, size_t rows) {
    std::vector<float> out(rows * EMBD);
    CHECK(ds_decode(wire, data.data(), data.size(), int64_t(rows), EMBD, out.data(), out.size()) == DS_OK);
    return out;
}

inline Bytes rows_frame(int32_t wire = DS_F32, const std::vector<Row> &rows = ROWS,
                        const std::vector<uint32_t> &timings = {}, uint16_t rounds = 0) {
    return step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, embedded(rows)), timings, rounds);
}

// The model once more: what rows see, if each slot holds `held` and the rows of the frame before.
struct Model {
    std::vector<Cells> held = std::vector<Cells>(SLOTS);

    std::vector<float> pasts(const std::vector<float> &values, const std::vector<Row> &rows) {
        std::vector<float> out;
        for (size_t i = 0; i < rows.size(); ++i) {
            Cells &cells = held.at(rows[i].slot);
            cells.resize(std::min(cells.size(), size_t(rows[i].position)));
            out.push_back(Fake::past(cells));
            cells.push_back({rows[i].position, values[i * EMBD]});
        }
        return out;
    }
    std::vector<float> through(std::vector<float> values, const std::vector<Row> &rows) {
        const std::vector<float> past = pasts(values, rows);
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = Fake::hidden(values[i], rows[i / EMBD].position, past[i / EMBD]);
        }
        return values;
    }
    // The token drawn behind each row.
    std::vector<int32_t> draws(const std::vector<float> &values, const std::vector<Row> &rows) {
        std::vector<int32_t> out;
        const std::vector<float> past = pasts(values, rows);
        for (size_t i = 0; i < rows.size(); ++i) out.push_back(Fake::token(values[i * EMBD], past[i]));
        return out;
    }
};

inline std::vector<float> through(const std::vector<float> &values, const std::vector<Row> &rows) {
    return Model().through(values, rows);
}
inline std::vector<int32_t> draws(const std::vector<float> &values, const std::vector<Row> &rows) {
    return Model().draws(values, rows);
}

// The measured time is the one thing that is taken from the frame given, not computed.
inline void check_step(const Bytes &out, const std::vector<Row> &rows, int32_t wire, const std::vector<float> &values,
                std::vector<uint32_t> timings, uint16_t rounds = 0) {
    const size_t at = HEADER + ROW * rows.size() + 4 * timings.size();
    timings.insert(timings.end(), {get<uint32_t>(out, at), 77});
    CHECK(out == step_frame(rows, static_cast<uint8_t>(wire), EMBD, encoded(wire, values), timings, rounds));
}

struct Drawn {
    uint16_t slot;
    int32_t token;
};

inline void check_result(const Bytes &out, const std::vector<Drawn> &drawn, std::vector<uint32_t> timings = {},
                         uint16_t rounds = 0) {
    timings.insert(timings.end(), {get<uint32_t>(out, HEADER + 4 * timings.size()), 77});
    Bytes want = header(RESULT, 0, timings.size() / 2, drawn.size(), 0, drawn.size() * 16, rounds);
    for (const uint32_t value : timings) put(want, value);
    for (const Drawn &row : drawn) {
        put(want, row.slot);
        put<uint16_t>(want, 0);
        put(want, row.token);
        put(want, 0.0);
    }
    want.resize(want.size() + 4);
    seal(want);
    CHECK(out == want);
}

}  // namespace stage_fake
