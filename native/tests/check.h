// A test is a function that CHECKs; main.cpp runs all. No framework: the sanitizers do most of the looking.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                    \
        }                                                                                    \
    } while (false)

void test_codec();
void test_file();
void test_gate();
void test_rows();
void test_stage();
void test_stage_slots();
void test_tap();

// A stand-in for ggml's tensor: the library never looks inside, it calls the functions below.
struct ggml_tensor {
    const char *name;
    unsigned char *data;
    size_t size;
};

inline const char *tensor_name(const ggml_tensor *t) { return t->name; }
inline size_t tensor_size(const ggml_tensor *t) { return t->size; }

inline void tensor_get(const ggml_tensor *t, void *data, size_t offset, size_t size) {
    for (size_t i = 0; i < size; ++i) static_cast<unsigned char *>(data)[i] = t->data[offset + i];
}

inline void tensor_set(ggml_tensor *t, const void *data, size_t offset, size_t size) {
    for (size_t i = 0; i < size; ++i) t->data[offset + i] = static_cast<const unsigned char *>(data)[i];
}
