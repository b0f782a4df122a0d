#include "validate.hpp"

namespace sttm {

int Validate::extent(const Array& array, const char* name, int dims, int i) {
    if (array.dims() != dims)
        throw py::value_error(std::string(name) + " must have " + std::to_string(dims) + " dimensions, got shape " +
                              array.shape_text());
    if (array.size(i) > INT_MAX / 2)
        throw py::value_error(std::string(name) + " must have extents below 2^30, got shape " + array.shape_text());
    return static_cast<int>(array.size(i));
}

int Validate::groups(int64_t value, const char* name) {
    if (value < 1 || value > INT_MAX / 2)
        throw py::value_error(std::string(name) + " must be at least 1 and below 2^30, got " + std::to_string(value));
    return static_cast<int>(value);
}

DType Validate::dtype(const Array& array, const char* name) {
    const dlpack::Type& type = array.type();
    if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 32) return DType::float32;
    if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 16) return DType::float16;
    if (type.lanes == 1 && type.code == dlpack::kBfloat && type.bits == 16) return DType::bfloat16;
    throw py::type_error(std::string(name) + " must be float32, float16 or bfloat16, got " + array.type_text());
}

void Validate::features(const Array& array, const char* name, DType dtype, Shape shape) {
    check(array, name, dtype == DType::bfloat16 ? dlpack::kBfloat : dlpack::kFloat, dtype == DType::float32 ? 32 : 16,
          shape);
}

Rows Validate::rows(const Array& array, const char* name, DType dtype, Shape shape) {
    features(array, name, dtype, shape);
    return {array.data(), array.stride(0), array.stride(1), array.stride(2)};
}

const void* Validate::item_features(const MaybeArray& array, const char* name, DType dtype, Shape shape,
                                    int64_t& stride_b) {
    stride_b = 0;
    if (!array) return nullptr;
    features(*array, name, dtype, shape);
    stride_b = item_stride(*array, name);
    return array->data();
}

Metric Validate::metric(const Array& array, const char* name, DType dtype, int64_t B, int64_t N, int64_t D) {
    if (array.dims() != 4) {
        features(array, name, dtype, {B, N, D});
        return {array.data(), 1, array.stride(0), 0, array.stride(1), array.stride(2)};
    }
    features(array, name, dtype, {B, kAny, N, D});
    const int heads = extent(array, name, 4, 1);
    return {array.data(), heads, array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
}

int Validate::metric_extent(const Array& array, const char* name, int i) {
    const int dims = array.dims() == 4 ? 4 : 3;
    return extent(array, name, dims, dims - 2 + i);
}

Column Validate::column(const MaybeArray& array, const char* name, int64_t B, int64_t N) {
    if (!array) return {};
    return {strided<float>(*array, name, {B, N}), array->stride(0), array->stride(1)};
}

Mask Validate::mask(const MaybeArray& array, int64_t B, int64_t N) {
    if (!array) return {};
    return {strided<uint8_t>(*array, "mask", {B, N}), array->stride(0), array->stride(1)};
}

Rows Validate::float_rows(const MaybeArray& array, const char* name, int64_t B, int64_t N, int64_t P) {
    if (!array) return {};
    return {strided<const float>(*array, name, {B, N, P}), array->stride(0), array->stride(1), array->stride(2)};
}

void Validate::check(const Array& array, const char* name, uint8_t code, int bits, Shape shape) {
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

void Validate::check_device(const Array& array, const char* name) {
#if defined(STTM_CPU) || defined(STTM_HOST)
    constexpr int32_t kDevice = dlpack::kCpu;
    constexpr const char* kWanted = " must be on the CPU, where this build of the kernels runs";
#else
    constexpr int32_t kDevice = dlpack::kCuda;
    constexpr const char* kWanted = " must be on a CUDA device";
#endif
    const dlpack::Device& device = array.device();
    const bool fits = device.type == kDevice || (kDevice == dlpack::kCuda && device.type == dlpack::kCudaManaged);
    if (!fits)
        throw py::value_error(std::string(name) + kWanted + ", got DLPack device type " + std::to_string(device.type));
    if (first_ == nullptr) {
        first_ = name;
        device_ = device;
    } else if (device.id != device_.id) {
        throw py::value_error(std::string(name) + " must be on the device of " + first_ + ", number " +
                              std::to_string(device_.id) + ", got number " + std::to_string(device.id));
    }
}

void Validate::check_shape(const Array& array, const char* name, Shape shape) {
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

void Validate::check_dense(const Array& array, const char* name) {
    if (!array.is_dense()) throw py::value_error(std::string(name) + " must be contiguous");
}

int64_t Validate::item_stride(const Array& array, const char* name) {
    int64_t step = 1;
    for (int i = array.dims() - 1; i > 0; --i) {
        if (array.size(i) != 1 && array.stride(i) != step && !array.is_empty())
            throw py::value_error(std::string(name) + " must be contiguous within a batch item");
        step *= array.size(i);
    }
    return array.size(0) == 1 ? 0 : array.stride(0);
}

std::string Validate::shapes_text() const {
    std::string text;
    for (int i = 0; i < num_seen_; ++i)
        text += (i ? ", " : " (") + std::string(seen_[i].first) + " " + seen_[i].second->shape_text();
    return text + ")";
}

#if !defined(STTM_CPU)

void Validate::fail(Error error) const {
    throw std::runtime_error(std::string("the CUDA kernels of ") + verb_ + " failed: " + cudaGetErrorString(error) +
                             shapes_text());
}

void Validate::fail(const std::length_error& too_large) const {
    throw py::value_error(std::string("the arrays of ") + verb_ + " are too large: " + too_large.what() +
                          shapes_text());
}

#if defined(STTM_HOST)

Validate::OnDevice::OnDevice(int) {}
Validate::OnDevice::~OnDevice() {}

#else

Validate::OnDevice::OnDevice(int device) {
    int current = 0;
    error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) {
        error = cudaSetDevice(device);
        if (error == cudaSuccess) before = current;
    }
}
Validate::OnDevice::~OnDevice() {
    if (before >= 0) cudaSetDevice(before);
}

#endif  // STTM_HOST

#endif  // STTM_CPU

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
