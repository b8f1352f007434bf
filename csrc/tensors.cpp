#include "tensors.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "torch.h"

namespace fastedit {

namespace {

char kNothing[64];  // where an empty tensor is: null would mean that it was not given

bool served_[2] = {false, false};  // cpu, cuda

// FASTEDIT_POISON=1: what is made for a kernel to fill holds NaN first, so that an element it forgets is seen (tests).
const bool poisons_ = [] {
  const char* set = std::getenv("FASTEDIT_POISON");
  return set && !std::strcmp(set, "1");
}();

struct Names {
  PyObject *level = PyUnicode_InternFromString("_current_level"), *version = PyUnicode_InternFromString("_version"),
           *device = PyUnicode_InternFromString("device"), *dlpack = PyUnicode_InternFromString("__dlpack__"),
           *dtype = PyUnicode_InternFromString("dtype"), *memory_format = Py_BuildValue("(s)", "memory_format"),
           *where = Py_BuildValue("(ss)", "dtype", "device");
};
const Names& names() {
  static const Names all;
  return all;
}

int code_of(const dlpack::DataType& d) {
  if (d.lanes != 1) return OTHER;
  if (d.code == dlpack::kFloat) return d.bits == 32 ? F32 : d.bits == 16 ? F16 : OTHER;
  if (d.code == dlpack::kBfloat) return d.bits == 16 ? BF16 : OTHER;
  return d.code == dlpack::kInt && d.bits == 32 ? I32 : OTHER;
}

[[noreturn]] void refuse_dims(int ndim, const char* name) {
  refuse(std::string(name) + " has " + std::to_string(ndim) + " dimensions, expected at most " + std::to_string(kMaxDims));
}

void adopt(View& v, const dlpack::Tensor& t, const char* name) {
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.shape = t.shape;
  v.ndim = t.ndim;
  v.exact = t.dtype;
  v.dtype = code_of(t.dtype);
  v.itemsize = t.dtype.bits * t.dtype.lanes / 8;
  v.device = t.device.type == dlpack::kCudaHost ? dlpack::Device{dlpack::kCpu, 0} : t.device;
  v.strides = t.strides;
  if (t.ndim > kMaxDims) refuse_dims(t.ndim, name);
  if (!t.strides && t.ndim) {
    int64_t step = 1;
    for (int i = t.ndim - 1; i >= 0; step *= t.shape[i--]) v.own[i] = step;
    v.strides = v.own;
  }
}

// numpy's dtype, by kind and size; ml_dtypes' bfloat16 has a number of its own, found by its name.
dlpack::DataType exact_of(const py::detail::PyArrayDescr_Proxy* descr, int itemsize) {
  static int bfloat16 = -1;
  const uint8_t bits = static_cast<uint8_t>(itemsize > 31 ? 0 : itemsize * 8);
  switch (descr->kind) {
    case 'f': return {dlpack::kFloat, bits, 1};
    case 'i': return {dlpack::kInt, bits, 1};
    case 'u': return {dlpack::kUInt, bits, 1};
    case 'b': return {dlpack::kBool, bits, 1};
    case 'c': return {dlpack::kComplex, bits, 1};
  }
  if (descr->type_num == bfloat16) return {dlpack::kBfloat, 16, 1};
  if (itemsize == 2) {
    const py::object dtype = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(const_cast<py::detail::PyArrayDescr_Proxy*>(descr)));
    if (py::str(dtype.attr("name")).equal(py::str("bfloat16"))) {
      bfloat16 = descr->type_num;
      return {dlpack::kBfloat, 16, 1};
    }
  }
  return {255, bits, 1};
}

void view_of_numpy(View& v, PyObject* object, const char* name) {
  const auto* array = py::detail::array_proxy(object);
  const auto* descr = py::detail::array_descriptor_proxy(array->descr);
  v.ndim = array->nd;
  if (v.ndim > kMaxDims) refuse_dims(v.ndim, name);
  v.data = array->data;
  const py::dtype dtype = py::reinterpret_borrow<py::dtype>(array->descr);
  v.itemsize = static_cast<int>(dtype.itemsize());
  v.exact = exact_of(descr, v.itemsize);
  v.dtype = code_of(v.exact);
  v.device = {dlpack::kCpu, 0};
  if (descr->byteorder == '>') refuse_type(std::string(name) + " is big-endian; give it this machine's byte order");
  for (int i = 0; i < v.ndim; ++i) {
    v.own[i] = array->dimensions[i];
    const int64_t step = array->strides[i];
    if (v.itemsize && step % v.itemsize) refuse(std::string(name) + " is not aligned to its elements; give a copy");
    v.own[kMaxDims + i] = v.itemsize ? step / v.itemsize : 0;
  }
  v.shape = v.own;
  v.strides = v.own + kMaxDims;
}

bool is_numpy(PyObject* object) {
  static PyTypeObject* const array = py::detail::npy_api::get().PyArray_Type_;
  return Py_TYPE(object) == array;
}

}  // namespace

double as_double(PyObject* object) {
  const double number = PyFloat_AsDouble(object);
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse_type(std::string("a ") + Py_TYPE(object)->tp_name + " was given, expected a number that a float holds");
  }
  return number;
}

void refuse_type(std::string text) { throw Refused{PyExc_TypeError, std::move(text)}; }
void refuse(std::string text) { throw Refused{PyExc_ValueError, std::move(text)}; }

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

std::string View::about() const {
  static const char* const kinds[] = {"int", "uint", "float", "?", "bfloat", "complex", "bool"};
  std::string text = exact.code < 7 ? kinds[exact.code] : "another dtype";
  if (exact.code < 6) text += std::to_string(exact.bits);
  return ndim < 0 ? text : text + " " + shape_text(shape, ndim);
}

bool View::contiguous() const {
  if (numel() == 0) return true;
  int64_t step = 1;
  for (int i = ndim - 1; i >= 0; step *= shape[i--]) {
    if (shape[i] != 1 && strides[i] != step) return false;
  }
  return true;
}

bool Call::unasked(const Given& given) {
  if (!torch_.tensor || !torch_.exact(given[0])) return !is_numpy(given[0]);
  if ((!served_[0] && !served_[1]) || torch_.forward_mode() || torch_.recorded()) return true;
  const bool grad = yes(torch_.grad_enabled.ask());
  for (Py_ssize_t i = 0; i < given.count; ++i) {
    PyObject* object = given.at[i];
    if (torch_.exact(object)) {
      if (grad && torch_.needs_grad(object)) return true;
    } else if (object != Py_None && !PyFloat_Check(object) && !PyLong_Check(object)) {
      return true;
    }
  }
  return false;
}

void Call::view_of(View& v, PyObject* object, const char* name, bool ours) const {
  v.object = object;
  const bool torch = torch_.tensor && (torch_.exact(object) || PyObject_TypeCheck(object, torch_.tensor));
  if (torch) {
    dlpack::Tensor t;
    if (torch_.exchange->view(object, &t)) {
      PyErr_Clear();  // sparse, meta, functorch's wrappers
      refuse_type(std::string(name) + " has no memory that a kernel can read: expected a dense tensor on the device of the rows");
    }
    adopt(v, t, name);
    if (!ours && torch_.negative(object)) refuse_type(std::string(name) + " has its negative bit set; use resolve_neg()");
  } else if (is_numpy(object)) {
    view_of_numpy(v, object, name);
  } else {
    if (!PyObject_HasAttr(object, names().dlpack)) {
      refuse_type(std::string(name) + " is " + Py_TYPE(object)->tp_name + ", expected a tensor or an array");
    }
    const py::object device = py::reinterpret_borrow<py::object>(object).attr("__dlpack_device__")();
    const bool gpu = device.cast<py::tuple>()[0].cast<int>() == dlpack::kCuda;
    py::object method = py::reinterpret_borrow<py::object>(object).attr("__dlpack__");
    py::object capsule = gpu ? method(py::arg("stream") = -1) : method();  // -1: its own stream is the one we use
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      adopt(v, static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor, name);
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      adopt(v, static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"))->tensor, name);
    } else {
      refuse_type(std::string(name) + " gave no DLPack capsule");
    }
    kept_.push_back(std::move(capsule));
  }
  if (v.device.type != dlpack::kCpu && v.device.type != dlpack::kCuda) {
    refuse(std::string(name) + " is on a device that the kernels do not know");
  }
  if (!v.numel()) {
    v.data = kNothing;
  } else if (!v.data) {
    refuse_type(std::string(name) + " has no memory");
  }
  if (v.itemsize && reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(v.itemsize)) {
    refuse(std::string(name) + " is not aligned to its elements; give a copy");
  }
}

void Call::lead(View& view, PyObject* object, const char* name) {
  face_ = torch_.tensor && PyObject_TypeCheck(object, torch_.tensor) ? Face::torch
          : is_numpy(object)                                         ? Face::numpy
                                                                     : Face::other;
  leader_ = object;
  view_of(view, object, name, false);
  device_ = view.device;
  leader_dtype_ = view.dtype;
  if (!sure && face_ == Face::torch && !served_[!host()]) refuse("another backend serves these rows");
#ifndef FASTEDIT_CUDA
  if (!host()) throw Refused{PyExc_RuntimeError, "a GPU array needs the CUDA kernels, which this build lacks; see `fastedit doctor`"};
#endif
}

void Call::read(View& view, PyObject* object, const char* name) const {
  view.object = nullptr;
  if (!object || object == Py_None) return;
  view_of(view, object, name, false);
  if (view.device.type != device_.type || (!host() && view.device.id != device_.id)) {
    refuse(std::string(name) + " is not on the same device as the rows");
  }
}

void Call::parameter(View& v, PyObject* object, const char* name, std::initializer_list<int64_t> shape, int dtype) const {
  read(v, object, name);
  if (!v.given()) return;
  const int ndim = static_cast<int>(shape.size());
  bool right = v.dtype == dtype && v.ndim == ndim;
  for (int i = 0; right && i < ndim; ++i) right = v.shape[i] == shape.begin()[i];
  if (!right) {
    static const char* const kinds[] = {"float32", "bfloat16", "float16"};
    const char* wanted = dtype == I32 ? "int32" : kinds[dtype];
    refuse(std::string(name) + " is " + v.about() + ", expected " + wanted + " " + shape_text(shape.begin(), ndim));
  }
  if (!v.contiguous()) refuse(std::string(name) + " is not contiguous");
}

Rows Call::rows(const View& v, const char* name) const {
  if (v.dtype > F16) {
    View only = v;
    only.ndim = -1;
    refuse_type(std::string(name) + " has dtype " + only.about() + ", expected one of float32, bfloat16, float16");
  }
  if (v.ndim == 0) refuse(std::string(name) + " is a single number, expected hidden states of shape (…, width)");
  Rows r{v.size(v.ndim - 1), v.width(), v.width()};
  if (r.rows == 0 || r.width == 0) return r;
  bool even = r.width == 1 || v.strides[v.ndim - 1] == 1;
  int64_t next = -1;
  for (int i = v.ndim - 2; even && i >= 0; --i) {
    if (v.shape[i] == 1) continue;
    if (next < 0) {
      r.stride = v.strides[i];
      even = r.stride >= 0;
    } else {
      even = v.strides[i] == next;
    }
    next = v.strides[i] * v.shape[i];
  }
  if (!even) refuse(std::string(name) + "'s rows are not evenly spaced with adjacent elements; make it contiguous");
  return r;
}

// Host memory for results holds NaN of every dtype of rows first, where tests ask for it.
void Call::poison(const View& out) const {
  if (poisons_ && host()) std::memset(out.data, 0xFF, static_cast<size_t>(out.numel() * out.itemsize));
}

void Call::made(const py::object& object, View& out) const {
  view_of(out, object.ptr(), "the result", true);
  const bool away = face_ == Face::torch && !torch_.exact(object.ptr());  // a mode that makes fake tensors is on
  if (away || out.device.type != device_.type || out.device.id != device_.id) refuse_type("the result was not made where the rows are");
  poison(out);
}

bool poisons() { return poisons_; }

py::object Call::like(const View& v, View& out) const { return make(v.shape, v.ndim, v.dtype, out); }

py::object Call::make(const int64_t* shape, int ndim, int dtype, View& out) const {
  if (face_ == Face::torch && dtype <= F16) {
    void* data = nullptr;
    if (PyObject* tensor = torch_.maker.empty(shape, ndim, dtype, device_, &data)) {
      out.object = tensor;
      out.ndim = ndim;
      out.dtype = dtype;
      out.itemsize = dtype == F32 ? 4 : 2;
      out.shape = std::copy(shape, shape + ndim, out.own) - ndim;
      out.device = device_;
      out.data = out.numel() ? static_cast<char*>(data) : kNothing;
      poison(out);
      return py::reinterpret_steal<py::object>(tensor);
    }
  }
  py::object result;
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) sizes[i] = shape[i];
  if (face_ == Face::torch) {
    const py::object device = taken(PyObject_GetAttr(leader_, names().device));
    PyObject* args[] = {sizes.ptr(), torch_.dtypes[dtype], device.ptr()};
    result = taken(PyObject_Vectorcall(torch_.empty, args, 1, names().where));
  } else {
    static const py::object numpy_empty = py::module_::import("numpy").attr("empty");
    py::object empty = numpy_empty;
    if (face_ == Face::other) {
      const std::string module = py::str(py::type::of(py::handle(leader_)).attr("__module__"));
      empty = py::module_::import(module.substr(0, module.find('.')).c_str()).attr("empty");
    }
    const py::object kind = dtype == F32 ? py::object(py::str("float32")) : taken(PyObject_GetAttr(leader_, names().dtype));
    PyObject* args[] = {sizes.ptr(), kind.ptr()};
    result = taken(PyObject_Vectorcall(empty.ptr(), args, 2, nullptr));
  }
  made(result, out);
  return result;
}

py::object Call::rows_like(const View& rows, int64_t width, int dtype, View& out) const {
  if (rows.width() == width && rows.dtype == dtype) return like(rows, out);
  int64_t shape[kMaxDims];
  std::copy(rows.shape, rows.shape + rows.ndim, shape);
  shape[rows.ndim - 1] = width;
  return make(shape, rows.ndim, dtype, out);
}

void* Call::stream() const {
  if (host()) return nullptr;
  void* current = nullptr;
  if (face_ == Face::torch) {
    if (torch_.exchange->stream(device_.type, device_.id, &current)) throw py::error_already_set();
    return current;
  }
  const py::object cupy = py::module_::import("cupy");
  return reinterpret_cast<void*>(cupy.attr("cuda").attr("get_current_stream")().attr("ptr").cast<intptr_t>());
}

void serve(const std::string& device, bool on) { served_[device == "cuda"] = on; }

// Whether every (holder, name, expected) still holds: what the holder has under that name, an item of a dict or an own
// attribute of anything else, is that very object; for expected () it is absent, empty or false. Under the name None, a
// tensor has that stamp (changes.stamp: version, address).
PyObject* holds(PyObject*, PyObject* facts) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); ++i) {
    PyObject* const* fact = reinterpret_cast<PyTupleObject*>(PyTuple_GET_ITEM(facts, i))->ob_item;
    if (fact[1] == Py_None) {
      dlpack::Tensor t;
      if (!torch_.exact(fact[0]) || torch_.exchange->view(fact[0], &t)) Py_RETURN_FALSE;
      const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(fact[0], names().version));
      const auto address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
      if (!version || PyLong_AsLongLong(version.ptr()) != PyLong_AsLongLong(PyTuple_GET_ITEM(fact[2], 0)) ||
          address != PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(fact[2], 1))) Py_RETURN_FALSE;
      continue;
    }
    const py::object own = py::reinterpret_steal<py::object>(PyDict_Check(fact[0]) ? py::handle(fact[0]).inc_ref().ptr()
                                                                                   : PyObject_GenericGetDict(fact[0], nullptr));
    if (!own) return nullptr;
    PyObject* found = PyDict_GetItemWithError(own.ptr(), fact[1]);
    if (!found && PyErr_Occurred()) return nullptr;
    const bool nothing = PyTuple_CheckExact(fact[2]) && PyTuple_GET_SIZE(fact[2]) == 0;
    if (nothing ? found && PyObject_IsTrue(found) != 0 : (found ? found : Py_None) != fact[2]) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// bound(ready, *rows): what the function that is held ready returns for these rows; None where nothing is (ready None), a fact
// does not hold any more, or gradients are enabled or computed. ready: (function, arguments behind the rows, facts, whether
// it was made in inference mode, whose forwards leave nothing noted).
PyObject* bound(PyObject*, PyObject* const* at, Py_ssize_t count) {
  PyObject* ready = at[0];
  if (ready == Py_None || !torch_.tensor) Py_RETURN_NONE;
  try {
    if (yes(torch_.grad_enabled.ask()) || torch_.recorded()) Py_RETURN_NONE;
    if (PyLong_AsLong(taken(torch_.graph_task.ask()).ptr()) != -1) Py_RETURN_NONE;
    if (PyTuple_GET_ITEM(ready, 3) == Py_True && !yes(torch_.inference.ask())) Py_RETURN_NONE;
    if (!yes(holds(nullptr, PyTuple_GET_ITEM(ready, 2)))) Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  PyObject* arguments[32];
  PyObject* more = PyTuple_GET_ITEM(ready, 1);
  const Py_ssize_t rows = count - 1, rest = PyTuple_GET_SIZE(more);
  if (rows + rest > 32) Py_RETURN_NONE;
  std::copy(at + 1, at + count, arguments);
  for (Py_ssize_t i = 0; i < rest; ++i) arguments[rows + i] = PyTuple_GET_ITEM(more, i);
  return PyObject_Vectorcall(PyTuple_GET_ITEM(ready, 0), arguments, static_cast<size_t>(rows + rest), nullptr);
}

}  // namespace fastedit
