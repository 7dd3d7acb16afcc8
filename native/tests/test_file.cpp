// The virtual file against a plain array of the same bytes, and the filler that reads from it.
#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "dwarfstar_native.h"

#ifndef _WIN32
#include <unistd.h>
#endif

namespace {

using Bytes = std::vector<unsigned char>;

struct Fixture {
    FILE *disk = std::tmpfile();
    Bytes header, whole;
    ds_vfile *file = nullptr;
    size_t bad = 0;

    Fixture() {
        CHECK(disk != nullptr);
        Bytes content(300000);
        for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<unsigned char>(i * 7 + i / 256);
        CHECK(std::fwrite(content.data(), 1, content.size(), disk) == content.size());
        std::fflush(disk);
        for (int i = 0; i < 100; ++i) header.push_back(static_cast<unsigned char>(255 - i));
        const int fd = fileno(disk);
        const ds_extent extents[] = {
            {DS_EXTENT_MEMORY, -1, header.data(), 0, header.size()}, {DS_EXTENT_ZEROS, -1, nullptr, 0, 28},
            {DS_EXTENT_FILE, fd, nullptr, 200000, 100000},           {DS_EXTENT_ZEROS, -1, nullptr, 0, 0},
            {DS_EXTENT_FILE, fd, nullptr, 5, 70000},                 {DS_EXTENT_MEMORY, -1, header.data(), 0, 1},
        };
        whole = header;
        whole.insert(whole.end(), 28, 0);
        whole.insert(whole.end(), content.begin() + 200000, content.end());
        whole.insert(whole.end(), content.begin() + 5, content.begin() + 70005);
        whole.push_back(header[0]);
        CHECK(ds_vfile_open(extents, 6, &file, &bad) == DS_OK);
    }
    ~Fixture() {
        ds_vfile_close(file);
        std::fclose(disk);
    }
};

void reads_what_an_array_holds() {
    Fixture f;
    CHECK(ds_vfile_size(f.file) == f.whole.size());
    const uint64_t offsets[] = {0, 1, 99, 100, 127, 128, 100127, 100128, 170127, 170128, f.whole.size()};
    const uint64_t sizes[] = {0, 1, 2, 29, 300, 100001, 1000000};
    uint64_t total = 0;
    for (const uint64_t offset : offsets) {
        for (const uint64_t size : sizes) {
            Bytes out(size);  // exactly so large: the sanitizer sees a byte too many
            const uint64_t want = std::min<uint64_t>(size, f.whole.size() - offset);
            CHECK(ds_vfile_pread(f.file, out.data(), size, offset) == static_cast<int64_t>(want));
            CHECK(want == 0 || std::memcmp(out.data(), f.whole.data() + offset, want) == 0);
            total += want;
        }
    }
    CHECK(ds_vfile_bytes_read(f.file) == total);
}

void streams_like_a_file() {
    Fixture f;
    auto *stream = static_cast<FILE *>(ds_vfile_stream(f.file));
    if (stream == nullptr) return;  // Windows
    CHECK(stream == ds_vfile_stream(f.file));
    CHECK(std::fseek(stream, 0, SEEK_END) == 0);
    CHECK(std::ftell(stream) == static_cast<long>(f.whole.size()));
    CHECK(std::fseek(stream, 0, SEEK_SET) == 0);
    Bytes out(f.whole.size());
    CHECK(std::fread(out.data(), out.size(), 1, stream) == 1);
    CHECK(out == f.whole);
    CHECK(std::fgetc(stream) == EOF && std::feof(stream) && !std::ferror(stream));
    CHECK(std::fseek(stream, 90, SEEK_SET) == 0);
    CHECK(std::fread(out.data(), 1, 50, stream) == 50 && std::memcmp(out.data(), f.whole.data() + 90, 50) == 0);
    CHECK(std::fseek(stream, -60, SEEK_CUR) == 0 && std::ftell(stream) == 80);
    CHECK(std::fgetc(stream) == f.whole[80]);
    CHECK(std::fseek(stream, -1, SEEK_SET) != 0);
    CHECK(std::fseek(stream, -10000000, SEEK_CUR) != 0);
    CHECK(std::ftell(stream) == 81 && std::fgetc(stream) == f.whole[81]);
}

void reads_on_several_threads() {
    Fixture f;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&f, t] {
            for (uint64_t offset = static_cast<uint64_t>(t); offset < f.whole.size(); offset += 9973) {
                unsigned char byte = 0;
                CHECK(ds_vfile_pread(f.file, &byte, 1, offset) == 1 && byte == f.whole[offset]);
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
}

void refuses_what_is_not_there() {
    Fixture f;
    ds_vfile *out = nullptr;
    size_t bad = 0;
    const int fd = fileno(f.disk);
    const ds_extent good = {DS_EXTENT_ZEROS, -1, nullptr, 0, 10};
    const ds_extent past[] = {good, {DS_EXTENT_FILE, fd, nullptr, 200001, 100000}};
    CHECK(ds_vfile_open(past, 2, &out, &bad) == DS_E_RANGE && bad == 1 && out == nullptr);
    const ds_extent huge[] = {good, good, {DS_EXTENT_FILE, fd, nullptr, UINT64_MAX, UINT64_MAX}};
    CHECK(ds_vfile_open(huge, 3, &out, &bad) == DS_E_RANGE && bad == 2);
    const ds_extent kind[] = {{7, -1, nullptr, 0, 1}};
    CHECK(ds_vfile_open(kind, 1, &out, &bad) == DS_E_ARG);
    const ds_extent null[] = {{DS_EXTENT_MEMORY, -1, nullptr, 0, 1}};
    CHECK(ds_vfile_open(null, 1, &out, &bad) == DS_E_ARG);
    const ds_extent closed[] = {{DS_EXTENT_FILE, -1, nullptr, 0, 1}};
    CHECK(ds_vfile_open(closed, 1, &out, &bad) == DS_E_IO);
    CHECK(ds_vfile_open(nullptr, 0, &out, &bad) == DS_OK && ds_vfile_size(out) == 0);
    unsigned char byte = 0;
    CHECK(ds_vfile_pread(out, &byte, 1, 0) == 0);
    ds_vfile_close(out);
    ds_vfile_close(nullptr);
}

#ifndef _WIN32
void notices_a_file_that_shrinks() {
    Fixture f;
    CHECK(ftruncate(fileno(f.disk), 250000) == 0);
    Bytes out(f.whole.size());
    CHECK(ds_vfile_pread(f.file, out.data(), out.size(), 0) == DS_E_IO);
    auto *stream = static_cast<FILE *>(ds_vfile_stream(f.file));
    if (stream == nullptr) return;
    CHECK(std::fread(out.data(), out.size(), 1, stream) == 0 && std::ferror(stream));
}
#endif

struct Filling {
    Fixture f;
    Bytes a = Bytes(100), b = Bytes(70001);
    ggml_tensor ta{"a", a.data(), a.size()}, tb{"blk.0.b", b.data(), b.size()};
    ds_filler *filler = nullptr;

    explicit Filling(uint64_t chunk, uint64_t size_of_b = 70001) {
        const char *names[] = {"blk.0.b", "a"};
        const uint64_t offsets[] = {50, 0}, sizes[] = {size_of_b, 100};
        CHECK(ds_filler_new(f.file, names, offsets, sizes, 2, chunk, tensor_name, tensor_size, tensor_set, &filler) ==
              DS_OK);
    }
    ~Filling() { ds_filler_free(filler); }
};

void fills_tensors() {
    for (const uint64_t chunk : {0, 1000, 70001, 1 << 20}) {
        Filling x(chunk);
        ds_fill_tensor(&x.ta, x.filler);
        ds_fill_tensor(&x.tb, x.filler);
        CHECK(ds_filler_error(x.filler, nullptr, 0) == DS_OK && ds_filler_count(x.filler) == 2);
        CHECK(std::memcmp(x.a.data(), x.f.whole.data(), 100) == 0);
        CHECK(std::memcmp(x.b.data(), x.f.whole.data() + 50, 70001) == 0);
    }
}

void keeps_the_first_error_of_a_filling() {
    char name[4];
    Filling x(0);
    ggml_tensor unknown{"blk.9.x", x.a.data(), 100};
    ds_fill_tensor(&unknown, x.filler);
    ds_fill_tensor(&x.ta, x.filler);
    CHECK(ds_filler_error(x.filler, name, sizeof name) == DS_E_NAME && std::string(name) == "blk");
    CHECK(ds_filler_count(x.filler) == 0 && x.a == Bytes(100));
    Filling y(0, 70000);
    ds_fill_tensor(&y.tb, y.filler);
    CHECK(ds_filler_error(y.filler, nullptr, 0) == DS_E_SIZE);

    const char *names[] = {"a", "a"};
    const uint64_t sizes[] = {10, 10}, offsets[] = {0, 1}, far[] = {0, 170120}, wrap[] = {0, UINT64_MAX - 4};
    ds_filler *out = nullptr;
    const auto make = [&](const uint64_t *at) {
        return ds_filler_new(x.f.file, names, at, sizes, 2, 0, tensor_name, tensor_size, tensor_set, &out);
    };
    CHECK(make(offsets) == DS_E_NAME && make(far) == DS_E_RANGE && make(wrap) == DS_E_RANGE && out == nullptr);
}

}  // namespace

void test_file() {
    reads_what_an_array_holds();
    streams_like_a_file();
    reads_on_several_threads();
    refuses_what_is_not_there();
#ifndef _WIN32
    notices_a_file_that_shrinks();
#endif
    fills_tensors();
    keeps_the_first_error_of_a_filling();
}
