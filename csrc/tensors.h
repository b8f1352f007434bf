// Tensors as Python holds them, seen as kernels want them: read in place, never through a framework's headers.
//
// torch tensors are read through DLPack's C exchange interface, NumPy arrays through the array's own struct, anything
// else (CuPy) through `__dlpack__`. What cannot be read, or is laid out as no kernel takes it, is Refused.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "abi.h"
#include "dlpack.h"

namespace fastedit {

namespace py = pybind11;

constexpr int kMaxDims = 16;
constexpr int I32 = 8, OTHER = 9;  // dtypes beside those of rows (abi.h)

// A call that the kernels do not serve, and why: an exception for a caller who is sure, None for one who asks.
struct Refused {
  PyObject* type;
  std::string text;
};
[[noreturn]] void refuse(std::string text);
[[noreturn]] void refuse_type(std::string text);

double as_double(PyObject* object);  // refuses what is no number, and integers beyond a double

// What Python has called with: positional arguments, those left out None.
struct Given {
  PyObject* const* at;
  Py_ssize_t count;

  PyObject* operator[](Py_ssize_t i) const { return i < count ? at[i] : Py_None; }
  bool has(Py_ssize_t i) const { return (*this)[i] != Py_None; }
  bool flag(Py_ssize_t i, bool missing = false) const {
    if (i >= count) return missing;
    if (at[i] != Py_True && at[i] != Py_False && at[i] != Py_None) refuse_type("a flag is neither True nor False");
    return at[i] == Py_True;
  }
  int64_t integer(Py_ssize_t i) const { return py::handle((*this)[i]).cast<int64_t>(); }
  float number(Py_ssize_t i) const { return static_cast<float>(as_double((*this)[i])); }
};

struct View {
  PyObject* object = nullptr;  // null: None was given, and nothing else is set
  char* data;
  const int64_t *shape, *strides;  // strides in elements
  int ndim, dtype, itemsize;
  dlpack::Device device;
  dlpack::DataType exact;
  int64_t own[2 * kMaxDims];

  bool given() const { return object != nullptr; }
  int64_t width() const { return shape[ndim - 1]; }
  int64_t size(int dims) const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }
  int64_t numel() const { return size(ndim); }
  bool contiguous() const;
  std::string about() const;  // "float32 (3, 8)"
  template <class T>
  operator T*() const { return given() ? reinterpret_cast<T*>(data) : nullptr; }  // as the structs of abi.h take it
};

std::string shape_text(const int64_t* shape, int ndim);

struct Rows {
  int64_t rows, width, stride;
};

enum class Face { torch, numpy, other };

// One call: the rows that lead it, what the kernels' outputs are made of, and what must live until they have run.
class Call {
 public:
  const bool sure;  // a refusal is an exception; else the caller only asks, and is answered with what a user gets
  explicit Call(bool is_sure) : sure(is_sure) {}

  // Whether a caller who only asks is to be sent away at once: a gradient is wanted, torch.func or forward-mode differentiation
  // or a tracer is at work, or another backend serves this device. The leading rows are the first argument.
  static bool unasked(const Given& given);

  void lead(View& view, PyObject* object, const char* name);        // the first rows: they say where we are
  void read(View& view, PyObject* object, const char* name) const;  // anything beside them, or None
  void parameter(View& view, PyObject* object, const char* name, std::initializer_list<int64_t> shape, int dtype = F32) const;
  Rows rows(const View& view, const char* name) const;              // rows evenly spaced, of a dtype that kernels take

  py::object like(const View& view, View& out) const;               // contiguous, of that shape and dtype
  py::object make(const int64_t* shape, int ndim, int dtype, View& out) const;
  py::object make(std::initializer_list<int64_t> shape, int dtype, View& out) const {
    return make(shape.begin(), static_cast<int>(shape.size()), dtype, out);
  }
  py::object rows_like(const View& rows, int64_t width, int dtype, View& out) const;  // the rows' shape, but as wide
  void* stream() const;
  bool host() const { return device_.type != dlpack::kCuda; }
  int device() const { return device_.id; }

 private:
  void view_of(View& view, PyObject* object, const char* name, bool ours) const;
  void made(const py::object& object, View& out) const;
  void poison(const View& out) const;
  Face face_ = Face::torch;
  PyObject* leader_ = nullptr;
  int leader_dtype_ = OTHER;
  dlpack::Device device_{};
  mutable std::vector<py::object> kept_;
};

// From Python: whether the kernels of a device serve calls that only ask.
void serve(const std::string& device, bool on);
bool poisons();  // whether host memory for results is filled with NaN first

PyObject* holds(PyObject*, PyObject* facts);
PyObject* bound(PyObject*, PyObject* const* at, Py_ssize_t count);

}  // namespace fastedit
