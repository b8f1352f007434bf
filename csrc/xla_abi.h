// What a handler sees of XLA's FFI, declared here so that the build needs no jaxlib.
//
// Facts alone (order and types of fields, codes, the rule for versions), under names of our own, from openxla/xla,
// xla/ffi/api/c_api.h and xla/ffi/ffi_registry.cc (Apache-2.0), interface versions 0.1 to 0.3, which agree on
// everything below; jaxlib 0.10.2 carries 0.3. tests/kernels/test_xla_abi.py holds this file against the header of the jaxlib
// that is installed. Structs only grow at their ends, and each says how large it is.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastedit::xla {

constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 3;

enum Type : int32_t { U8 = 6, S32 = 4, S64 = 5, F16 = 10, F32 = 11, BF16 = 16 };
enum Code : int32_t { kInvalidArgument = 3, kResourceExhausted = 8, kOutOfRange = 11, kInternal = 13 };
constexpr int32_t kBuffer = 1;             // of Buffers::kinds
constexpr int32_t kScalar = 3;             // of Attributes::kinds
constexpr int32_t kMetadata = 1;           // of Extension::kind
constexpr uint32_t kCommandBuffer = 1u;    // of Metadata::traits: calls may be captured into a CUDA graph

struct Error;    // XLA's own
struct Context;  // XLA's own

struct Extension {
  size_t size;
  int32_t kind;
  Extension* next;
};

struct Version {
  size_t size;
  Extension* extensions;
  int32_t major, minor;
};

struct CreateError {
  size_t size;
  Extension* extensions;
  const char* message;
  int32_t code;
};

struct GetStream {
  size_t size;
  Extension* extensions;
  Context* context;
  void* stream;  // out: the cudaStream_t
};

struct Api {
  size_t size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*error_message)(void*);
  void (*destroy_error)(void*);
  Error* (*register_handler)(void*);
  Error* (*get_stream)(GetStream*);
};

struct Buffer {
  size_t size;
  Extension* extensions;
  int32_t type;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Buffers {  // arguments and results alike
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  void** items;
};

struct Name {
  const char* text;
  size_t length;
};

struct Scalar {
  int32_t type;
  void* value;
};

struct Attributes {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Name** names;
  void** values;
};

struct CallFrame {
  size_t size;
  Extension* extensions;
  const Api* api;  // null in the metadata query of the oldest versions
  Context* context;
  int32_t stage;
  Buffers arguments, results;
  Attributes attributes;
};

struct Metadata {
  size_t size;
  Version version;  // out: what the handler was built for; XLA refuses one that it does not serve
  uint32_t traits;  // out
};

struct MetadataExtension {
  Extension head;
  Metadata* metadata;
};

using Handler = Error*(CallFrame*);

}  // namespace fastedit::xla
