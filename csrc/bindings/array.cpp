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
    capsule_ =
        device.first == dlpack::kCuda ? array.attr("__dlpack__")(py::arg("stream") = -1) : array.attr("__dlpack__")();
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor"))
        tensor_ = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))->tensor;
    else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned"))
        tensor_ =
            static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"))->tensor;
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

}  // namespace sttm
