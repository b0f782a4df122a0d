// Arrays as arguments of the bindings: whatever speaks DLPack (PyTorch, CuPy, NumPy, JAX), read in place.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "dlpack.hpp"

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

}  // namespace sttm

namespace pybind11::detail {

template <>
struct type_caster<sttm::Array> {
    PYBIND11_TYPE_CASTER(sttm::Array, const_name("array"));
    bool load(handle object, bool) { return value.from(object); }
};

}  // namespace pybind11::detail
