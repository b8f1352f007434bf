// Each kernel of kernels/abi.h as an XLA FFI handler, for JAX on CPUs and NVIDIA GPUs.
//
// A call brings buffers, in the order in which `read` asks for them, and attributes by name: the sizes, and two
// bit masks of the arguments given and the results wanted (absent ones are null pointers in abi.h). Each buffer's
// dtype and size are checked against the attributes, so that no call can make a kernel leave its memory; which
// arguments go together is checked by fastedit/jax. Rows are contiguous, since XLA's buffers are. Nothing is
// allocated: a backward's workspace is one more result. No <string>: this file compiles in a moment.
#include "xla.h"

#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "abi.h"
#include "slots.h"

namespace fastedit {
namespace {

const char* name_of(int32_t type) {
  switch (type) {
    case xla::F32: return "float32";
    case xla::BF16: return "bfloat16";
    case xla::F16: return "float16";
    case xla::S32: return "int32";
    case xla::U8: return "uint8";
    default: return "another dtype";
  }
}

int32_t type_of(int dtype) {
  constexpr int32_t kTypes[] = {xla::F32, xla::BF16, xla::F16};
  return dtype >= F32 && dtype <= F16 ? kTypes[dtype] : -1;
}

class Call {
 public:
  explicit Call(const xla::CallFrame& frame)
      : frame_(frame), given_{frame.arguments, 0, 0, 0}, wanted_{frame.results, 0, 0, 0} {
    if (frame.size < sizeof(xla::CallFrame)) {
      refuse(xla::kInternal, "XLA's call frame has %zu bytes, expected %zu: this jaxlib is too old", frame.size,
             sizeof(xla::CallFrame));
      return;
    }
    given_.mask = integer("given");
    wanted_.mask = integer("wanted");
  }

  bool refused() const { return error_ != nullptr; }
  xla::Error* error() const { return error_; }

  void refuse(int32_t code, const char* format, ...) {
    if (error_) return;  // the first fault is the one to tell
    char message[256];
    va_list values;
    va_start(values, format);
    std::vsnprintf(message, sizeof message, format, values);
    va_end(values);
    xla::CreateError create{sizeof create, nullptr, message, code};
    error_ = frame_.api->create_error(&create);
  }

  int64_t integer(const char* name) {
    int64_t value = 0;
    attribute(name, xla::S64, &value, sizeof value);
    return value;
  }
  float real(const char* name) {
    float value = 0;
    attribute(name, xla::F32, &value, sizeof value);
    return value;
  }

  const void* rows(const char* name, int dtype, int64_t count) { return next(given_, name, type_of(dtype), count); }
  const float* floats(const char* name, int64_t count) {
    return static_cast<const float*>(next(given_, name, xla::F32, count));
  }
  const int32_t* integers(const char* name, int64_t count) {
    return static_cast<const int32_t*>(next(given_, name, xla::S32, count));
  }
  void* rows_out(const char* name, int dtype, int64_t count) { return next(wanted_, name, type_of(dtype), count); }
  float* floats_out(const char* name, int64_t count) {
    return static_cast<float*>(next(wanted_, name, xla::F32, count));
  }
  // Of any size from `bytes` on: one call site serves platforms that need different workspaces.
  void* workspace(int64_t bytes) {
    const bool present = wanted_.mask >> wanted_.bit & 1;
    if (!present && bytes > 0) refuse(xla::kInvalidArgument, "no workspace, expected %lld bytes", ll(bytes));
    return next(wanted_, "workspace", xla::U8, bytes, true);
  }

  void* stream() {
    xla::GetStream get{sizeof get, nullptr, frame_.context, nullptr};
    if (!error_) error_ = frame_.api->get_stream(&get);
    return get.stream;
  }

  void all_read() {
    for (const List* list : {&given_, &wanted_}) {
      if (list->at == list->buffers.count) continue;
      refuse(xla::kInvalidArgument, "the call has %lld buffers, expected %lld", ll(list->buffers.count), ll(list->at));
    }
  }

  void finish(int status) {
    if (status == -1) refuse(xla::kResourceExhausted, "no memory for the sums of a backward");
    if (status) refuse(xla::kInternal, "native kernel failed with CUDA error %d", status);
  }

 private:
  struct List {
    const xla::Buffers& buffers;
    int64_t mask;
    int bit;
    int64_t at;
  };

  static long long ll(int64_t value) { return value; }

  void* next(List& from, const char* name, int32_t type, int64_t count, bool or_more = false) {
    const bool present = from.mask >> from.bit++ & 1;
    if (!present || error_) return nullptr;
    if (from.at >= from.buffers.count || from.buffers.kinds[from.at] != xla::kBuffer) {
      refuse(xla::kInvalidArgument, "%s is missing", name);
      return nullptr;
    }
    const auto* buffer = static_cast<const xla::Buffer*>(from.buffers.items[from.at++]);
    int64_t found = 1;
    for (int64_t i = 0; i < buffer->rank; ++i) found *= buffer->dims[i];
    if (buffer->type != type) {
      refuse(xla::kInvalidArgument, "%s is %s, expected %s", name, name_of(buffer->type), name_of(type));
    } else if (or_more ? found < count : found != count) {
      refuse(xla::kInvalidArgument, "%s has %lld elements, expected %lld", name, ll(found), ll(count));
    }
    return buffer->data;
  }

  void attribute(const char* name, int32_t type, void* value, size_t size) {
    if (error_) return;
    const xla::Attributes& all = frame_.attributes;
    for (int64_t i = 0; i < all.count; ++i) {
      const xla::Name& found = *all.names[i];
      if (found.length != std::strlen(name) || std::memcmp(found.text, name, found.length)) continue;
      const auto* scalar = static_cast<const xla::Scalar*>(all.values[i]);
      if (all.kinds[i] != xla::kScalar || scalar->type != type) break;
      std::memcpy(value, scalar->value, size);
      return;
    }
    refuse(xla::kInvalidArgument, "attribute %s is missing or of another type", name);
  }

  const xla::CallFrame& frame_;
  List given_, wanted_;
  xla::Error* error_ = nullptr;
};

struct Size {
  int64_t rows, width, rank, slots, elements, projections;
};

Size read_size(Call& call) {
  Size n{call.integer("rows"), call.integer("width"), call.integer("rank"), call.integer("slots"), 0, 0};
  if (n.rows < 0 || n.width < 0 || n.slots < 1) call.refuse(xla::kInvalidArgument, "a size is negative");
  if (n.rank < 0 || n.rank > kMaxRank) {
    call.refuse(xla::kInvalidArgument, "rank is %d, the kernels take 0 to %d", static_cast<int>(n.rank),
                static_cast<int>(kMaxRank));
  }
  n.elements = n.rows * n.width;
  n.projections = n.rows * n.rank;
  return n;
}

int read_dtype(Call& call, const char* name) {
  const int64_t dtype = call.integer(name);
  if (dtype < F32 || dtype > F16) call.refuse(xla::kInvalidArgument, "%s is not float32, bfloat16 or float16", name);
  return static_cast<int>(dtype);
}

// The pairs that kernels/cpu has; kernels/cuda has them all.
void check_dtypes(Call& call, int narrow, int wide) {
  if (narrow == wide || (narrow == BF16 && wide == F32)) return;
  call.refuse(xla::kInvalidArgument, "%s beside %s rows, expected one dtype, or bfloat16 beside float32",
              name_of(type_of(narrow)), name_of(type_of(wide)));
}

void read(Call& call, Form& form, const Size& n) {
  const int64_t shared = call.integer("shared_strength");
  form.scale = call.floats("scale", n.slots * n.width);
  form.bias = call.floats("bias", n.slots * n.width);
  form.read = call.floats("read", n.slots * n.rank * n.width);
  form.offset = call.floats("offset", n.slots * n.rank);
  form.write = call.floats("write", n.slots * n.rank * n.width);
  form.rank = n.rank;
  form.slots = n.slots;
  form.slot = call.integers("slot", n.rows);
  form.coefficient = call.floats("strength", shared ? 1 : n.rows);
  form.coefficient_stride = shared ? 0 : 1;
}

void read(Call& call, FormGrad& grad, const Size& n) {
  grad.scale = call.floats_out("d_scale", n.slots * n.width);
  grad.bias = call.floats_out("d_bias", n.slots * n.width);
  grad.read = call.floats_out("d_read", n.slots * n.rank * n.width);
  grad.offset = call.floats_out("d_offset", n.slots * n.rank);
  grad.write = call.floats_out("d_write", n.slots * n.rank * n.width);
  grad.coefficient = call.floats_out("d_strength", n.rows);
}

void read(Call& call, SlotOrder& order, const Size& n) {
  order.order = call.integers("order", n.rows);
  order.first = call.integers("first", n.slots + 1);
  order.block_first = call.integers("block_first", n.slots + 1);
}

void read(Call& call, EditArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.hidden_stride = n.width;
  a.dtype = read_dtype(call, "dtype");
  a.hidden = call.rows("hidden", a.dtype, n.elements);
  read(call, a.form, n);
  a.out = call.rows_out("out", a.dtype, n.elements);
  a.z = call.floats_out("z", n.projections);
}

Size read(Call& call, EditAddArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.x_stride = a.residual_stride = n.width;
  a.x_dtype = read_dtype(call, "dtype");
  a.residual_dtype = read_dtype(call, "residual_dtype");
  check_dtypes(call, a.x_dtype, a.residual_dtype);
  a.on_sum = static_cast<int>(call.integer("on_sum"));
  a.x = call.rows("x", a.x_dtype, n.elements);
  a.residual = call.rows("residual", a.residual_dtype, n.elements);
  read(call, a.form, n);
  a.out = call.rows_out("out", a.residual_dtype, n.elements);
  a.z = call.floats_out("z", n.projections);
  return n;
}

void read(Call& call, EditAddNormArgs& a) {
  const Size n = read(call, a.add);
  a.kind = static_cast<int>(call.integer("kind"));
  a.eps = call.real("eps");
  a.weight = call.rows("weight", a.add.residual_dtype, n.width);
  a.norm_bias = call.rows("norm_bias", a.add.residual_dtype, n.width);
  a.normed = call.rows_out("normed", a.add.residual_dtype, n.elements);
  a.mean = call.floats_out("mean", n.rows);
  a.rstd = call.floats_out("rstd", n.rows);
}

void read(Call& call, EditBackwardArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.grad_stride = a.hidden_stride = a.residual_stride = n.width;
  a.hidden_dtype = read_dtype(call, "dtype");
  a.grad_dtype = read_dtype(call, "residual_dtype");
  check_dtypes(call, a.hidden_dtype, a.grad_dtype);
  a.grad = call.rows("grad", a.grad_dtype, n.elements);
  a.hidden = call.rows("hidden", a.hidden_dtype, n.elements);
  a.residual = call.rows("residual", a.hidden_dtype, n.elements);
  read(call, a.form, n);
  a.grad_z = call.floats("grad_z", n.projections);
  a.z = call.floats("z", n.projections);
  read(call, a.slot_order, n);
  a.d_hidden = call.rows_out("d_hidden", a.hidden_dtype, n.elements);
  read(call, a.d_form, n);
}

void read(Call& call, EditAddNormBackwardArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.grad_residual_stride = a.grad_normed_stride = a.x_stride = a.residual_stride = n.width;
  a.x_dtype = read_dtype(call, "dtype");
  a.residual_dtype = read_dtype(call, "residual_dtype");
  check_dtypes(call, a.x_dtype, a.residual_dtype);
  a.on_sum = static_cast<int>(call.integer("on_sum"));
  a.kind = static_cast<int>(call.integer("kind"));
  a.grad_residual = call.rows("grad_residual", a.residual_dtype, n.elements);
  a.grad_normed = call.rows("grad_normed", a.residual_dtype, n.elements);
  a.residual_out = call.rows("residual_out", a.residual_dtype, n.elements);
  a.x = call.rows("x", a.x_dtype, n.elements);
  a.residual = call.rows("residual", a.residual_dtype, n.elements);
  read(call, a.form, n);
  a.weight = call.rows("weight", a.residual_dtype, n.width);
  a.mean = call.floats("mean", n.rows);
  a.rstd = call.floats("rstd", n.rows);
  a.grad_z = call.floats("grad_z", n.projections);
  a.z = call.floats("z", n.projections);
  read(call, a.slot_order, n);
  a.d_x = call.rows_out("d_x", a.x_dtype, n.elements);
  a.d_residual = call.rows_out("d_residual", a.residual_dtype, n.elements);
  read(call, a.d_form, n);
  a.d_weight = call.floats_out("d_weight", n.width);
  a.d_norm_bias = call.floats_out("d_norm_bias", n.width);
}

void read(Call& call, ProjectArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.hidden_stride = n.width;
  a.rank = n.rank;
  a.dtype = read_dtype(call, "dtype");
  a.hidden = call.rows("hidden", a.dtype, n.elements);
  a.read = call.floats("read", n.rank * n.width);
  a.offset = call.floats("offset", n.rank);
  a.z = call.floats_out("z", n.projections);
}

void read(Call& call, ProjectBackwardArgs& a) {
  const Size n = read_size(call);
  a.rows = n.rows;
  a.width = a.hidden_stride = n.width;
  a.rank = n.rank;
  a.dtype = read_dtype(call, "dtype");
  a.grad_z = call.floats("grad_z", n.projections);
  a.hidden = call.rows("hidden", a.dtype, n.elements);
  a.read = call.floats("read", n.rank * n.width);
  a.d_hidden = call.rows_out("d_hidden", a.dtype, n.elements);
  a.d_read = call.floats_out("d_read", n.rank * n.width);
  a.d_offset = call.floats_out("d_offset", n.rank);
}

// XLA asks before it registers a handler. The answer is the newest version that both sides know; where XLA's
// structs are too short for this file it is left at 0.0, which XLA refuses by name.
bool asked_for_metadata(const xla::CallFrame& frame, uint32_t traits) {
  if (!frame.extensions || frame.extensions->kind != xla::kMetadata) return false;
  xla::Metadata& answer = *reinterpret_cast<xla::MetadataExtension*>(frame.extensions)->metadata;
  const xla::Api* api = frame.api;
  if (frame.size < sizeof(xla::CallFrame) || (api && api->size < sizeof(xla::Api))) return true;
  answer.version.major = xla::kMajor;
  answer.version.minor = xla::kOldestMinor;
  if (api && (api->version.major != xla::kMajor || api->version.minor > xla::kNewestMinor)) {
    answer.version.minor = xla::kNewestMinor;
  } else if (api && api->version.minor > xla::kOldestMinor) {
    answer.version.minor = api->version.minor;
  }
  answer.traits = traits;
  return true;
}

// XLA's CPU threads flush denormals, which would lose the small numbers of fp16 rows on their way to fp32, and stay
// with every OpenMP thread that a kernel starts. Kernels run with the default arithmetic, as elsewhere.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&saved_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

template <class Args, bool host>
void* prepare(Call& call, const Args& a) {
  call.all_read();
  if (!host) return call.stream();
  if (!call.refused()) {
    if (const SlotFault fault = slot_fault(a)) call.refuse(xla::kOutOfRange, "%s", fault.text);
  }
  return nullptr;
}

template <class Args, int (*kernel)(const Args&, void*), bool host>
xla::Error* forward(xla::CallFrame* frame) {
  if (asked_for_metadata(*frame, host ? 0 : xla::kCommandBuffer)) return nullptr;
  Call call(*frame);
  Args a{};
  read(call, a);
  void* stream = prepare<Args, host>(call, a);
  const DefaultArithmetic arithmetic;
  if (!call.refused()) call.finish(kernel(a, stream));
  return call.error();
}

template <class Args, int (*kernel)(const Args&, void*, void*), int64_t (*bytes)(const Args&), bool host>
xla::Error* backward(xla::CallFrame* frame) {
  if (asked_for_metadata(*frame, host ? 0 : xla::kCommandBuffer)) return nullptr;
  Call call(*frame);
  Args a{};
  read(call, a);
  void* space = call.refused() ? nullptr : call.workspace(bytes(a));
  void* stream = prepare<Args, host>(call, a);
  const DefaultArithmetic arithmetic;
  if (!call.refused()) call.finish(kernel(a, space, stream));
  return call.error();
}

}  // namespace

#define FASTEDIT_FORWARD(space, platform, host, op, Args) {platform, #op, forward<Args, space::op, host>},
#define FASTEDIT_BACKWARD(space, platform, host, op, Args) \
  {platform, #op, backward<Args, space::op, space::op##_workspace, host>},

const XlaHandler kXlaHandlers[] = {
    FASTEDIT_EACH_EDIT_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cpu, "cpu", true)
#ifdef FASTEDIT_CUDA
    FASTEDIT_EACH_EDIT_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cuda, "CUDA", false)
#endif
};
const int kXlaHandlerCount = sizeof kXlaHandlers / sizeof kXlaHandlers[0];

}  // namespace fastedit
