// The native module: each kernel of kernels/abi.h as a Python function over plain integers.
//
// Arguments arrive flat, in the order of the struct's fields; `Reader` fills the struct and refuses a
// call with the wrong count. No arithmetic here, and no torch: pointers come from any framework. Python's own C
// interface and no binding library: its headers took as long to compile as a third of the kernels.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>

#include "abi.h"
#include "cpu/isa.h"
#include "slots.h"
#include "xla.h"

using namespace fastedit;

namespace {

struct Raised {};  // thrown where a Python exception has been set

template <class... Values>
[[noreturn]] void raise(PyObject* type, const char* format, Values... values) {
  PyErr_Format(type, format, values...);
  throw Raised{};
}

class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t count) : args_(args), count_(count) {}

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw Raised{};
    return value;
  }
  int code() { return static_cast<int>(integer()); }
  float real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred()) throw Raised{};
    return static_cast<float>(value);
  }
  template <class T>
  T* pointer() {
    void* value = PyLong_AsVoidPtr(next());
    if (value == nullptr && PyErr_Occurred()) throw Raised{};
    return static_cast<T*>(value);
  }
  Py_ssize_t left() const { return count_ - at_; }
  void done(Py_ssize_t trailing) const {
    if (at_ + trailing == count_) return;
    raise(PyExc_TypeError, "native kernel expected %zd arguments, found %zd", at_ + trailing, count_);
  }

 private:
  PyObject* next() {
    if (at_ >= count_) raise(PyExc_TypeError, "native kernel: too few arguments, found %zd", count_);
    return args_[at_++];
  }
  PyObject* const* args_;
  Py_ssize_t count_, at_ = 0;
};

void check_rank(int64_t rank) {
  if (rank >= 0 && rank <= kMaxRank) return;
  raise(PyExc_ValueError, "rank is %lld, the kernels take 0 to %d", static_cast<long long>(rank), int(kMaxRank));
}

void read(Reader& in, Form& form) {
  form.scale = in.pointer<const float>();
  form.bias = in.pointer<const float>();
  form.read = in.pointer<const float>();
  form.offset = in.pointer<const float>();
  form.write = in.pointer<const float>();
  form.rank = in.integer();
  form.slots = in.integer();
  form.slot = in.pointer<const int32_t>();
  form.coefficient = in.pointer<const float>();
  form.coefficient_stride = in.integer();
  check_rank(form.rank);
}

void read(Reader& in, const void*& data, int64_t& stride) {
  data = in.pointer<const void>();
  stride = in.integer();
}

void read(Reader& in, FormGrad& grad) {
  for (float** to : {&grad.scale, &grad.bias, &grad.read, &grad.offset, &grad.write, &grad.coefficient}) {
    *to = in.pointer<float>();
  }
}

void read(Reader& in, SlotOrder& order) {
  for (const int32_t** to : {&order.order, &order.first, &order.block_first}) *to = in.pointer<const int32_t>();
}

void read(Reader& in, EditArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  read(in, a.form);
  a.dtype = in.code();
  read(in, a.hidden, a.hidden_stride);
  a.out = in.pointer<void>();
  a.z = in.pointer<float>();
}

void read(Reader& in, EditAddArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  read(in, a.form);
  a.x_dtype = in.code();
  a.residual_dtype = in.code();
  read(in, a.x, a.x_stride);
  read(in, a.residual, a.residual_stride);
  a.out = in.pointer<void>();
  a.z = in.pointer<float>();
  a.on_sum = in.code();
}

void read(Reader& in, EditAddNormArgs& a) {
  read(in, a.add);
  a.kind = in.code();
  a.eps = in.real();
  a.weight = in.pointer<const void>();
  a.norm_bias = in.pointer<const void>();
  a.normed = in.pointer<void>();
  a.mean = in.pointer<float>();
  a.rstd = in.pointer<float>();
}

void read(Reader& in, EditBackwardArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  read(in, a.form);
  a.grad_dtype = in.code();
  a.hidden_dtype = in.code();
  read(in, a.grad, a.grad_stride);
  read(in, a.hidden, a.hidden_stride);
  read(in, a.residual, a.residual_stride);
  a.grad_z = in.pointer<const float>();
  a.z = in.pointer<const float>();
  a.d_hidden = in.pointer<void>();
  read(in, a.d_form);
  read(in, a.slot_order);
}

void read(Reader& in, EditAddNormBackwardArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  read(in, a.form);
  a.x_dtype = in.code();
  a.residual_dtype = in.code();
  read(in, a.grad_residual, a.grad_residual_stride);
  read(in, a.grad_normed, a.grad_normed_stride);
  a.residual_out = in.pointer<const void>();
  read(in, a.x, a.x_stride);
  read(in, a.residual, a.residual_stride);
  a.weight = in.pointer<const void>();
  a.mean = in.pointer<const float>();
  a.rstd = in.pointer<const float>();
  a.grad_z = in.pointer<const float>();
  a.z = in.pointer<const float>();
  a.on_sum = in.code();
  a.kind = in.code();
  a.d_x = in.pointer<void>();
  a.d_residual = in.pointer<void>();
  read(in, a.d_form);
  a.d_weight = in.pointer<float>();
  a.d_norm_bias = in.pointer<float>();
  read(in, a.slot_order);
}

void read(Reader& in, ProjectArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  a.rank = in.integer();
  check_rank(a.rank);
  a.dtype = in.code();
  read(in, a.hidden, a.hidden_stride);
  a.read = in.pointer<const float>();
  a.offset = in.pointer<const float>();
  a.z = in.pointer<float>();
}

void read(Reader& in, ProjectBackwardArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  a.rank = in.integer();
  check_rank(a.rank);
  a.dtype = in.code();
  a.grad_z = in.pointer<const float>();
  read(in, a.hidden, a.hidden_stride);
  a.read = in.pointer<const float>();
  a.d_hidden = in.pointer<void>();
  a.d_read = in.pointer<float>();
  a.d_offset = in.pointer<float>();
}

void read(Reader& in, MomentsArgs& a) {
  a.rows = in.integer();
  a.width = in.integer();
  a.groups = in.integer();
  a.dtype = in.code();
  read(in, a.hidden, a.hidden_stride);
  read(in, a.group_order);
  a.mean = in.pointer<float>();
  a.m2 = in.pointer<float>();
}

void read(Reader& in, ValueAscentArgs& a) {
  for (int64_t* to : {&a.rows, &a.width, &a.units, &a.units2, &a.steps}) *to = in.integer();
  a.step_size = in.real();
  a.dtype = in.code();
  read(in, a.hidden, a.hidden_stride);
  for (const float** to : {&a.weight, &a.bias, &a.weight2, &a.bias2, &a.head, &a.gram}) *to = in.pointer<const float>();
  a.out = in.pointer<void>();
  for (const float** to : {&a.z, &a.slope}) *to = in.pointer<const float>();
  a.total = in.pointer<float>();
}

// An edit's gate and rule: two pointers more, behind the struct's other fields, where a call has them.
void read_gate(Reader& in, Form& form) {
  if (in.left() != 3) return;
  form.gate = in.pointer<const float>();
  form.rule = in.pointer<const float>();
  if (!form.gate != !form.rule) raise(PyExc_ValueError, "gate and rule belong together: one is given without the other");
}
void read_gate(Reader& in, EditArgs& a) { read_gate(in, a.form); }
void read_gate(Reader& in, EditAddArgs& a) { read_gate(in, a.form); }
void read_gate(Reader& in, EditAddNormArgs& a) { read_gate(in, a.add.form); }
template <class Args>
void read_gate(Reader&, Args&) {}

template <class Args>
void check_host(const Args& a) {
  if (const SlotFault fault = slot_fault(a)) raise(PyExc_IndexError, "%s", fault.text);
}

int64_t work(const EditAddNormArgs& a) { return a.add.rows * a.add.width; }
int64_t work(const ValueAscentArgs& a) { return a.rows * a.units * (a.width + a.steps); }
template <class Args>
int64_t work(const Args& a) { return a.rows * a.width; }

// Releasing the GIL costs about as much as a small kernel: done from this many elements on.
constexpr int64_t kReleaseFrom = 1 << 16;

void check_error(int error) {
  if (error == -1) {
    PyErr_NoMemory();
    throw Raised{};
  }
  if (error) raise(PyExc_RuntimeError, "native kernel failed with CUDA error %d", error);
}

template <class Args, class Kernel>
void run(const Args& a, Kernel kernel) {
  if (work(a) < kReleaseFrom) return check_error(kernel(a));
  PyThreadState* state = PyEval_SaveThread();
  const int error = kernel(a);
  PyEval_RestoreThread(state);
  check_error(error);
}

// nullptr, as Python wants it, where the body raised.
template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const Raised&) {
    return nullptr;
  }
}

template <class Args, int (*kernel)(const Args&, void*), bool host>
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Reader in(args, count);
    Args a{};
    read(in, a);
    read_gate(in, a);
    in.done(1);
    void* stream = in.pointer<void>();
    if (host) check_host(a);
    run(a, [stream](const Args& filled) { return kernel(filled, stream); });
    return Py_NewRef(Py_None);
  });
}

template <class Args, int (*kernel)(const Args&, void*, void*), bool host>
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Reader in(args, count);
    Args a{};
    read(in, a);
    in.done(2);
    void* space = in.pointer<void>();
    void* stream = in.pointer<void>();
    if (host) check_host(a);
    run(a, [space, stream](const Args& filled) { return kernel(filled, space, stream); });
    return Py_NewRef(Py_None);
  });
}

template <class Args, int64_t (*workspace)(const Args&)>
PyObject* workspace_size(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Reader in(args, count);
    Args a{};
    read(in, a);
    in.done(0);
    return PyLong_FromLongLong(workspace(a));
  });
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name()); }

PyObject* set_instruction_set(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (wanted == nullptr) return nullptr;
  if (!cpu::set_isa(wanted)) {
    return PyErr_Format(PyExc_ValueError, "no CPU kernels for '%s' on this machine", wanted);
  }
  return Py_NewRef(Py_None);
}

PyObject* xla_handlers(PyObject*, PyObject*) {
  PyObject* all = PyList_New(0);
  for (int i = 0; all != nullptr && i < kXlaHandlerCount; ++i) {
    const XlaHandler& one = kXlaHandlers[i];
    PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(one.handler), nullptr, nullptr);
    PyObject* row = capsule == nullptr ? nullptr : Py_BuildValue("ssN", one.platform, one.op, capsule);
    if (row == nullptr || PyList_Append(all, row)) Py_CLEAR(all);
    Py_XDECREF(row);
  }
  return all;
}

typedef PyObject* Function(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef kernel(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          "A kernel of kernels/abi.h: its struct's fields in order, then a forward edit's gate and rule where it has "
          "them, or a backward's workspace, then the stream."};
}

#define FASTEDIT_FORWARD(space, prefix, host, op, Args) kernel(prefix "_" #op, forward<Args, space::op, host>),
#define FASTEDIT_BACKWARD(space, prefix, host, op, Args)          \
  kernel(prefix "_" #op, backward<Args, space::op, host>),        \
  kernel(prefix "_" #op "_workspace", workspace_size<Args, space::op##_workspace>),

PyMethodDef kMethods[] = {
    FASTEDIT_EACH_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cpu, "cpu", true)
#ifdef FASTEDIT_CUDA
    FASTEDIT_EACH_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cuda, "cuda", false)
#endif
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {"set_instruction_set", set_instruction_set, METH_O,
     "Choose among the compiled CPU kernels: baseline, avx2 or avx512, where this processor has them."},
    {"xla_handlers", xla_handlers, METH_NOARGS,
     "(platform, op, capsule) of each XLA handler, for jax.ffi.register_ffi_target."},
    {nullptr, nullptr, 0, nullptr}};

#define FASTEDIT_NAME_OF(space, op, Args) #op,
const char* const kOps[] = {FASTEDIT_EACH_OP(FASTEDIT_NAME_OF, FASTEDIT_NAME_OF, cpu)};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_native",
                       "fastedit's native kernels over raw pointers; call them through fastedit.ops or fastedit.arrays.",
                       -1,
                       kMethods,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

#ifdef FASTEDIT_CUDA
constexpr const char* kArchitectures = FASTEDIT_CUDA_ARCHITECTURES;
#else
constexpr const char* kArchitectures = "";
#endif

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&kModule);
  if (module == nullptr) return nullptr;
  constexpr Py_ssize_t count = sizeof kOps / sizeof kOps[0];
  PyObject* ops = PyTuple_New(count);
  for (Py_ssize_t i = 0; ops != nullptr && i < count; ++i) {
    PyObject* name = PyUnicode_FromString(kOps[i]);
    if (name == nullptr || PyTuple_SetItem(ops, i, name)) Py_CLEAR(ops);
  }
  const bool failed = ops == nullptr || PyModule_AddObjectRef(module, "OPS", ops) ||
                      PyModule_AddIntConstant(module, "MAX_RANK", kMaxRank) ||
                      PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", kArchitectures);
  Py_XDECREF(ops);
  if (failed) Py_CLEAR(module);
  return module;
}
