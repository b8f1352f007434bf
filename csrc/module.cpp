// The native module: each kernel of kernels/abi.h as a Python function over plain integers.
//
// Arguments arrive flat, in the order of the struct's fields; `Reader` fills the struct and refuses a
// call with the wrong count. No arithmetic here, and no torch: pointers come from any framework.
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "abi.h"
#include "cpu/isa.h"
#include "slots.h"
#include "xla.h"

namespace py = pybind11;
using namespace fastedit;

namespace {

class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t count) : args_(args), count_(count) {}

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int code() { return static_cast<int>(integer()); }
  float real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }
  template <class T>
  T* pointer() {
    void* value = PyLong_AsVoidPtr(next());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<T*>(value);
  }
  void done(Py_ssize_t trailing) const {
    if (at_ + trailing == count_) return;
    throw py::type_error("native kernel expected " + std::to_string(at_ + trailing) + " arguments, found " +
                         std::to_string(count_));
  }

 private:
  PyObject* next() {
    if (at_ >= count_) throw py::type_error("native kernel: too few arguments");
    return args_[at_++];
  }
  PyObject* const* args_;
  Py_ssize_t count_, at_ = 0;
};

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
  if (form.rank < 0 || form.rank > kMaxRank) {
    throw py::value_error("rank is " + std::to_string(form.rank) + ", the kernels take 0 to " + std::to_string(kMaxRank));
  }
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
  a.dtype = in.code();
  a.grad_z = in.pointer<const float>();
  read(in, a.hidden, a.hidden_stride);
  a.read = in.pointer<const float>();
  a.d_hidden = in.pointer<void>();
  a.d_read = in.pointer<float>();
  a.d_offset = in.pointer<float>();
}

template <class Args>
void check_host(const Args& a) {
  if (const SlotFault fault = slot_fault(a)) throw py::index_error(fault.text);
}

int64_t work(const EditAddNormArgs& a) { return a.add.rows * a.add.width; }
template <class Args>
int64_t work(const Args& a) { return a.rows * a.width; }

// Releasing the GIL costs about as much as a small kernel: done from this many elements on.
constexpr int64_t kReleaseFrom = 1 << 16;

void check_error(int error) {
  if (error == -1) throw std::bad_alloc();
  if (error) throw std::runtime_error("native kernel failed with CUDA error " + std::to_string(error));
}

template <class Args, class Kernel>
void run(const Args& a, Kernel kernel) {
  if (work(a) < kReleaseFrom) return check_error(kernel(a));
  int error;
  {
    py::gil_scoped_release release;
    error = kernel(a);
  }
  check_error(error);
}

// The kernels are plain METH_FASTCALL functions: pybind11's own dispatch of a function of twenty integers costs more
// than a small kernel. Exceptions are translated as pybind11 would.
template <class Body>
PyObject* translated(Body body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Args, int (*kernel)(const Args&, void*), bool host>
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    Reader in(args, count);
    Args a{};
    read(in, a);
    in.done(1);
    void* stream = in.pointer<void>();
    if (host) check_host(a);
    run(a, [stream](const Args& filled) { return kernel(filled, stream); });
    return Py_NewRef(Py_None);
  });
}

template <class Args, int (*kernel)(const Args&, void*, void*), bool host>
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
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
  return translated([&] {
    Reader in(args, count);
    Args a{};
    read(in, a);
    in.done(0);
    return PyLong_FromLongLong(workspace(a));
  });
}

typedef PyObject* Function(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          "A kernel of kernels/abi.h: its struct's fields in order, then a backward's workspace, then the stream."};
}

#define FASTEDIT_FORWARD(space, prefix, host, op, Args) method(prefix "_" #op, forward<Args, space::op, host>),
#define FASTEDIT_BACKWARD(space, prefix, host, op, Args)          \
  method(prefix "_" #op, backward<Args, space::op, host>),        \
  method(prefix "_" #op "_workspace", workspace_size<Args, space::op##_workspace>),

PyMethodDef kMethods[] = {
    FASTEDIT_EACH_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cpu, "cpu", true)
#ifdef FASTEDIT_CUDA
    FASTEDIT_EACH_OP(FASTEDIT_FORWARD, FASTEDIT_BACKWARD, cuda, "cuda", false)
#endif
    {nullptr, nullptr, 0, nullptr}};

py::list xla_handlers() {
  py::list all;
  for (int i = 0; i < kXlaHandlerCount; ++i) {
    const XlaHandler& one = kXlaHandlers[i];
    all.append(py::make_tuple(one.platform, one.op, py::capsule(reinterpret_cast<const void*>(one.handler))));
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastedit's native kernels over raw pointers; call them through fastedit.ops or fastedit.arrays.";
  py::list ops;
  for (const char* op : {"edit", "edit_add", "edit_add_norm", "project", "edit_backward", "edit_add_norm_backward",
                         "project_backward"}) {
    ops.append(op);
  }
  m.attr("OPS") = py::tuple(ops);
  m.attr("MAX_RANK") = kMaxRank;
  m.def("instruction_set", [] { return cpu::isa_name(); }, "The instruction set of the CPU kernels in use.");
  m.def("set_instruction_set", [](const std::string& name) {
    if (!cpu::set_isa(name.c_str())) throw py::value_error("no CPU kernels for '" + name + "' on this machine");
  }, "Choose among the compiled CPU kernels: baseline, avx2 or avx512, where this processor has them.");
  m.def("xla_handlers", xla_handlers, "(platform, op, capsule) of each XLA handler, for jax.ffi.register_ffi_target.");
  if (PyModule_AddFunctions(m.ptr(), kMethods)) throw py::error_already_set();
#ifdef FASTEDIT_CUDA
  m.attr("CUDA_ARCHITECTURES") = FASTEDIT_CUDA_ARCHITECTURES;
#else
  m.attr("CUDA_ARCHITECTURES") = "";
#endif
}
