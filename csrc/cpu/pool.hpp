// Threads and scratch memory of the CPU kernels. Compiled once, for any CPU: the kernels call it, and it calls them back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sttm::cpu {

// One of the tasks 0, 1, ... of a call. Tasks that run at the same time have different slots.
using Task = void (*)(const void* context, int64_t task, int slot);

// Runs every task once, on the calling thread and on up to `threads` - 1 others; slots are below `threads`.
//
// The others sleep between calls. The caller takes tasks as they do, so it waits for none that did not wake in time. A
// call while another one is running, and a child of fork() whose parent had threads, find no threads and make or do
// without them.
void parallel(int64_t tasks, int threads, Task run, const void* context);

// Memory, aligned to a cache line, until the next `release` by the calling thread. Throws std::bad_alloc.
void* take(size_t bytes);
void release();

// Asks for huge pages behind results that are large enough to be memory of their own, fresh from the system.
void expect_large(void* data, size_t bytes);

}  // namespace sttm::cpu
