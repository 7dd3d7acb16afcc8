// The callback, driven as ggml's scheduler drives it.
#include <string>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

namespace {

struct Graph {
    std::vector<unsigned char> input = std::vector<unsigned char>(24, 1), output = std::vector<unsigned char>(24, 7);
    std::vector<unsigned char> rest = std::vector<unsigned char>(24, 9);
    ggml_tensor nodes[4] = {{"inp_scaled", input.data(), 24},
                            {"l_out-1", rest.data(), 24},
                            {"l_out-12", output.data(), 24},
                            {"result_norm", rest.data(), 24}};

    // How many nodes are computed: as ggml_backend_sched_compute_splits.
    int run(ds_tap *tap) {
        for (int i = 0; i < 4; ++i) {
            if (ds_tap_callback(&nodes[i], true, tap) && !ds_tap_callback(&nodes[i], false, tap)) return i + 1;
        }
        return 4;
    }
};

struct Tap {
    ds_tap *tap = nullptr;
    Tap(const char *capture, const char *inject) {
        CHECK(ds_tap_new(tensor_name, tensor_size, tensor_get, tensor_set, &tap) == DS_OK);
        CHECK(ds_tap_set_names(tap, capture, inject) == DS_OK);
    }
    ~Tap() { ds_tap_free(tap); }
};

void captures_over_micro_batches_and_stops() {
    Graph graph;
    Tap t("l_out-12", nullptr);
    std::vector<unsigned char> out(48);
    CHECK(ds_tap_begin(t.tap, out.data(), out.size(), nullptr, 0) == DS_OK);
    CHECK(graph.run(t.tap) == 3);
    graph.output.assign(24, 8);
    CHECK(graph.run(t.tap) == 3);
    CHECK(ds_tap_captured(t.tap) == 48 && ds_tap_error(t.tap) == DS_OK);
    CHECK(out[0] == 7 && out[23] == 7 && out[24] == 8 && out[47] == 8);
    CHECK(graph.run(t.tap) == 3 && ds_tap_captured(t.tap) == 48 && ds_tap_error(t.tap) == DS_E_OVERFLOW);
    CHECK(ds_tap_begin(t.tap, out.data(), 48, nullptr, 0) == DS_OK && ds_tap_error(t.tap) == DS_OK);
    CHECK(ds_tap_captured(t.tap) == 0);
}

void injects_and_runs_on() {
    Graph graph;
    Tap t("l_out-12", "inp_scaled");
    std::vector<unsigned char> out(48), in(48);
    for (size_t i = 0; i < 48; ++i) in[i] = static_cast<unsigned char>(i);
    CHECK(ds_tap_begin(t.tap, out.data(), 48, in.data(), 48) == DS_OK);
    CHECK(graph.run(t.tap) == 3 && graph.input[0] == 0 && graph.input[23] == 23);
    CHECK(graph.run(t.tap) == 3 && graph.input[0] == 24 && graph.input[23] == 47);
    CHECK(ds_tap_injected(t.tap) == 48 && ds_tap_captured(t.tap) == 48 && ds_tap_error(t.tap) == DS_OK);
    CHECK(graph.run(t.tap) == 1 && ds_tap_error(t.tap) == DS_E_OVERFLOW && graph.input[0] == 24);
}

void without_buffers_lets_the_graph_be() {
    Graph graph;
    Tap t("l_out-12", "inp_scaled");
    CHECK(ds_tap_begin(t.tap, nullptr, 0, nullptr, 0) == DS_OK);
    CHECK(graph.run(t.tap) == 4 && graph.input[0] == 1);
    Tap none(nullptr, nullptr);
    CHECK(graph.run(none.tap) == 4);
}

void pauses_at_layers_that_are_not_its_own() {
    Graph graph;
    Tap t("l_out-12", "inp_scaled");
    std::vector<unsigned char> out(24), in(24);
    int pauses = 0;
    const ds_pause_fn count = [](void *data) { ++*static_cast<int *>(data); };
    CHECK(ds_tap_set_pause(t.tap, count, &pauses) == DS_OK && ds_tap_set_pause(nullptr, count, nullptr) == DS_E_ARG);
    CHECK(ds_tap_begin(t.tap, out.data(), 24, in.data(), 24) == DS_OK);
    CHECK(graph.run(t.tap) == 3 && pauses == 1);  // at l_out-1; l_out-12 is captured and ends the graph
    CHECK(ds_tap_captured(t.tap) == 24 && ds_tap_injected(t.tap) == 24);
    CHECK(ds_tap_begin(t.tap, nullptr, 0, nullptr, 0) == DS_OK);
    CHECK(graph.run(t.tap) == 4 && pauses == 3);  // nothing is captured: it runs to the end
    for (const char *name : {"ffn_inp-3", "l_out-0"}) {
        ggml_tensor node{name, out.data(), 24};
        CHECK(ds_tap_callback(&node, true, t.tap) && ds_tap_callback(&node, false, t.tap));
    }
    CHECK(pauses == 5);
    for (const char *name : {"ffn_inp", "l_out", "attn_out-1", "ffn_out-1"}) {
        ggml_tensor node{name, out.data(), 24};
        CHECK(!ds_tap_callback(&node, true, t.tap));
    }
    CHECK(ds_tap_set_pause(t.tap, nullptr, nullptr) == DS_OK);
    CHECK(graph.run(t.tap) == 4 && pauses == 5);
}

void retargets() {
    Graph graph;
    Tap t("l_out-12", nullptr);
    std::vector<unsigned char> out(24);
    CHECK(ds_tap_set_names(t.tap, "l_out-1", nullptr) == DS_OK);
    CHECK(ds_tap_begin(t.tap, out.data(), 24, nullptr, 0) == DS_OK);
    CHECK(graph.run(t.tap) == 2 && out[0] == 9);
}

void refuses_bad_names() {
    Tap t("a", nullptr);
    CHECK(ds_tap_set_names(t.tap, std::string(63, 'x').c_str(), nullptr) == DS_OK);
    CHECK(ds_tap_set_names(t.tap, std::string(64, 'x').c_str(), nullptr) == DS_E_ARG);
    CHECK(ds_tap_set_names(t.tap, "", nullptr) == DS_E_ARG);
    CHECK(ds_tap_set_names(t.tap, "a", "a") == DS_E_ARG);
    ds_tap *out = nullptr;
    CHECK(ds_tap_new(nullptr, tensor_size, tensor_get, tensor_set, &out) == DS_E_ARG);
}

}  // namespace

void test_tap() {
    captures_over_micro_batches_and_stops();
    injects_and_runs_on();
    without_buffers_lets_the_graph_be();
    pauses_at_layers_that_are_not_its_own();
    retargets();
    refuses_bad_names();
}
