#include "tensors.h"

#include <pybind11/numpy.h>

#include <cstdlib>
#include <cstring>

namespace fastedit {

namespace {

char kNothing[64];  // where an empty tensor is: null would mean that it was not given

struct Torch {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::Exchange* exchange = nullptr;
  PyObject *empty = nullptr, *empty_like = nullptr, *grad_enabled = nullptr, *is_neg = nullptr, *contiguous_format = nullptr,
           *transforms = nullptr, *forward_ad = nullptr;
  PyObject* dtypes[3] = {};
  bool exact(PyObject* object) const { return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter; }
} torch_;

bool served_[2] = {false, false};  // cpu, cuda

// FASTEDIT_POISON=1: what is made for a kernel to fill holds NaN first, so that an element it forgets is seen (tests).
const bool poisons_ = [] {
  const char* set = std::getenv("FASTEDIT_POISON");
  return set && !std::strcmp(set, "1");
}();

struct Names {
  PyObject *requires_grad = PyUnicode_InternFromString("requires_grad"), *level = PyUnicode_InternFromString("_current_level"),
           *device = PyUnicode_InternFromString("device"),
           *dlpack = PyUnicode_InternFromString("__dlpack__"), *dtype = PyUnicode_InternFromString("dtype"),
           *memory_format = Py_BuildValue("(s)", "memory_format"), *where = Py_BuildValue("(ss)", "dtype", "device");
};
const Names& names() {
  static const Names all;
  return all;
}

py::object taken(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
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

// changes.transformed: tensors may be wrapped, or have tangents that no kernel sees.
bool transformed() {
  const py::object active = taken(PyObject_CallNoArgs(torch_.transforms));
  if (active.ptr() == Py_True) return true;
  const py::object level = taken(PyObject_GetAttr(torch_.forward_ad, names().level));
  return PyLong_AsLong(level.ptr()) >= 0;
}

}  // namespace

void refuse_type(std::string text) { throw Refused{PyExc_TypeError, std::move(text)}; }
void refuse(std::string text) { throw Refused{PyExc_ValueError, std::move(text)}; }

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

const char* dtype_text(int dtype) {
  return dtype == F32 ? "float32" : dtype == BF16 ? "bfloat16" : dtype == F16 ? "float16" : "int32";
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

bool Call::unasked(std::initializer_list<PyObject*> all) {
  PyObject* first = *all.begin();
  if (!torch_.tensor || !torch_.exact(first)) return !is_numpy(first);
  if (!served_[0] && !served_[1]) return true;
  for (PyObject* object : all) {
    if (object != Py_None && !torch_.exact(object)) return true;
  }
  if (transformed()) return true;
  const py::object enabled = taken(PyObject_CallNoArgs(torch_.grad_enabled));
  if (enabled.ptr() != Py_True) return false;
  for (PyObject* object : all) {
    if (object == Py_None) continue;
    const py::object wanted = taken(PyObject_GetAttr(object, names().requires_grad));
    if (wanted.ptr() == Py_True) return true;
  }
  return false;
}

void Call::view_of(View& v, PyObject* object, const char* name) const {
  v.object = object;
  const bool torch = torch_.tensor && (torch_.exact(object) || PyObject_TypeCheck(object, torch_.tensor));
  if (torch) {
    dlpack::Tensor t;
    if (torch_.exchange->view(object, &t)) {
      PyErr_Clear();  // sparse, meta, functorch's wrappers
      refuse_type(std::string(name) + " has no memory that a kernel can read");
    }
    adopt(v, t, name);
    const py::object negative = taken(PyObject_CallOneArg(torch_.is_neg, object));
    if (negative.ptr() == Py_True) refuse_type(std::string(name) + " has its negative bit set; use resolve_neg()");
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
  } else if (!v.data || (torch && v.data == nullptr)) {
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
  view_of(view, object, name);
  device_ = view.device;
  if (!sure_ && face_ == Face::torch && !served_[!host()]) refuse("another backend serves these rows");
#ifndef FASTEDIT_CUDA
  if (!host()) throw Refused{PyExc_RuntimeError, "a GPU array needs the CUDA kernels, which this build lacks; see `fastedit doctor`"};
#endif
}

void Call::read(View& view, PyObject* object, const char* name) const {
  view.object = nullptr;
  if (!object || object == Py_None) return;
  view_of(view, object, name);
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
    refuse(std::string(name) + " is " + v.about() + ", expected " + dtype_text(dtype) + " " + shape_text(shape.begin(), ndim));
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

void Call::made(const py::object& object, View& out) const {
  view_of(out, object.ptr(), "the result");
  const bool away = face_ == Face::torch && !torch_.exact(object.ptr());  // a mode that makes fake tensors is on
  if (away || out.device.type != device_.type || out.device.id != device_.id) refuse_type("the result was not made where the rows are");
  if (poisons_ && host()) std::memset(out.data, 0xFF, static_cast<size_t>(out.numel() * out.itemsize));  // NaN of every dtype of rows
}

bool poisons() { return poisons_; }

py::object Call::like(const View& v, View& out) const {
  if (face_ != Face::torch || !(v.object && torch_.exact(v.object))) return make(v.shape, v.ndim, v.dtype, out);
  PyObject* args[] = {v.object, torch_.contiguous_format};
  py::object result = taken(v.contiguous() ? PyObject_Vectorcall(torch_.empty_like, args, 1, nullptr)
                                           : PyObject_Vectorcall(torch_.empty_like, args, 1, names().memory_format));
  made(result, out);
  return result;
}

py::object Call::make(const int64_t* shape, int ndim, int dtype, View& out) const {
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) sizes[i] = shape[i];
  py::object result;
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

void use_torch(const py::module_& torch) {
  const py::object tensor = torch.attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->version.major > 1) found = found->before;
  if (PyErr_Occurred()) PyErr_Clear();
  if (!found || found->version.major != 1 || !found->view) {
    throw py::import_error("this torch has no DLPack C exchange interface; fastedit needs torch 2.11 or newer");
  }
  const auto keep = [&](const char* name) { return torch.attr(name).cast<py::object>().release().ptr(); };
  torch_.exchange = found;
  torch_.empty = keep("empty");
  torch_.empty_like = keep("empty_like");
  torch_.grad_enabled = keep("is_grad_enabled");
  torch_.contiguous_format = keep("contiguous_format");
  torch_.transforms = torch.attr("_C").attr("_are_functorch_transforms_active").cast<py::object>().release().ptr();
  torch_.forward_ad = torch.attr("autograd").attr("forward_ad").cast<py::object>().release().ptr();
  torch_.is_neg = tensor.attr("is_neg").cast<py::object>().release().ptr();
  torch_.dtypes[F32] = keep("float32");
  torch_.dtypes[BF16] = keep("bfloat16");
  torch_.dtypes[F16] = keep("float16");
  torch_.parameter = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").cast<py::object>().release().ptr());
  torch_.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
}

void serve(const std::string& device, bool on) { served_[device == "cuda"] = on; }

int dtype_code(PyObject* dtype) {
  for (int code : {F32, BF16, F16}) {
    if (dtype == torch_.dtypes[code]) return code;
  }
  return OTHER;
}

}  // namespace fastedit
