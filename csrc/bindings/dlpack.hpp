// The part of the DLPack ABI, version 1, that reading arrays takes (https://dmlc.github.io/dlpack). Layouts are fixed
// by that standard; names are ours.
#pragma once

#include <cstdint>

namespace sttm::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1, kCuda = 2, kCudaManaged = 13;
constexpr uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6;

struct Version {
    uint32_t major, minor;
};

struct Device {
    int32_t type, id;
};

struct Type {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t dims;
    Type type;
    int64_t* shape;
    int64_t* strides;  // in elements; null in old versions if the array is dense
    uint64_t byte_offset;
};

// What a capsule "dltensor" holds. The capsule frees it.
struct Managed {
    Tensor tensor;
    void* owner;
    void (*free)(Managed*);
};

// What a capsule "dltensor_versioned" holds.
struct ManagedVersioned {
    Version version;
    void* owner;
    void (*free)(ManagedVersioned*);
    uint64_t flags;
    Tensor tensor;
};

// What the capsule "dlpack_exchange_api" of a type holds, for good.
struct ExchangeApi {
    Version version;
    ExchangeApi* older;
    void* allocate;
    void* managed_from_object;
    void* object_from_managed;
    int (*tensor_from_object)(void* object, Tensor* out);  // borrows; null if the type does not offer it
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace sttm::dlpack
