// Threads and scratch memory of the CPU kernels. Compiled once, for any CPU: the kernels call it, and it calls them
// back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sttm::cpu {

// One of the tasks 0, 1, ... of a call. Tasks that run at the same time have different slots.
using Task = void (*)(const void* context, int64_t task, int slot);

// Runs every task once, on the calling thread and on up to `threads` - 1 others; slots are below `threads`.
//
// The others are PyTorch's, where it has an OpenMP that can be asked. Else, and in a child of fork(), they are the
// package's own, which sleep between calls: the caller takes tasks as they do, so it waits for none that did not wake
// in time, and a call while another one is running does without them.
void parallel(int64_t tasks, int threads, Task run, const void* context);

// Memory, aligned to a cache line, until the next `release` by the calling thread. Throws std::bad_alloc.
void* take(size_t bytes);
void release();

// Bytes from which on a result is memory of its own, fresh from the system: glibc keeps and hands out again what is
// smaller.
constexpr int64_t kFresh = 32 << 20;

// Asks for huge pages behind results that are fresh from the system.
void expect_large(void* data, size_t bytes);

}  // namespace sttm::cpu
