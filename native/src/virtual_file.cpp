// A file made of pieces: header bytes in memory, ranges of files on disk, zeros.
//
// Invariants. Extents lie end to end: starts_[i] + size = starts_[i + 1], the last is the size of the whole.
// pread touches no shared state but the byte counter, so it is safe on several threads; only the FILE* has a
// position. Each file descriptor given is duplicated once, so the caller may close its own.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <vector>

#include "dwarfstar_native.h"

#ifdef _WIN32
#include <io.h>
#define NOMINMAX
#include <windows.h>
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace {

constexpr uint64_t MAX_IO = 1ull << 30;         // one read call: Linux moves at most 2 GiB, macOS fails above it
constexpr size_t STREAM_BUFFER = 16 * 1024;     // headers are read in small pieces; each seek to a tensor reads one buffer
constexpr uint64_t MAX_SIZE = 1ull << 62;       // sums of offsets and sizes stay inside int64

#ifdef _WIN32
int duplicate(int fd) { return _dup(fd); }
void close_fd(int fd) { _close(fd); }
int64_t file_size(int fd) { return _filelengthi64(fd); }

// Windows has no pread, but an overlapped read at a given offset on a plain handle is one.
int64_t read_at(int fd, void *buffer, uint64_t n, uint64_t offset) {
    OVERLAPPED at{};
    at.Offset = static_cast<DWORD>(offset);
    at.OffsetHigh = static_cast<DWORD>(offset >> 32);
    DWORD got = 0;
    HANDLE handle = reinterpret_cast<HANDLE>(_get_osfhandle(fd));
    if (!ReadFile(handle, buffer, static_cast<DWORD>(n), &got, &at)) return GetLastError() == ERROR_HANDLE_EOF ? 0 : -1;
    return got;
}
#else
int duplicate(int fd) { return dup(fd); }
void close_fd(int fd) { close(fd); }

int64_t file_size(int fd) {
    struct stat info {};
    return fstat(fd, &info) == 0 ? static_cast<int64_t>(info.st_size) : -1;
}

int64_t read_at(int fd, void *buffer, uint64_t n, uint64_t offset) {
    for (;;) {
        const ssize_t got = pread(fd, buffer, n, static_cast<off_t>(offset));
        if (got >= 0 || errno != EINTR) return got;
    }
}
#endif

}  // namespace

struct ds_vfile {
    std::vector<ds_extent> extents;
    std::vector<uint64_t> starts;  // one more than extents
    std::map<int, int> owned;      // the caller's descriptor → ours
    std::atomic<uint64_t> bytes_read{0};
    FILE *stream = nullptr;
    std::vector<char> stream_buffer;  // glibc ignores a size given without a buffer
    uint64_t position = 0;  // of the stream

    ~ds_vfile() {
        if (stream != nullptr) std::fclose(stream);
        for (const auto &entry : owned) close_fd(entry.second);
    }

    uint64_t size() const { return starts.back(); }

    int32_t add(const ds_extent &given) {
        ds_extent extent = given;
        if (extent.size > MAX_SIZE || extent.offset > MAX_SIZE || size() + extent.size > MAX_SIZE) return DS_E_RANGE;
        if (extent.kind == DS_EXTENT_FILE) {
            auto found = owned.find(extent.fd);
            if (found == owned.end()) {
                const int copy = duplicate(extent.fd);
                if (copy < 0) return DS_E_IO;
                found = owned.emplace(extent.fd, copy).first;
            }
            extent.fd = found->second;
            const int64_t there = file_size(extent.fd);
            if (there < 0) return DS_E_IO;
            if (extent.offset + extent.size > static_cast<uint64_t>(there)) return DS_E_RANGE;
        } else if (extent.kind == DS_EXTENT_MEMORY) {
            if (extent.data == nullptr && extent.size > 0) return DS_E_ARG;
        } else if (extent.kind != DS_EXTENT_ZEROS) {
            return DS_E_ARG;
        }
        extents.push_back(extent);
        starts.push_back(size() + extent.size);
        return DS_OK;
    }

    // n > 0 bytes at `skip` of one extent; n ≤ MAX_IO. How many came, or −1.
    int64_t read_extent(const ds_extent &extent, uint8_t *buffer, uint64_t n, uint64_t skip) const {
        switch (extent.kind) {
            case DS_EXTENT_MEMORY:
                std::memcpy(buffer, static_cast<const uint8_t *>(extent.data) + skip, n);
                return static_cast<int64_t>(n);
            case DS_EXTENT_ZEROS:
                std::memset(buffer, 0, n);
                return static_cast<int64_t>(n);
            default:
                return read_at(extent.fd, buffer, n, extent.offset + skip);
        }
    }

    int64_t read(uint8_t *buffer, uint64_t n, uint64_t offset) {
        if (offset >= size()) return 0;
        n = std::min(n, size() - offset);
        // The extent that holds `offset`: the last that starts at or before it (empty extents are stepped over).
        size_t i = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), offset) - starts.begin()) - 1;
        uint64_t done = 0;
        while (done < n) {
            const uint64_t at = offset + done;
            if (at >= starts[i + 1]) {
                ++i;
                continue;
            }
            const uint64_t want = std::min({n - done, starts[i + 1] - at, MAX_IO});
            const int64_t got = read_extent(extents[i], buffer + done, want, at - starts[i]);
            // Zero bytes inside an extent: the file shrank after it was opened.
            if (got <= 0) return DS_E_IO;
            done += static_cast<uint64_t>(got);
        }
        bytes_read.fetch_add(done, std::memory_order_relaxed);
        return static_cast<int64_t>(done);
    }

    // −1 with errno set, or how many bytes.
    int64_t stream_read(char *buffer, uint64_t n) {
        const int64_t got = read(reinterpret_cast<uint8_t *>(buffer), n, position);
        if (got < 0) {
            errno = EIO;
            return -1;
        }
        position += static_cast<uint64_t>(got);
        return got;
    }

    // The new position, or −1 with errno set. Seeking past the end is allowed and reads nothing, as with files.
    int64_t stream_seek(int64_t offset, int whence) {
        const uint64_t from = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? position : size();
        const int64_t base = static_cast<int64_t>(from);
        const bool known = whence == SEEK_SET || whence == SEEK_CUR || whence == SEEK_END;
        if (!known || offset < -base || offset > static_cast<int64_t>(MAX_SIZE) - base) {
            errno = EINVAL;
            return -1;
        }
        position = static_cast<uint64_t>(base + offset);
        return base + offset;
    }
};

namespace {

#if defined(__linux__)
FILE *open_stream(ds_vfile *file) {
    cookie_io_functions_t functions{};
    functions.read = [](void *cookie, char *buffer, size_t n) -> ssize_t {
        return static_cast<ds_vfile *>(cookie)->stream_read(buffer, n);
    };
    functions.seek = [](void *cookie, off64_t *offset, int whence) -> int {
        const int64_t at = static_cast<ds_vfile *>(cookie)->stream_seek(*offset, whence);
        if (at < 0) return -1;
        *offset = at;
        return 0;
    };
    return fopencookie(file, "rb", functions);
}
#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
FILE *open_stream(ds_vfile *file) {
    return funopen(
        file,
        [](void *cookie, char *buffer, int n) -> int {
            return static_cast<int>(static_cast<ds_vfile *>(cookie)->stream_read(buffer, static_cast<uint64_t>(n)));
        },
        nullptr,
        [](void *cookie, fpos_t offset, int whence) -> fpos_t {
            return static_cast<fpos_t>(static_cast<ds_vfile *>(cookie)->stream_seek(offset, whence));
        },
        nullptr);
}
#else
FILE *open_stream(ds_vfile *) { return nullptr; }
#endif

}  // namespace

extern "C" {

int32_t ds_abi_version(void) { return DS_ABI_VERSION; }

int32_t ds_vfile_open(const ds_extent *extents, size_t n, ds_vfile **out, size_t *bad) {
    if (out == nullptr || bad == nullptr || (extents == nullptr && n > 0)) return DS_E_ARG;
    *out = nullptr;
    *bad = 0;
    try {
        auto file = std::make_unique<ds_vfile>();
        file->extents.reserve(n);
        file->starts.reserve(n + 1);
        file->starts.push_back(0);
        for (size_t i = 0; i < n; ++i) {
            const int32_t status = file->add(extents[i]);
            if (status != DS_OK) {
                *bad = i;
                return status;
            }
        }
        *out = file.release();
        return DS_OK;
    } catch (const std::exception &) {
        return DS_E_MEMORY;
    }
}

void ds_vfile_close(ds_vfile *file) { delete file; }

uint64_t ds_vfile_size(const ds_vfile *file) { return file == nullptr ? 0 : file->size(); }

uint64_t ds_vfile_bytes_read(const ds_vfile *file) {
    return file == nullptr ? 0 : file->bytes_read.load(std::memory_order_relaxed);
}

int64_t ds_vfile_pread(ds_vfile *file, void *buffer, uint64_t n, uint64_t offset) {
    if (file == nullptr || (buffer == nullptr && n > 0)) return DS_E_ARG;
    return file->read(static_cast<uint8_t *>(buffer), n, offset);
}

void *ds_vfile_stream(ds_vfile *file) {
    if (file == nullptr) return nullptr;
    if (file->stream == nullptr) {
        try {
            file->stream_buffer.resize(STREAM_BUFFER);
        } catch (const std::exception &) {
            return nullptr;
        }
        file->stream = open_stream(file);
        if (file->stream != nullptr) std::setvbuf(file->stream, file->stream_buffer.data(), _IOFBF, STREAM_BUFFER);
    }
    return file->stream;
}
}
