// Threads of the CPU kernels, for ThreadSanitizer: callers that take turns and callers at once, and verbs whose tasks
// write beside each other. Prints "passed" if every call found what one thread finds.
#include <cstdio>
#include <thread>
#include <vector>

#include "../csrc/cpu/pool.hpp"
#include "sttm/arguments.hpp"

namespace sttm::cpu::baseline {
void assign(const AssignArguments&, Stream);
void match(const MatchArguments&, Stream);
void merge(const MergeArguments&, Stream);
}  // namespace sttm::cpu::baseline

using namespace sttm;

namespace {

bool counts(int threads) {
    bool right = true;
    for (int tasks : {1, 2, 7, 100}) {
        std::vector<int> done(tasks), at_slot(threads);
        struct {
            std::vector<int>*done, *at_slot;
        } context{&done, &at_slot};
        cpu::parallel(
            tasks, threads,
            [](const void* given, int64_t task, int slot) {
                const auto& to = *static_cast<const decltype(context)*>(given);
                ++(*to.done)[task];
                ++(*to.at_slot)[slot];  // no other thread has this slot
            },
            &context);
        int sum = 0;
        for (int times : at_slot) sum += times;
        right = right && sum == tasks && done == std::vector<int>(tasks, 1);
    }
    return right;
}

constexpr int B = 3, N = 200, D = 37, C = 90, K = 20, r = 70;

std::vector<float> numbers(int count) {
    std::vector<float> found(count);
    uint32_t state = 1;
    for (float& value : found)
        value = static_cast<float>((state = state * 1664525 + 1013904223) >> 8) / (1 << 24) - 0.5f;
    return found;
}

// match, merge along it, and assign: everything that they write.
std::vector<float> verbs(int threads) {
    static const std::vector<float> metric = numbers(B * N * D), x = numbers(B * N * C);
    constexpr int groups = N - r;
    std::vector<int32_t> index(B * N), order(B * N), offsets(B * (groups + 1)), partner(B * N), chosen(B * N);
    std::vector<float> score(B * N), y(B * groups * C), size(B * groups), mass(B * groups), best(B * N), lse(B * N);
    const Metric tokens{metric.data(), 1, N * D, 0, D, 1};
    MatchArguments m{};
    m.B = B, m.N = N, m.D = D, m.metric = tokens, m.windows = 1, m.num_src = m.num_dst = N / 2, m.r = r;
    m.score = score.data(), m.index = index.data(), m.order = order.data(), m.offsets = offsets.data();
    m.partner = partner.data();
    cpu::baseline::match(m, Stream{threads});
    cpu::release();
    MergeArguments g{};
    g.B = B, g.N = N, g.K = groups, g.C = C, g.x = Rows{x.data(), N * C, C, 1}, g.index = index.data();
    g.order = order.data(), g.offsets = offsets.data();
    g.y = y.data(), g.size_out = size.data(), g.mass_out = mass.data();
    cpu::baseline::merge(g, Stream{threads});
    cpu::release();
    AssignArguments a{};
    a.inverse_temperature = 1, a.B = B, a.N = N, a.K = K, a.D = D, a.q = tokens, a.meta = tokens;
    a.index = chosen.data(), a.score = best.data(), a.lse = lse.data();
    cpu::baseline::assign(a, Stream{threads});
    cpu::release();
    std::vector<float> all;
    for (const auto* part : {&score, &y, &size, &mass, &best, &lse}) all.insert(all.end(), part->begin(), part->end());
    for (const auto* part : {&index, &order, &offsets, &chosen}) all.insert(all.end(), part->begin(), part->end());
    return all;
}

}  // namespace

int main() {
    const std::vector<float> expected = verbs(1);
    bool right = true;
    for (int threads : {2, 4}) right = right && counts(threads) && verbs(threads) == expected;
    std::vector<char> each(3, 0);
    std::vector<std::thread> callers;
    for (char& one : each)
        callers.emplace_back([&one, &expected] {
            one = 1;
            for (int i = 0; i < 5; ++i) one = one && counts(3) && verbs(3) == expected;
        });
    for (std::thread& caller : callers) caller.join();
    for (char one : each) right = right && one;
    std::puts(right ? "passed" : "failed");
    return right ? 0 : 1;
}
