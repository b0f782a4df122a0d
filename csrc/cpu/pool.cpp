#include "pool.hpp"

#include <pthread.h>
#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace sttm::cpu {

namespace {

constexpr std::chrono::microseconds kSpin(30);  // that a thread without work looks for the next call
constexpr size_t kLine = 64;
constexpr size_t kKept = size_t(32) << 20;  // bytes of scratch that a thread keeps from call to call

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Done>
bool spin(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

struct Call {
    Task run;
    const void* context;
    int64_t tasks;
    int slots;
    std::atomic<int64_t> next{0};
    std::atomic<int> active{0};  // threads, beside the caller, that are at its tasks
    std::atomic<int> joined{1};

    void work(int slot) {
        if (slot >= slots) return;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(context, task, slot);
    }
};

class Pool {
public:
    // False, and nothing has happened, if another call is running.
    bool run(Call& call) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            while (threads_ < call.slots - 1 && start()) {
            }
            call_ = &call;
            calls_.fetch_add(1, std::memory_order_release);
            if (sleeping_ > 0) wake_.notify_all();
        }
        call.work(0);
        {
            std::unique_lock<std::mutex> lock(mutex_);
            call_ = nullptr;  // who has not joined by now never will
        }
        const auto idle = [&call] { return call.active.load(std::memory_order_acquire) == 0; };
        if (!spin(idle)) {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, idle);
        } else {
            std::unique_lock<std::mutex> lock(mutex_);  // whoever was last has let go of the call
        }
        busy_.store(false, std::memory_order_release);
        return true;
    }

private:
    bool start() {
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            return false;  // no more threads to be had: those there are, or the caller, do the work
        }
        ++threads_;
        return true;
    }

    void serve() {
        for (uint64_t seen = 0;;) {
            const auto called = [this, &seen] { return calls_.load(std::memory_order_acquire) != seen; };
            spin(called);
            std::unique_lock<std::mutex> lock(mutex_);
            ++sleeping_;
            wake_.wait(lock, called);
            --sleeping_;
            seen = calls_.load(std::memory_order_relaxed);
            Call* const call = call_;
            if (call == nullptr || call->joined.load(std::memory_order_relaxed) >= call->slots) continue;
            const int slot = call->joined.fetch_add(1, std::memory_order_relaxed);
            call->active.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            call->work(slot);
            lock.lock();
            if (call->active.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    std::atomic<uint64_t> calls_{0};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Call* call_ = nullptr;
    int threads_ = 0, sleeping_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};  // never destroyed: its threads may outlive static objects
std::atomic<bool> forked{false};

// The threads of the parent are not those of the child, nor are their locks.
void in_child() {
    the_pool.store(nullptr);
    forked.store(true);
}
const int at_fork = pthread_atfork(nullptr, nullptr, in_child);

// What runs a function on the threads of PyTorch's OpenMP; null if there is none. After each of its operations they
// look for more work for milliseconds, on the cores that other threads would have to share.
using StartTeam = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
StartTeam find_team() {
#if defined(__linux__)
    if (void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD))
        return reinterpret_cast<StartTeam>(dlsym(torch, "GOMP_parallel"));
#endif
    return nullptr;
}

bool run_in_team(Call& call) {
    static const StartTeam start = find_team();
    if (start == nullptr || forked.load(std::memory_order_relaxed)) return false;
    call.joined.store(0, std::memory_order_relaxed);
    // Always all of them, as PyTorch does: those that a smaller team has no use for would end, to be started again.
    start(
        [](void* data) {
            Call& call = *static_cast<Call*>(data);
            call.work(call.joined.fetch_add(1, std::memory_order_relaxed));
        },
        &call, 0, 0);
    return true;
}

Pool& pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found == nullptr) {
        Pool* made = new Pool;
        if (the_pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

class Arena {
public:
    ~Arena() {
        clear();
        std::free(kept_);
    }

    void* take(size_t bytes) {
        bytes = (bytes + kLine - 1) / kLine * kLine + kLine;
        wanted_ += bytes;
        if (used_ + bytes <= capacity_) {
            used_ += bytes;
            return kept_ + used_ - bytes;
        }
        more_.push_back(allocate(bytes));
        if (more_.back() == nullptr) throw std::bad_alloc();
        return more_.back();
    }

    void clear() {
        for (void* block : more_) std::free(block);
        more_.clear();
        const size_t next = wanted_ < kKept ? wanted_ : kKept;
        if (next > capacity_) {
            std::free(kept_);
            capacity_ = 0;
            kept_ = static_cast<char*>(allocate(next));
            capacity_ = kept_ == nullptr ? 0 : next;
        }
        wanted_ = used_ = 0;
    }

private:
    static void* allocate(size_t bytes) {
        void* block = nullptr;
        return posix_memalign(&block, kLine, bytes) == 0 ? block : nullptr;
    }

    char* kept_ = nullptr;
    size_t capacity_ = 0, used_ = 0, wanted_ = 0;
    std::vector<void*> more_;
};

thread_local Arena arena;

}  // namespace

void parallel(int64_t tasks, int threads, Task run, const void* context) {
    if (tasks > 1 && threads > 1) {
        Call call{run, context, tasks, threads < tasks ? threads : static_cast<int>(tasks)};
        if (run_in_team(call) || pool().run(call)) return;
    }
    for (int64_t task = 0; task < tasks; ++task) run(context, task, 0);
}

void expect_large(void* data, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHuge = 2 << 20;
    if (bytes < size_t(kFresh)) return;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: nothing depends on it
#else
    static_cast<void>(data);
    static_cast<void>(bytes);
#endif
}

void* take(size_t bytes) { return arena.take(bytes); }
void release() { arena.clear(); }

}  // namespace sttm::cpu
