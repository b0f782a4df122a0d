// Checks of the arguments of the bindings, whose messages name the argument.
#pragma once

#include <climits>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "array.hpp"
#include "sttm/arguments.hpp"

namespace sttm {

// Checks the arguments of one call, then runs its kernels: on the device of the arrays, without the GIL. On a CPU,
// `stream` is the number of threads.
//
//     Validate validate("unmerge");
//     arguments.x = validate.rows(x, "x", {B, K, C}, arguments.dtype);
//     arguments.index = validate.dense<int32_t>(index, "index", {B, N});
//     validate.run(unmerge, arguments, stream);
class Validate {
public:
    static constexpr int64_t kAny = -1;
    using Shape = std::initializer_list<int64_t>;

    explicit Validate(const char* verb) : verb_(verb) {}

    // An extent of `array` that fits an int.
    int extent(const Array& array, const char* name, int dims, int i);

    // A number of groups.
    int groups(int64_t value, const char* name);

    // Features of any strides. `dtype` is what the first array of a call has and the others must have.
    DType dtype(const Array& array, const char* name);
    void features(const Array& array, const char* name, DType dtype, Shape shape);
    Rows rows(const Array& array, const char* name, DType dtype, Shape shape);

    // Any array whose elements are T (float, int32_t, int64_t, uint8_t for bool), any strides.
    template <class T>
    T* strided(const Array& array, const char* name, Shape shape) {
        check(array, name, code_of<T>(), sizeof(T) * 8, shape);
        return static_cast<T*>(array.data());
    }
    // As `strided`, contiguous; null if there is none. Features are dense<void>, with their dtype.
    template <class T>
    T* dense(const Array& array, const char* name, Shape shape) {
        T* data = strided<T>(array, name, shape);
        check_dense(array, name);
        return data;
    }
    template <class T>
    T* dense(const MaybeArray& array, const char* name, Shape shape) {
        return array ? dense<T>(*array, name, shape) : nullptr;
    }
    void* dense_features(const Array& array, const char* name, DType dtype, Shape shape) {
        features(array, name, dtype, shape);
        check_dense(array, name);
        return array.data();
    }
    void* dense_features(const MaybeArray& array, const char* name, DType dtype, Shape shape) {
        return array ? dense_features(*array, name, dtype, shape) : nullptr;
    }
    // (items, rows, columns) whose items are dense; returns the stride from item to item, which may be 0.
    template <class T>
    T* items(const MaybeArray& array, const char* name, Shape shape, int64_t& stride_b) {
        stride_b = 0;
        if (!array) return nullptr;
        T* data = strided<T>(*array, name, shape);
        stride_b = item_stride(*array, name);
        return data;
    }
    const void* item_features(const MaybeArray& array, const char* name, DType dtype, Shape shape, int64_t& stride_b);

    // What similarity is measured on: (B, N, D), or (B, heads, N, D) for the mean over heads.
    Metric metric(const Array& array, const char* name, DType dtype, int64_t B, int64_t N, int64_t D);
    // Extent i of (N, D), the last dimensions of a metric.
    int metric_extent(const Array& array, const char* name, int i);

    // (B, N) and (B, N, P) in any strides; none if there is no array.
    Column column(const MaybeArray& array, const char* name, int64_t B, int64_t N);
    Mask mask(const MaybeArray& array, int64_t B, int64_t N);
    Rows float_rows(const MaybeArray& array, const char* name, int64_t B, int64_t N, int64_t P);

#if defined(STTM_CPU)
    template <class Arguments>
    void run(void (*verb)(const Arguments&, Stream), const Arguments& arguments, uint64_t threads) {
        const py::gil_scoped_release release;
        verb(arguments, Stream{static_cast<int>(threads)});
    }
#else
    template <class Arguments>
    void run(Error (*verb)(const Arguments&, Stream), const Arguments& arguments, uint64_t stream) {
        Error error;
        try {
            const py::gil_scoped_release release;
            const OnDevice guard(device_.id);
            error = guard.error != cudaSuccess ? guard.error : verb(arguments, reinterpret_cast<Stream>(stream));
        } catch (const std::length_error& too_large) {
            fail(too_large);
        }
        if (error != cudaSuccess) fail(error);
    }
#endif

private:
#if !defined(STTM_CPU)
    // Makes a device current, and the former one again at the end.
    struct OnDevice {
        explicit OnDevice(int device);
        ~OnDevice();
        Error error = cudaSuccess;
        int before = -1;
    };
    [[noreturn]] void fail(Error error) const;
    [[noreturn]] void fail(const std::length_error& too_large) const;
#endif

    template <class T>
    static constexpr uint8_t code_of() {
        using Element = std::remove_const_t<T>;
        if constexpr (std::is_same_v<Element, uint8_t>) return dlpack::kBool;
        return std::is_floating_point_v<Element> ? dlpack::kFloat : dlpack::kInt;
    }
    void check(const Array& array, const char* name, uint8_t code, int bits, Shape shape);
    void check_device(const Array& array, const char* name);
    void check_shape(const Array& array, const char* name, Shape shape);
    void check_dense(const Array& array, const char* name);
    int64_t item_stride(const Array& array, const char* name);
    std::string shapes_text() const;

    const char* verb_;
    dlpack::Device device_{-1, 0};
    const char* first_ = nullptr;
    std::array<std::pair<const char*, const Array*>, 32> seen_{};
    int num_seen_ = 0;
};

Reduce reduce_from(const std::string& name);
Similarity similarity_from(const std::string& name);

}  // namespace sttm
