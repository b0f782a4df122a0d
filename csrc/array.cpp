#include "array.hpp"

#include <cstring>
#include <vector>

namespace sttm {

namespace {

// The exchange API of a Python type, null if it has none; remembers the last type asked about.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    static PyTypeObject* last_type = nullptr;
    static const dlpack::ExchangeApi* last_api = nullptr;
    if (type == last_type) return last_api;
    const dlpack::ExchangeApi* api = nullptr;
    const py::handle handle(reinterpret_cast<PyObject*>(type));
    if (py::hasattr(handle, "__dlpack_c_exchange_api__")) {
        const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
        if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
            api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        while (api != nullptr && api->version.major != dlpack::kMajor) api = api->older;
        if (api != nullptr && api->tensor_from_object == nullptr) api = nullptr;
    }
    // A type that is remembered must not make place for another one at its address.
    Py_INCREF(type);
    Py_XDECREF(last_type);
    last_type = type;
    last_api = api;
    return api;
}

}  // namespace

bool Array::from(py::handle object) {
    if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
        if (api->tensor_from_object(object.ptr(), &tensor_) != 0) throw py::error_already_set();
        return finish();
    }
    if (!py::hasattr(object, "__dlpack__")) return false;
    // PyTorch exports nothing that requires grad.
    py::object array = py::reinterpret_borrow<py::object>(object);
    if (py::hasattr(array, "detach")) array = array.attr("detach")();
    const auto device = array.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    // -1: the caller's stream is the one that wrote the array, there is nothing to wait for.
    capsule_ = device.first == dlpack::kCuda ? array.attr("__dlpack__")(py::arg("stream") = -1)
                                             : array.attr("__dlpack__")();
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor"))
        tensor_ = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))->tensor;
    else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned"))
        tensor_ = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"))
                      ->tensor;
    else
        return false;
    return finish();
}

bool Array::finish() {
    if (tensor_.dims > kMaxDims) throw py::value_error("arrays of more than 8 dimensions are not supported");
    int64_t dense = 1;
    for (int i = tensor_.dims - 1; i >= 0; --i) {
        strides_[i] = tensor_.strides == nullptr ? dense : tensor_.strides[i];
        dense *= tensor_.shape[i];
    }
    return true;
}

bool Array::is_empty() const {
    for (int i = 0; i < dims(); ++i)
        if (size(i) == 0) return true;
    return false;
}

bool Array::is_dense() const {
    int64_t step = 1;
    for (int i = dims() - 1; i >= 0; --i) {
        if (size(i) != 1 && stride(i) != step) return is_empty();
        step *= size(i);
    }
    return true;
}

std::string Array::shape_text() const {
    std::string text = "(";
    for (int i = 0; i < dims(); ++i) text += (i ? ", " : "") + std::to_string(size(i));
    return text + (dims() == 1 ? ",)" : ")");
}

std::string Array::type_text() const {
    const std::string bits = std::to_string(type().bits);
    switch (type().code) {
        case dlpack::kInt: return "int" + bits;
        case dlpack::kUnsigned: return "uint" + bits;
        case dlpack::kFloat: return "float" + bits;
        case dlpack::kBfloat: return "bfloat" + bits;
        case dlpack::kBool: return "bool";
        default: return "a dtype with the DLPack code " + std::to_string(type().code);
    }
}

int Checks::extent(const Array& array, const char* name, int dims, int i) {
    if (array.dims() != dims)
        throw py::value_error(std::string(name) + " must have " + std::to_string(dims) + " dimensions, got shape " +
                              array.shape_text());
    if (array.size(i) > INT_MAX / 2)
        throw py::value_error(std::string(name) + " must have extents below 2^30, got shape " + array.shape_text());
    return static_cast<int>(array.size(i));
}

int Checks::groups(int64_t value, const char* name) {
    if (value < 1 || value > INT_MAX / 2)
        throw py::value_error(std::string(name) + " must be at least 1 and below 2^30, got " + std::to_string(value));
    return static_cast<int>(value);
}

DType Checks::dtype(const Array& array, const char* name) {
    const dlpack::Type& type = array.type();
    if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 32) return DType::float32;
    if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 16) return DType::float16;
    if (type.lanes == 1 && type.code == dlpack::kBfloat && type.bits == 16) return DType::bfloat16;
    throw py::type_error(std::string(name) + " must be float32, float16 or bfloat16, got " + array.type_text());
}

void Checks::features(const Array& array, const char* name, DType dtype, Shape shape) {
    check(array, name, dtype == DType::bfloat16 ? dlpack::kBfloat : dlpack::kFloat, dtype == DType::float32 ? 32 : 16,
          shape);
}

Rows Checks::rows(const Array& array, const char* name, DType dtype, Shape shape) {
    features(array, name, dtype, shape);
    return {array.data(), array.stride(0), array.stride(1), array.stride(2)};
}

const void* Checks::item_features(const MaybeArray& array, const char* name, DType dtype, Shape shape,
                                  int64_t& stride_b) {
    stride_b = 0;
    if (!array) return nullptr;
    features(*array, name, dtype, shape);
    stride_b = item_stride(*array, name);
    return array->data();
}

void Checks::check(const Array& array, const char* name, uint8_t code, int bits, Shape shape) {
    const dlpack::Type& type = array.type();
    if (type.code != code || type.bits != bits || type.lanes != 1) {
        const std::string wanted = code == dlpack::kBool    ? "bool"
                                   : code == dlpack::kInt   ? "int" + std::to_string(bits)
                                   : code == dlpack::kFloat ? "float" + std::to_string(bits)
                                                            : "bfloat16";
        throw py::type_error(std::string(name) + " must be " + wanted + ", got " + array.type_text());
    }
    check_device(array, name);
    check_shape(array, name, shape);
    if (num_seen_ < static_cast<int>(seen_.size())) seen_[num_seen_++] = {name, &array};
}

void Checks::check_device(const Array& array, const char* name) {
#if defined(STTM_HOST)
    constexpr int32_t kDevice = dlpack::kCpu;
    constexpr const char* kWanted = " must be on the CPU, where this build of the kernels runs";
#else
    constexpr int32_t kDevice = dlpack::kCuda;
    constexpr const char* kWanted = " must be on a CUDA device";
#endif
    const dlpack::Device& device = array.device();
    const bool fits = device.type == kDevice || (kDevice == dlpack::kCuda && device.type == dlpack::kCudaManaged);
    if (!fits) throw py::value_error(std::string(name) + kWanted + ", got DLPack device type " +
                                     std::to_string(device.type));
    if (first_ == nullptr) {
        first_ = name;
        device_ = device;
    } else if (device.id != device_.id) {
        throw py::value_error(std::string(name) + " must be on the device of " + first_ + ", number " +
                              std::to_string(device_.id) + ", got number " + std::to_string(device.id));
    }
}

void Checks::check_shape(const Array& array, const char* name, Shape shape) {
    bool fits = array.dims() == static_cast<int>(shape.size());
    int i = 0;
    for (const int64_t size : shape) {
        fits = fits && (size == kAny || array.size(i) == size);
        ++i;
    }
    if (fits) return;
    std::string wanted = "(";
    for (const int64_t size : shape)
        wanted += (wanted.size() > 1 ? ", " : "") + (size == kAny ? "*" : std::to_string(size));
    throw py::value_error(std::string(name) + " must have shape " + wanted + (shape.size() == 1 ? ",)" : ")") +
                          ", got " + array.shape_text());
}

void Checks::check_dense(const Array& array, const char* name) {
    if (!array.is_dense()) throw py::value_error(std::string(name) + " must be contiguous");
}

int64_t Checks::item_stride(const Array& array, const char* name) {
    int64_t step = 1;
    for (int i = array.dims() - 1; i > 0; --i) {
        if (array.size(i) != 1 && array.stride(i) != step && !array.is_empty())
            throw py::value_error(std::string(name) + " must be contiguous within a batch item");
        step *= array.size(i);
    }
    return array.size(0) == 1 ? 0 : array.stride(0);
}

void Checks::fail(cudaError_t error) const {
    throw std::runtime_error(std::string("the CUDA kernels of ") + verb_ + " failed: " + cudaGetErrorString(error) +
                             shapes_text());
}

void Checks::fail(const std::length_error& too_large) const {
    throw py::value_error(std::string("the arrays of ") + verb_ + " are too large: " + too_large.what() +
                          shapes_text());
}

std::string Checks::shapes_text() const {
    std::string text;
    for (int i = 0; i < num_seen_; ++i)
        text += (i ? ", " : " (") + std::string(seen_[i].first) + " " + seen_[i].second->shape_text();
    return text + ")";
}

#if defined(STTM_HOST)

Checks::OnDevice::OnDevice(int) {}
Checks::OnDevice::~OnDevice() {}

#else

Checks::OnDevice::OnDevice(int device) {
    int current = 0;
    error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) {
        error = cudaSetDevice(device);
        if (error == cudaSuccess) before = current;
    }
}
Checks::OnDevice::~OnDevice() {
    if (before >= 0) cudaSetDevice(before);
}

#endif

Reduce reduce_from(const std::string& name) {
    if (name == "mean") return Reduce::mean;
    if (name == "sum") return Reduce::sum;
    if (name == "max") return Reduce::max;
    if (name == "first") return Reduce::first;
    throw py::value_error("reduce must be 'mean', 'sum', 'max' or 'first', got '" + name + "'");
}

Similarity similarity_from(const std::string& name) {
    if (name == "cosine") return Similarity::cosine;
    if (name == "dot") return Similarity::dot;
    if (name == "l2") return Similarity::l2;
    throw py::value_error("similarity must be 'cosine', 'dot' or 'l2', got '" + name + "'");
}

}  // namespace sttm
