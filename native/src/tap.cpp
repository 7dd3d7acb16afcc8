// The evaluation callback of llama.cpp: takes hidden states out of a graph and puts exact ones into it.
//
// Theory. ggml's scheduler asks for every graph node "do you want this?"; nodes up to a wanted one are computed,
// then the callback is called again with the result. Wanting the last layer's output and answering "stop" makes a
// slice that ends there: what follows (final norm, head, further layers) is not computed. Wanting the scaled input
// and overwriting it gives a later slice exactly the hidden state the unsplit model has there.
//
// Pauses. Wanting a layer's output without touching it makes the scheduler stop there for a moment: the place where a
// long decode lets a short one go first. The two names of a layer end in its number, so they are looked for by prefix.
//
// A decode may be cut into several micro-batches, each a graph of its own: offsets run on over them. When a
// buffer is too small nothing of that micro-batch is copied, the error is kept, and the graph is stopped.
#include <cstring>
#include <new>

#include "dwarfstar_native.h"

namespace {

constexpr size_t MAX_NAME = 64;  // GGML_MAX_NAME, the ending zero included

// A tensor name to look for. The callback runs once for each graph node (thousands a decode), and nearly every
// node differs in length or in its last characters ("l_out-12"), but nearly none in the first.
struct Target {
    char name[MAX_NAME] = {};
    size_t length = 0;  // 0: none

    bool set(const char *text) {
        length = 0;
        if (text == nullptr) return true;
        const size_t n = std::strlen(text);
        if (n == 0 || n >= MAX_NAME) return false;
        std::memcpy(name, text, n + 1);
        length = n;
        return true;
    }

    bool matches(const char *text) const {
        // The first character differs for most nodes; strcmp for the rest.
        return length != 0 && text[0] == name[0] && std::strcmp(text, name) == 0;
    }
};

// Tensors that every layer has: a name, '-', the layer's number.
constexpr const char *PAUSES[] = {"l_out-", "ffn_inp-"};

bool pauses_at(const char *name) {
    for (const char *prefix : PAUSES) {
        if (name[0] == prefix[0] && std::strncmp(name, prefix, std::strlen(prefix)) == 0) return true;
    }
    return false;
}

}  // namespace

struct ds_tap {
    ds_get_name_fn get_name;
    ds_nbytes_fn nbytes;
    ds_tensor_get_fn tensor_get;
    ds_tensor_set_fn tensor_set;
    Target capture{}, inject{};
    uint8_t *target = nullptr;
    const uint8_t *source = nullptr;
    uint64_t capacity = 0, size = 0, captured = 0, injected = 0;
    int32_t error = DS_OK;
    ds_pause_fn pause = nullptr;
    void *pause_data = nullptr;

    bool take(ggml_tensor *tensor) {
        const uint64_t n = nbytes(tensor);
        if (n > capacity - captured) {
            error = DS_E_OVERFLOW;
        } else {
            tensor_get(tensor, target + captured, 0, n);
            captured += n;
        }
        return false;
    }

    bool put(ggml_tensor *tensor) {
        const uint64_t n = nbytes(tensor);
        if (n > size - injected) {
            error = DS_E_OVERFLOW;
            return false;
        }
        tensor_set(tensor, source + injected, 0, n);
        injected += n;
        return true;
    }
};

extern "C" {

int32_t ds_tap_new(ds_get_name_fn get_name, ds_nbytes_fn nbytes, ds_tensor_get_fn tensor_get,
                   ds_tensor_set_fn tensor_set, ds_tap **out) {
    if (out == nullptr || get_name == nullptr || nbytes == nullptr || tensor_get == nullptr || tensor_set == nullptr) {
        return DS_E_ARG;
    }
    *out = new (std::nothrow) ds_tap{get_name, nbytes, tensor_get, tensor_set};
    return *out == nullptr ? DS_E_MEMORY : DS_OK;
}

void ds_tap_free(ds_tap *tap) { delete tap; }

int32_t ds_tap_set_names(ds_tap *tap, const char *capture, const char *inject) {
    if (tap == nullptr) return DS_E_ARG;
    Target taken, put;
    if (!taken.set(capture) || !put.set(inject)) return DS_E_ARG;
    if (capture != nullptr && inject != nullptr && std::strcmp(capture, inject) == 0) return DS_E_ARG;
    tap->capture = taken;
    tap->inject = put;
    return DS_OK;
}

int32_t ds_tap_begin(ds_tap *tap, void *target, uint64_t capacity, const void *source, uint64_t size) {
    if (tap == nullptr || (target == nullptr && capacity > 0) || (source == nullptr && size > 0)) return DS_E_ARG;
    tap->target = static_cast<uint8_t *>(target);
    tap->source = static_cast<const uint8_t *>(source);
    tap->capacity = capacity;
    tap->size = size;
    tap->captured = tap->injected = 0;
    tap->error = DS_OK;
    return DS_OK;
}

bool ds_tap_callback(ggml_tensor *tensor, bool ask, void *ud) {
    auto *tap = static_cast<ds_tap *>(ud);
    const char *name = tap->get_name(tensor);
    if (tap->target != nullptr && tap->capture.matches(name)) return ask || tap->take(tensor);
    if (tap->source != nullptr && tap->inject.matches(name)) return ask || tap->put(tensor);
    if (tap->pause != nullptr && pauses_at(name)) {
        if (!ask) tap->pause(tap->pause_data);
        return true;
    }
    // Not ours. On ask: no. Otherwise (the scheduler shows only what was asked for) let the graph run on.
    return !ask;
}

int32_t ds_tap_set_pause(ds_tap *tap, ds_pause_fn pause, void *data) {
    if (tap == nullptr) return DS_E_ARG;
    tap->pause = pause;
    tap->pause_data = data;
    return DS_OK;
}

uint64_t ds_tap_captured(const ds_tap *tap) { return tap == nullptr ? 0 : tap->captured; }
uint64_t ds_tap_injected(const ds_tap *tap) { return tap == nullptr ? 0 : tap->injected; }
int32_t ds_tap_error(const ds_tap *tap) { return tap == nullptr ? DS_E_ARG : tap->error; }
}
