// The arguments that every edit shares, from Python's objects into the structs of abi.h; and how a kernel is run.
#pragma once
#include "slots.h"
#include "tensors.h"

namespace fastedit {

// An edit's parameters as an op is given them; what reads them says in which order.
struct Given {
  py::handle scale, bias, read, offset, write, slot, coefficient, gate, rule;
};

struct FormViews {
  View scale, bias, read, offset, write, slot, coefficient, gate, rule;
  float strength;  // a number in place of a coefficient
};

// Checks all of it against the leading rows of shape `lead` (…, width) and fills `form`.
void read_form(const Call& call, const Given& given, const View& lead, FormViews& views, Form& form);

template <class T = void>
T* pointer(const View& view) {
  return view.given() ? reinterpret_cast<T*>(view.data) : nullptr;
}

// Rows sorted by slot, for gradients over slots; made anew for each call, which on the host costs less than finding it again.
class HostOrder {
 public:
  void sort(const int32_t* slot, int64_t rows, int64_t slots);
  SlotOrder order() const { return {order_.data(), first_.data(), blocks_.data()}; }
  const std::vector<int32_t>& first() const { return first_; }

 private:
  std::vector<int32_t> order_, first_, blocks_;
};

// On a GPU the order comes from outside: (order, first, block_first).
void read_order(const Call& call, py::handle given, int64_t rows, int64_t slots, SlotOrder& order);

template <class Args>
int64_t work(const Args& a) { return a.rows * a.width; }
inline int64_t work(const EditAddNormArgs& a) { return a.add.rows * a.add.width; }
inline int64_t work(const ValueAscentArgs& a) { return a.rows * a.units * (a.width + a.steps); }

void check_error(int error, const char* op);

// Launches go to the rows' device, whichever is current.
class OnDevice {
 public:
  OnDevice(bool host, int device);
  ~OnDevice();

 private:
  int before_ = -1;
};

// Releasing the GIL costs about as much as a small kernel: done from this many elements on, and for every launch.
constexpr int64_t kReleaseFrom = 1 << 16;

template <class Args, class Kernel>
void run(const Call& call, const char* op, const Args& a, Kernel kernel) {
  const OnDevice here(call.host(), call.device());
  void* stream = call.stream();
  int error;
  if (call.host() && work(a) < kReleaseFrom) {
    error = kernel(a, stream);
  } else {
    const py::gil_scoped_release released;
    error = kernel(a, stream);
  }
  check_error(error, op);
}

// The forward of an op: a slot out of range is an IndexError, looked for in host memory before anything is written.
template <class Args>
void forward(const Call& call, const char* op, const Args& a, int (*cpu)(const Args&, void*), int (*cuda)(const Args&, void*)) {
  if (call.host()) {
    if (const SlotFault fault = slot_fault(a)) throw py::index_error(fault.text);
  }
  run(call, op, a, call.host() ? cpu : cuda);
}

// An op with a workspace. On a GPU it is a tensor of the framework, whose allocator knows the stream.
template <class Args>
void backward(const Call& call, const char* op, const Args& a, int (*cpu)(const Args&, void*, void*),
              int (*cuda)(const Args&, void*, void*), int64_t (*workspace)(const Args&)) {
  if (call.host()) {
    if (const SlotFault fault = slot_fault(a)) throw py::index_error(fault.text);
    return run(call, op, a, [cpu](const Args& args, void* stream) { return cpu(args, nullptr, stream); });
  }
  View space;
  py::object kept;
  const int64_t bytes = workspace(a);
  if (bytes) kept = call.make({(bytes + 3) / 4}, F32, space);
  run(call, op, a, [&](const Args& args, void* stream) { return cuda(args, bytes ? space.data : nullptr, stream); });
}

#ifdef FASTEDIT_CUDA
#define FASTEDIT_BOTH(op) cpu::op, cuda::op
#define FASTEDIT_ALL(op) cpu::op, cuda::op, cuda::op##_workspace
#else
#define FASTEDIT_BOTH(op) cpu::op, cpu::op
#define FASTEDIT_ALL(op) cpu::op, cpu::op, cpu::op##_workspace
#endif

// What Python calls. `sure`: a refusal is an exception. Else None, and the caller finds out why.
template <class Body>
py::object answered(bool sure, Body body) {
  try {
    return body();
  } catch (const Refused& refused) {
    if (!sure) return py::none();
    PyErr_SetString(refused.type, refused.text.c_str());
    throw py::error_already_set();
  }
}

void bind_forwards(py::module_& module);
void bind_backwards(py::module_& module);

}  // namespace fastedit
