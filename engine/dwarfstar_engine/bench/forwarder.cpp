// A network between emulated machines: one TUN device each, a one-way delay and a rate.
//
// usage: forwarder DELAY_US MBIT NAME0 NAME1 ...   (root; the kernel has no netem everywhere)
// It makes the devices, prints "ready", and carries IPv4 packets until its standard input ends. The machine a packet is
// for is the last byte of its address, less one. Packets queue behind each other at the sender, where the rate holds,
// then all wait for the same delay, so each sender's queue is in order of time. Packets stay as large as the kernel
// hands them over (with its virtio header: segmentation and checksums are left to whoever would do them last), which
// makes a Gbit/s cheap; their time on the wire is counted in Ethernet frames.
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

namespace {

// What the kernel puts before a packet: struct virtio_net_hdr, whose own header does not compile as C++ everywhere.
struct VirtioHeader {
    uint8_t flags, gso_type;
    uint16_t header_len, gso_size, csum_start, csum_offset;
};
static_assert(sizeof(VirtioHeader) == 10);

constexpr size_t max_packet = 65535 + sizeof(VirtioHeader);
constexpr size_t max_queued_bytes = 4u << 20;  // of one sender; a full queue drops, as a switch does, and TCP slows down
constexpr int64_t frame_overhead = 38;         // preamble, Ethernet header, checksum and gap
constexpr int64_t header_bytes = 52;           // IP and TCP with timestamps, repeated in each segment

struct Packet {
    int64_t due_ns;
    size_t to;
    std::vector<char> bytes;
};

struct Machine {
    int fd = -1;
    int64_t free_ns = 0;  // when its sender has put the last packet on the wire
    size_t queued = 0;
    std::deque<Packet> out;
};

int64_t now_ns() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

int make_device(const char* name) {
    const int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    ifreq request{};
    std::strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0 || ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) < 0) {
        std::perror(name);
        std::exit(1);
    }
    return fd;
}

int64_t wire_bytes(const std::vector<char>& packet) {
    VirtioHeader header;
    std::memcpy(&header, packet.data(), sizeof header);
    const int64_t size = static_cast<int64_t>(packet.size() - sizeof header);
    const int64_t extra = header.gso_size ? std::max<int64_t>(0, (size - 1) / header.gso_size) : 0;
    return size + frame_overhead + extra * (frame_overhead + header_bytes);
}

void take_in(Machine& from, size_t machines, double ns_per_byte, int64_t delay_ns) {
    static char buffer[max_packet];
    for (;;) {
        const ssize_t size = read(from.fd, buffer, sizeof buffer);
        if (size < 0) return;  // nothing more
        const char* ip = buffer + sizeof(VirtioHeader);
        if (size < static_cast<ssize_t>(sizeof(VirtioHeader)) + 20 || (ip[0] >> 4) != 4) continue;
        const size_t to = static_cast<uint8_t>(ip[19]) - 1u;
        if (to >= machines || from.queued + static_cast<size_t>(size) > max_queued_bytes) continue;
        Packet packet{0, to, {buffer, buffer + size}};
        from.free_ns = std::max(from.free_ns, now_ns()) +
                       static_cast<int64_t>(ns_per_byte * static_cast<double>(wire_bytes(packet.bytes)));
        packet.due_ns = from.free_ns + delay_ns;
        from.queued += static_cast<size_t>(size);
        from.out.push_back(std::move(packet));
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 5) return 2;
    const int64_t delay_ns = std::atoll(argv[1]) * 1000;
    const double ns_per_byte = 8000.0 / std::atof(argv[2]);
    std::vector<Machine> machines(static_cast<size_t>(argc - 3));
    std::vector<pollfd> polled{{STDIN_FILENO, POLLIN, 0}};
    for (size_t i = 0; i < machines.size(); ++i) {
        machines[i].fd = make_device(argv[i + 3]);
        polled.push_back({machines[i].fd, POLLIN, 0});
    }
    // A network does not wait for a core: run before everybody else, and wake to the microsecond.
    const sched_param priority{10};
    if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0) std::perror("sched_setscheduler");
    prctl(PR_SET_TIMERSLACK, 1);
    std::puts("ready");
    std::fflush(stdout);
    for (;;) {
        int64_t next = INT64_MAX;
        for (const Machine& machine : machines)
            if (!machine.out.empty()) next = std::min(next, machine.out.front().due_ns);
        timespec wait{};
        if (next != INT64_MAX) {
            const int64_t left = std::max<int64_t>(0, next - now_ns());
            wait = {left / 1'000'000'000, left % 1'000'000'000};
        }
        if (ppoll(polled.data(), polled.size(), next == INT64_MAX ? nullptr : &wait, nullptr) < 0) return 1;
        if (polled[0].revents) return 0;
        const int64_t now = now_ns();
        for (Machine& machine : machines) {
            for (; !machine.out.empty() && machine.out.front().due_ns <= now; machine.out.pop_front()) {
                const Packet& packet = machine.out.front();
                machine.queued -= packet.bytes.size();
                // A device that is not up yet refuses; a lost packet is the network's right.
                [[maybe_unused]] const ssize_t done =
                    write(machines[packet.to].fd, packet.bytes.data(), packet.bytes.size());
            }
        }
        for (size_t i = 0; i < machines.size(); ++i)
            if (polled[i + 1].revents & POLLIN) take_in(machines[i], machines.size(), ns_per_byte, delay_ns);
    }
}
