// Fills the tensors of a model made by llama_model_init_from_user, from a virtual file: the way to load a slice
// where the platform offers no FILE* over callbacks. Built everywhere, so that it is tested everywhere.
//
// llama.cpp's callback returns nothing. So the first error is kept, later calls do nothing, and whoever loads the
// model must ask before using it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "dwarfstar_native.h"

struct ds_filler {
    struct Place {
        uint64_t offset, size;
    };
    ds_vfile *file = nullptr;
    std::unordered_map<std::string, Place> places;
    uint64_t chunk = 0;
    ds_get_name_fn get_name = nullptr;
    ds_nbytes_fn nbytes = nullptr;
    ds_tensor_set_fn tensor_set = nullptr;
    std::atomic<int32_t> error{DS_OK};
    std::atomic<uint64_t> count{0};
    mutable std::mutex lock;  // guards failed_name
    std::string failed_name;

    void fail(int32_t status, const char *name) {
        const std::lock_guard<std::mutex> held(lock);
        if (error.load() == DS_OK) {
            failed_name = name;
            error.store(status);
        }
    }

    int32_t fill(ggml_tensor *tensor, const char *name) const {
        const auto found = places.find(name);
        if (found == places.end()) return DS_E_NAME;
        const Place place = found->second;
        if (nbytes(tensor) != place.size) return DS_E_SIZE;
        const uint64_t step = chunk == 0 ? place.size : std::min(chunk, place.size);
        std::vector<uint8_t> staging(step);
        for (uint64_t done = 0; done < place.size;) {
            const uint64_t n = std::min(step, place.size - done);
            if (ds_vfile_pread(file, staging.data(), n, place.offset + done) != static_cast<int64_t>(n)) return DS_E_IO;
            tensor_set(tensor, staging.data(), done, n);
            done += n;
        }
        return DS_OK;
    }
};

extern "C" {

int32_t ds_filler_new(ds_vfile *file, const char *const *names, const uint64_t *offsets, const uint64_t *sizes,
                      size_t n, uint64_t chunk_bytes, ds_get_name_fn get_name, ds_nbytes_fn nbytes,
                      ds_tensor_set_fn tensor_set, ds_filler **out) {
    if (out == nullptr || file == nullptr || get_name == nullptr || nbytes == nullptr || tensor_set == nullptr ||
        (n > 0 && (names == nullptr || offsets == nullptr || sizes == nullptr))) {
        return DS_E_ARG;
    }
    *out = nullptr;
    const uint64_t size = ds_vfile_size(file);
    try {
        auto filler = std::make_unique<ds_filler>();
        filler->places.reserve(n);
        for (size_t i = 0; i < n; ++i) {
            if (names[i] == nullptr) return DS_E_ARG;
            if (offsets[i] > size || sizes[i] > size - offsets[i]) return DS_E_RANGE;
            if (!filler->places.emplace(names[i], ds_filler::Place{offsets[i], sizes[i]}).second) return DS_E_NAME;
        }
        filler->file = file;
        filler->chunk = chunk_bytes;
        filler->get_name = get_name;
        filler->nbytes = nbytes;
        filler->tensor_set = tensor_set;
        *out = filler.release();
        return DS_OK;
    } catch (const std::exception &) {
        return DS_E_MEMORY;
    }
}

void ds_filler_free(ds_filler *filler) { delete filler; }

void ds_fill_tensor(ggml_tensor *tensor, void *ud) {
    auto *filler = static_cast<ds_filler *>(ud);
    if (filler == nullptr || tensor == nullptr || filler->error.load() != DS_OK) return;
    const char *name = filler->get_name(tensor);
    int32_t status = DS_E_MEMORY;
    try {
        status = filler->fill(tensor, name);
    } catch (const std::exception &) {
        status = DS_E_MEMORY;
    }
    if (status == DS_OK) {
        filler->count.fetch_add(1);
    } else {
        filler->fail(status, name);
    }
}

int32_t ds_filler_error(const ds_filler *filler, char *name, size_t capacity) {
    if (filler == nullptr) return DS_E_ARG;
    const std::lock_guard<std::mutex> held(filler->lock);
    if (name != nullptr && capacity > 0) {
        const size_t n = std::min(capacity - 1, filler->failed_name.size());
        std::memcpy(name, filler->failed_name.data(), n);
        name[n] = '\0';
    }
    return filler->error.load();
}

uint64_t ds_filler_count(const ds_filler *filler) { return filler == nullptr ? 0 : filler->count.load(); }
}
