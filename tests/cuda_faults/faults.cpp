// Kernels with a fault each, and the same kernels without it: what the host harness must find.
// faults NAME right|wrong: exits 0 if the results are what they must be.
#include <cstdio>
#include <cstring>
#include <vector>

#include "sttm/platform.cuh"

using namespace sttm;

constexpr int kThreads = 64;

// out_i = in_(i - 1): thread i reads what thread i - 1 wrote. Running threads in ascending order hides the fault.
__global__ void missing_barrier(const int* in, int* out, bool wrong) {
    STTM_SHARED(int, values, [kThreads]);
    values[threadIdx.x] = in[threadIdx.x];
    if (!wrong) __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

__global__ void off_by_one(const int* in, int* out, bool wrong) {
    for (int i = threadIdx.x; wrong ? i <= kThreads + 7 : i < kThreads; i += kThreads) out[i] = i == 0 ? 0 : in[i - 1];
}

__global__ void shared_overrun(const int* in, int* out, bool wrong) {
    STTM_SHARED(int, values, [kThreads]);
    values[threadIdx.x + (wrong ? 1 : 0)] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

__global__ void dynamic_overrun(const int* in, int* out, bool wrong) {
    int* values = shared_memory<int>();
    values[threadIdx.x + (wrong ? 1 : 0)] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

// Shared memory holds nothing that an earlier block left.
__global__ void unwritten_shared(const int* in, int* out, bool wrong) {
    STTM_SHARED(int, values, [kThreads]);
    if (!wrong || threadIdx.x != 5) values[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

__global__ void early_return(const int* in, int* out, bool wrong) {
    if (wrong && threadIdx.x == 3) return;
    __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : in[threadIdx.x - 1];
}

__global__ void divergent_barrier(const int* in, int* out, bool wrong) {
    if (wrong && threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : in[threadIdx.x - 1];
}

__global__ void divergent_shuffle(const int* in, int* out, bool wrong) {
    const int lane = lane_index();
    int before = 0;
    if (!wrong || lane > 0) before = shuffle_up(in[threadIdx.x], 1);
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : lane == 0 ? in[threadIdx.x - 1] : before;
}

__global__ void misaligned(const int* in, int* out, bool wrong) {
    if (threadIdx.x > 0) out[threadIdx.x] = in[threadIdx.x - 1];
    if (threadIdx.x == 0) Vec<int>::load(in + (wrong ? 1 : 4)).store(out);
    __syncthreads();
    if (threadIdx.x < 4) out[threadIdx.x] = threadIdx.x == 0 ? 0 : in[threadIdx.x - 1];
}

// More static and dynamic shared memory together than a block has unasked, each alone less.
__global__ void unasked_shared(const int* in, int* out, bool) {
    STTM_SHARED(int, values, [10 << 8]);
    values[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

template <class Kernel>
cudaError_t run(Kernel* kernel, const int* in, int* out, bool wrong) {
    constexpr size_t kShared = 42 << 10;
    const Grid grid{2};
    if (kernel != unasked_shared)
        return launch(kernel, grid, kThreads, kThreads * sizeof(int), nullptr, in, out, wrong);
    if (!wrong) return launch(kernel, grid, kThreads, kShared, nullptr, in, out, wrong);
    return host::run(kernel, grid.checked(), dim3(kThreads), kShared, [&] { kernel(in, out, wrong); });
}

int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*kernel)(const int*, int*, bool);
    } faults[] = {{"missing_barrier", missing_barrier},
                  {"off_by_one", off_by_one},
                  {"shared_overrun", shared_overrun},
                  {"dynamic_overrun", dynamic_overrun},
                  {"unwritten_shared", unwritten_shared},
                  {"early_return", early_return},
                  {"divergent_barrier", divergent_barrier},
                  {"divergent_shuffle", divergent_shuffle},
                  {"misaligned", misaligned},
                  {"unasked_shared", unasked_shared}};
    std::vector<int> in(kThreads), out(kThreads, -1);
    for (int i = 0; i < kThreads; ++i) in[i] = 100 + i;
    for (const auto& fault : faults) {
        if (argc < 3 || std::strcmp(argv[1], fault.name) != 0) continue;
        const bool wrong = std::strcmp(argv[2], "wrong") == 0;
        if (run(fault.kernel, in.data(), out.data(), wrong) != cudaSuccess) return 2;
        for (int i = 0; i < kThreads; ++i) {
            if (out[i] == (i == 0 ? 0 : in[i - 1])) continue;
            std::fprintf(stderr, "out[%d] is %d\n", i, out[i]);
            return 1;
        }
        return 0;
    }
    std::fprintf(stderr, "usage: faults NAME right|wrong\n");
    return 3;
}
