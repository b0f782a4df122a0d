// Arguments of the bindings: any array that speaks DLPack (PyTorch, CuPy, NumPy, JAX), read in place, and the checks
// on them, whose messages name the argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "dlpack.hpp"
#include "sttm/arguments.hpp"

namespace sttm {

namespace py = pybind11;

// A view of an array. Valid as long as the Python object that it was made of, which the caller's frame holds.
class Array {
public:
    Array() = default;
    // False if the object is no array; throws what an array's own export raises.
    bool from(py::handle object);

    int dims() const { return tensor_.dims; }
    int64_t size(int i) const { return tensor_.shape[i]; }
    int64_t stride(int i) const { return strides_[i]; }
    const dlpack::Device& device() const { return tensor_.device; }
    const dlpack::Type& type() const { return tensor_.type; }
    bool is_empty() const;
    bool is_dense() const;
    void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
    std::string shape_text() const;
    std::string type_text() const;

private:
    bool finish();

    static constexpr int kMaxDims = 8;
    dlpack::Tensor tensor_{};
    std::array<int64_t, kMaxDims> strides_{};
    py::object capsule_;  // keeps the exported view alive where it is not borrowed
};

using MaybeArray = std::optional<Array>;

// Checks the arguments of one call, then runs its kernels: on the device of the arrays, without the GIL.
//
//     Checks checks("unmerge");
//     arguments.x = checks.rows(x, "x", {B, K, C}, arguments.dtype);
//     arguments.index = checks.dense<int32_t>(index, "index", {B, N});
//     checks.run(stream, [&](cudaStream_t s) { return unmerge(arguments, s); });
class Checks {
public:
    static constexpr int64_t kAny = -1;
    using Shape = std::initializer_list<int64_t>;

    explicit Checks(const char* verb) : verb_(verb) {}

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

    template <class Launch>
    void run(uint64_t stream, Launch launch) {
        cudaError_t error;
        try {
            const py::gil_scoped_release release;
            const OnDevice guard(device_.id);
            error = guard.error != cudaSuccess ? guard.error : launch(reinterpret_cast<cudaStream_t>(stream));
        } catch (const std::length_error& too_large) {
            fail(too_large);
        }
        if (error != cudaSuccess) fail(error);
    }

private:
    // Makes a device current, and the former one again at the end.
    struct OnDevice {
        explicit OnDevice(int device);
        ~OnDevice();
        cudaError_t error = cudaSuccess;
        int before = -1;
    };

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
    [[noreturn]] void fail(cudaError_t error) const;
    [[noreturn]] void fail(const std::length_error& too_large) const;
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

namespace pybind11::detail {

template <>
struct type_caster<sttm::Array> {
    PYBIND11_TYPE_CASTER(sttm::Array, const_name("array"));
    bool load(handle object, bool) { return value.from(object); }
};

}  // namespace pybind11::detail
