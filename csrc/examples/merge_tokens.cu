// Merging tokens from C++: needs the headers and the CUDA runtime, no Python.
//
//     nvcc -std=c++17 -O3 -I csrc/include csrc/examples/merge_tokens.cu -o merge_tokens && ./merge_tokens
//
// Every 4 x 4 patch of tokens becomes one: the mean, with token count and mean position. Then all are copied back.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sttm/merge.cuh"
#include "sttm/unmerge.cuh"

namespace {

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "CUDA error: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

// An array on the GPU.
template <class T>
struct OnDevice {
    T* data = nullptr;
    size_t count;

    explicit OnDevice(size_t count) : count(count) { check(cudaMalloc(&data, count * sizeof(T))); }
    explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
        check(cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    OnDevice(const OnDevice&) = delete;
    ~OnDevice() { cudaFree(data); }

    std::vector<T> read() const {
        std::vector<T> values(count);
        check(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
};

}  // namespace

int main() {
    constexpr int B = 2, H = 8, W = 12, S = 4, N = H * W, K = N / (S * S), C = 40, P = 2;
    std::vector<float> x(size_t(B) * N * C), positions(N * P);
    std::vector<int32_t> index(B * N);
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.1f * static_cast<float>(i));
    for (int n = 0; n < N; ++n) {
        const int row = n / W, column = n % W;
        positions[n * P] = static_cast<float>(row);
        positions[n * P + 1] = static_cast<float>(column);
        for (int b = 0; b < B; ++b) index[b * N + n] = row / S * (W / S) + column / S;
    }

    const OnDevice<float> x_(x), positions_(positions);
    const OnDevice<int32_t> index_(index), order(B * N), offsets(B * (K + 1)), other(sttm::kSortRoom * B * N);
    const OnDevice<float> y(size_t(B) * K * C), size_out(B * K), positions_out(B * K * P), mass(B * K);
    const OnDevice<float> copied(size_t(B) * N * C);

    sttm::MergeArguments merge{};
    merge.dtype = sttm::DType::float32;
    merge.reduce = sttm::Reduce::mean;
    merge.B = B, merge.N = N, merge.K = K, merge.C = C, merge.P = P;
    merge.x = {x_.data, int64_t(N) * C, C, 1};
    merge.index = index_.data;
    merge.order = order.data, merge.offsets = offsets.data, merge.other = other.data;
    merge.positions = positions_.data;  // stride_pb = 0: all items have the same
    merge.y = y.data;
    merge.size_out = size_out.data, merge.positions_out = positions_out.data, merge.mass_out = mass.data;
    check(sttm::launch_merge<float>(merge, nullptr));

    sttm::UnmergeArguments unmerge{};
    unmerge.B = B, unmerge.N = N, unmerge.K = K, unmerge.C = C;
    unmerge.x = {y.data, int64_t(K) * C, C, 1};
    unmerge.index = index_.data;
    unmerge.y = copied.data;
    check(sttm::launch_unmerge<float>(unmerge, nullptr));

    // Every token got the mean of its patch.
    const std::vector<float> got = copied.read(), sizes = size_out.read(), places = positions_out.read();
    double worst = 0;
    for (int b = 0; b < B; ++b)
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c) {
                const int corner = n / W / S * S * W + n % W / S * S;
                double mean = 0;
                for (int i = 0; i < S * S; ++i)
                    mean += x[(size_t(b) * N + corner + i / S * W + i % S) * C + c] / (S * S);
                worst = std::fmax(worst, std::fabs(got[(size_t(b) * N + n) * C + c] - mean));
            }
    std::printf("group 4: %g tokens around row %g, column %g; largest error of a feature %.1e\n", sizes[4],
                places[4 * P], places[4 * P + 1], worst);
    return worst < 1e-6 && sizes[4] == 16 && places[4 * P] == 5.5f && places[4 * P + 1] == 5.5f ? 0 : 1;
}
