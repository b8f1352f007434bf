// What the module reads of DLPack 1.3 (https://dmlc.github.io/dlpack): a view of a tensor, the capsules that carry one,
// and the C exchange interface that a tensor's type offers as `__dlpack_c_exchange_api__`. Layouts are the standard's.
#pragma once
#include <cstdint>

namespace fastedit::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  DeviceType type;
  int32_t id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null before 1.2: contiguous
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct Managed {  // in capsules named "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {  // in capsules named "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

struct Exchange {
  Version version;
  Exchange* before;  // the same for an older major version, or null
  int (*allocate)(Tensor*, ManagedVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_of)(void* object, ManagedVersioned** out);
  int (*object_of)(ManagedVersioned*, void** out);
  int (*view)(void* object, Tensor* out);  // owns nothing, waits for nothing; null where the producer has none
  int (*stream)(DeviceType, int32_t id, void** out);
};

}  // namespace fastedit::dlpack
