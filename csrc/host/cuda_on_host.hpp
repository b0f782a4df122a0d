// The CUDA names that the kernels use, for a C++ compiler: runs the very same kernels on the CPU, to test them.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it waits at a barrier or at an
// exchange within its warp, then the next one runs. STTM_HOST_ORDER=forward|reverse|shuffle:<seed> picks the order of
// the fibers between barriers and that of the blocks: results that change with it lack a barrier. Shared memory is
// heap memory of exactly its size, so that AddressSanitizer sees both ends, and holds poison when a block starts.
//
// Stricter than a GPU: blocks are whole warps, every thread takes part in every barrier, and every lane in every
// exchange. What breaks these rules ends the process with a message.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9
};
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    }
    return "unknown error";
}
// Memory of the device is memory of the host, and every launch is over when it returns.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
template <class T>
inline cudaError_t cudaMalloc(T** at, size_t bytes) {
    *at = static_cast<T*>(std::malloc(bytes));
    return *at == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* at) {
    std::free(at);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

#if defined(__x86_64__)
// sttm_host_switch(from, to): keeps the registers that a callee must keep, and the stack, in *from; continues at `to`.
asm(".text\n"
    ".type sttm_host_switch, @function\n"
    "sttm_host_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size sttm_host_switch, .-sttm_host_switch\n");
extern "C" __attribute__((visibility("hidden"))) void sttm_host_switch(void** from, void* to);
#endif

namespace sttm::host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr uint32_t kPoison = 0x7fffffff;  // NaN as float, half and bfloat16; as an index far out of bounds

inline void fail(const char* format, ...) __attribute__((format(printf, 1, 2), noreturn));
inline void fail(const char* format, ...) {
    std::fprintf(stderr, "cuda_on_host: block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    __builtin_va_end(arguments);
    std::fputc('\n', stderr);
    std::abort();
}

struct Site {
    const char* what;
    const char* file;
    int line;
};

enum class State { runnable, at_barrier, in_warp, done };

struct Fiber {
    char* stack = nullptr;
    State state = State::done;
    Site site{};
    unsigned exchanges = 0;
    void* fake_stack = nullptr;
#if defined(__x86_64__)
    void* context = nullptr;
#else
    ucontext_t context{};
#endif
};

struct Warp {
    int arrived = 0;
    Site site{};
    uint64_t slot[2][kWarp];
};

// One launch at a time: whoever runs holds `busy`.
struct Machine {
    std::mutex busy;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    int threads = 0, current = 0, at_barrier = 0;
    Site barrier{};
    uint64_t block_serial = 0;
    char* dynamic_shared = nullptr;
    size_t static_shared = 0;                // of the block
    std::map<const void*, size_t> requests;  // of dynamic shared memory, by kernel
    const std::function<void()>* body = nullptr;
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    size_t stack_bytes = 0;
#if defined(__x86_64__)
    void* context = nullptr;
#else
    ucontext_t context{};
#endif
};
inline Machine machine;

inline void start_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack,
                         [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(keep, stack, bytes);
#endif
}
inline void finish_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** stack,
                          [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(kept, stack, bytes);
#endif
}

template <class Context>
inline void swap(Context& from, Context& to) {
#if defined(__x86_64__)
    sttm_host_switch(&from, to);
#else
    swapcontext(&from, &to);
#endif
}

inline void enter(Fiber& fiber) {
    start_switch(&machine.fake_stack, fiber.stack, kStack);
    swap(machine.context, fiber.context);
    finish_switch(machine.fake_stack, nullptr, nullptr);
}

inline void leave(Fiber& fiber) {
    start_switch(&fiber.fake_stack, machine.stack, machine.stack_bytes);
    swap(fiber.context, machine.context);
    finish_switch(fiber.fake_stack, &machine.stack, &machine.stack_bytes);
}

// A fiber runs one thread after another, for ever.
inline void fiber_main() {
    finish_switch(nullptr, &machine.stack, &machine.stack_bytes);
    for (;;) {
        (*machine.body)();
        Fiber& fiber = *machine.fibers[machine.current];
        fiber.state = State::done;
        leave(fiber);
    }
}

inline std::unique_ptr<Fiber> make_fiber() {
    auto fiber = std::make_unique<Fiber>();
    const size_t guard = 4096;
    void* memory = mmap(nullptr, kStack + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) fail("no memory for the stack of a thread");
    fiber->stack = static_cast<char*>(memory) + guard;
#if defined(__x86_64__)
    // Six registers and the address that sttm_host_switch returns to, placed as if fiber_main had just been called.
    auto top = reinterpret_cast<uint64_t*>(fiber->stack + kStack) - 2;
    top[0] = reinterpret_cast<uint64_t>(&fiber_main);
    fiber->context = top - 6;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    makecontext(&fiber->context, fiber_main, 0);
#endif
    return fiber;
}

inline void poison(void* memory, size_t bytes) {
    auto at = static_cast<char*>(memory);
    for (size_t i = 0; i < bytes; i += sizeof(kPoison))
        std::memcpy(at + i, &kPoison, bytes - i < sizeof(kPoison) ? bytes - i : sizeof(kPoison));
}

inline char* shared_block(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) fail("no memory for %zu bytes of shared memory", bytes);
    return static_cast<char*>(memory);
}

// A shared variable of type T (an array): poisoned at its first use in each block.
template <class T>
class Shared {
public:
    Shared() : memory_(shared_block(sizeof(T))) {}
    T& get() {
        if (serial_ != machine.block_serial) {
            poison(memory_, sizeof(T));
            serial_ = machine.block_serial;
            machine.static_shared += sizeof(T);
        }
        return *reinterpret_cast<T*>(memory_);
    }

private:
    char* memory_;
    uint64_t serial_ = 0;
};

inline bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

inline void wait_for_block(Site site) {
    Fiber& fiber = *machine.fibers[machine.current];
    if (machine.at_barrier == 0) machine.barrier = site;
    if (!same(machine.barrier, site))
        fail("threads wait at different barriers: %s:%d and %s:%d", machine.barrier.file, machine.barrier.line,
             site.file, site.line);
    fiber.site = site;
    if (++machine.at_barrier == machine.threads) {
        machine.at_barrier = 0;
        for (int t = 0; t < machine.threads; ++t) machine.fibers[t]->state = State::runnable;
        return;
    }
    fiber.state = State::at_barrier;
    leave(fiber);
}

// Gives `value` to the warp; returns what all lanes gave, once all have.
inline const uint64_t* exchange(uint64_t value, Site site) {
    Fiber& fiber = *machine.fibers[machine.current];
    const int first = machine.current / kWarp * kWarp, lane = machine.current - first;
    Warp& warp = machine.warps[machine.current / kWarp];
    uint64_t* slot = warp.slot[fiber.exchanges++ % 2];
    if (warp.arrived == 0) warp.site = site;
    if (!same(warp.site, site) || std::strcmp(warp.site.what, site.what) != 0)
        fail("lanes of a warp meet in different places: %s (%s:%d) and %s (%s:%d)", warp.site.what, warp.site.file,
             warp.site.line, site.what, site.file, site.line);
    slot[lane] = value;
    fiber.site = site;
    if (++warp.arrived == kWarp) {
        warp.arrived = 0;
        for (int l = 0; l < kWarp; ++l) machine.fibers[first + l]->state = State::runnable;
    } else {
        fiber.state = State::in_warp;
        leave(fiber);
    }
    return slot;
}

template <class T>
inline uint64_t to_bits(T value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a lane gives up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

class Order {
public:
    Order() {
        const char* given = std::getenv("STTM_HOST_ORDER");
        const std::string name = given == nullptr ? "forward" : given;
        reverse_ = name == "reverse";
        shuffle_ = name.rfind("shuffle:", 0) == 0;
        if (shuffle_) random_.seed(static_cast<uint32_t>(std::strtoul(name.c_str() + 8, nullptr, 10)));
        if (!reverse_ && !shuffle_ && name != "forward")
            fail("STTM_HOST_ORDER must be forward, reverse or shuffle:<seed>, got %s", name.c_str());
    }
    void fill(std::vector<int64_t>& order, int64_t count) {
        order.resize(count);
        for (int64_t i = 0; i < count; ++i) order[i] = reverse_ ? count - 1 - i : i;
        shuffle(order);
    }
    void shuffle(std::vector<int64_t>& order) {
        if (!shuffle_) return;
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
    }

private:
    bool reverse_, shuffle_;
    std::minstd_rand random_;
};

[[noreturn]] inline void fail_stuck() {
    int done = 0;
    const Fiber* waiting = nullptr;
    for (int t = 0; t < machine.threads; ++t) {
        const Fiber& fiber = *machine.fibers[t];
        done += fiber.state == State::done;
        if (fiber.state != State::done && waiting == nullptr) waiting = &fiber;
    }
    fail("a thread waits for ever at %s (%s:%d): of %d threads %d are at a barrier and %d have returned",
         waiting->site.what, waiting->site.file, waiting->site.line, machine.threads, machine.at_barrier, done);
}

inline void run_block(Order& order, std::vector<int64_t>& threads) {
    for (int t = 0; t < machine.threads; ++t) {
        machine.fibers[t]->state = State::runnable;
        machine.fibers[t]->exchanges = 0;
    }
    machine.at_barrier = 0;
    machine.warps.assign(machine.threads / kWarp, Warp());
    for (int done = 0; done < machine.threads;) {
        bool progress = false;
        order.shuffle(threads);
        for (const int64_t t : threads) {
            Fiber& fiber = *machine.fibers[t];
            if (fiber.state != State::runnable) continue;
            const unsigned i = static_cast<unsigned>(t);
            threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
            machine.current = static_cast<int>(t);
            enter(fiber);
            progress = true;
            done += fiber.state == State::done;
        }
        if (!progress) fail_stuck();
    }
}

template <class Kernel>
inline const void* address(Kernel* kernel) {
    return reinterpret_cast<const void*>(kernel);
}

// How much shared memory a block has unasked, static and dynamic together, and how much at most.
constexpr size_t kUnasked = 48 << 10, kMostShared = 227 << 10;

template <class Kernel>
inline cudaError_t run(Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(machine.busy);
    const size_t threads = size_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || shared_bytes > kMostShared || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (threads % kWarp != 0) fail("a block must be whole warps, got %zu threads", threads);
    while (machine.fibers.size() < threads) machine.fibers.push_back(make_fiber());
    machine.threads = static_cast<int>(threads);
    machine.body = &body;
    blockDim = block;
    gridDim = grid;
    const std::unique_ptr<char, decltype(&std::free)> shared(shared_block(shared_bytes), &std::free);
    machine.dynamic_shared = shared.get();
    Order order;
    std::vector<int64_t> blocks, thread_order;
    order.fill(blocks, int64_t(grid.x) * grid.y * grid.z);
    order.fill(thread_order, static_cast<int64_t>(threads));
    for (const int64_t b : blocks) {
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y)};
        ++machine.block_serial;
        poison(shared.get(), shared_bytes);
        machine.static_shared = 0;
        run_block(order, thread_order);
        const size_t all = machine.static_shared + shared_bytes;
        if (all > kMostShared || (all > kUnasked && shared_bytes > machine.requests[address(kernel)]))
            fail("%zu bytes of shared memory, %zu of them static, are more than was asked for", all,
                 machine.static_shared);
    }
    return cudaSuccess;
}

}  // namespace sttm::host

template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (static_cast<size_t>(bytes) > sttm::host::kMostShared) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(sttm::host::machine.busy);
    sttm::host::machine.requests[sttm::host::address(kernel)] = bytes;
    return cudaSuccess;
}

#define STTM_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(STTM_HOST_SITE) { sttm::host::wait_for_block({"__syncthreads", file, line}); }
inline void __syncwarp(STTM_HOST_SITE) { sttm::host::exchange(0, {"__syncwarp", file, line}); }
inline void __threadfence() {}

template <class T>
inline T atomicAdd(T* at, T value) {
    static_assert(std::is_integral_v<T>, "sums of floats need an order, so no atomics");
    const T old = *at;
    *at += value;
    return old;
}

template <class T>
inline T atomicMax(T* at, T value) {
    static_assert(std::is_integral_v<T>, "no atomics of floats");
    const T old = *at;
    if (old < value) *at = value;
    return old;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) { return sttm::host::from_bits<unsigned>(sttm::host::to_bits(value)); }
inline float __uint_as_float(unsigned value) { return sttm::host::from_bits<float>(sttm::host::to_bits(value)); }

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // A half with its exponent field in that of a float is 2^112 times too small, subnormal or not.
    const float magnitude = __uint_as_float(rest << 13) * __uint_as_float((127u + 112u) << 23);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}
inline __half __float2half_rn(float value) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (!(magnitude == magnitude)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 6.103515625e-05f) {
        // Below 2^-14 a half counts multiples of 2^-24: adding 2^-1 as a float rounds to them.
        const uint32_t count = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);
        return {static_cast<uint16_t>(sign | count)};
    }
    uint32_t bits = __float_as_uint(magnitude);
    bits += 0xfff + (bits >> 13 & 1);
    return {static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13)};
}
