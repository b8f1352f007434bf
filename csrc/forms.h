// The arguments that every edit shares, from Python's objects into the structs of abi.h; and how a kernel is run.
#pragma once
#include "slots.h"
#include "tensors.h"

namespace fastedit {

struct FormViews {
  View scale, bias, read, offset, write, slot, coefficient, gate, rule;
  float strength;  // a number in place of a coefficient
};

// scale, bias, read, offset, write, slot and coefficient from `first` on, gate and rule from `gate` on (0: none), checked
// against rows of shape `lead` (…, width).
void read_form(const Call& call, const Given& given, int first, int gate, const View& lead, FormViews& views, Form& form);

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
void read_order(const Call& call, PyObject* given, int64_t rows, int64_t slots, SlotOrder& order);

inline py::object none_or(const py::object& object) { return object ? object : py::none(); }

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

// A slot out of range is an IndexError, looked for in host memory before anything is written.
template <class Args, class Kernel>
void run(const Call& call, const char* op, const Args& a, Kernel kernel) {
  if (call.host()) {
    if (const SlotFault fault = slot_fault(a)) throw py::index_error(fault.text);
  }
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

template <class Args>
void forward(const Call& call, const char* op, const Args& a, int (*cpu)(const Args&, void*), int (*cuda)(const Args&, void*)) {
  run(call, op, a, call.host() ? cpu : cuda);
}

// An op with a workspace. On a GPU it is a tensor of the framework, whose allocator knows the stream.
template <class Args>
void backward(const Call& call, const char* op, const Args& a, int (*cpu)(const Args&, void*, void*),
              int (*cuda)(const Args&, void*, void*), int64_t (*workspace)(const Args&)) {
  View space;
  py::object kept;
  const int64_t bytes = call.host() ? 0 : workspace(a);
  if (bytes) kept = call.make({(bytes + 3) / 4}, F32, space);
  run(call, op, a, [&](const Args& args, void* stream) { return (call.host() ? cpu : cuda)(args, space, stream); });
}

#ifdef FASTEDIT_CUDA
#define FASTEDIT_BOTH(op) #op, a, cpu::op, cuda::op
#define FASTEDIT_ALL(op) #op, a, cpu::op, cuda::op, cuda::op##_workspace
#else
#define FASTEDIT_BOTH(op) #op, a, cpu::op, cpu::op
#define FASTEDIT_ALL(op) #op, a, cpu::op, cpu::op, cpu::op##_workspace
#endif

// How Python calls an op: its function, and what `ask` puts before it (None where autograd, a tracer or another backend must
// see the call, or where an argument is not as a kernel takes it).
template <py::object (*op)(Call&, const Given&), bool sure, bool ask>
PyObject* entry(PyObject*, PyObject* const* at, Py_ssize_t count) {
  try {
    const Given given{at, count};
    if (ask && Call::unasked(given)) Py_RETURN_NONE;
    Call call(sure);
    return op(call, given).release().ptr();
  } catch (const Refused& refused) {
    if (!sure) Py_RETURN_NONE;
    PyErr_SetString(refused.type, refused.text.c_str());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
#define FASTEDIT_FUNCTION(name, op, sure, ask) \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<op, sure, ask>)), METH_FASTCALL, nullptr}

extern PyMethodDef forward_functions[], backward_functions[];

}  // namespace fastedit
