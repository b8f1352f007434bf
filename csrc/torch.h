// What is asked of torch, without its headers: types and functions from Python, a view from DLPack's exchange interface, new
// tensors from the C interface that torch keeps stable for compiled models (torch/csrc/inductor/aoti_torch/c/shim.h).
#pragma once
#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace fastedit {

namespace py = pybind11;

py::object taken(PyObject* result);  // throws the error that is set where there is none
inline bool yes(PyObject* result) { return taken(result).ptr() == Py_True; }

// A flag that torch keeps, asked for without Python's way of calling where its function is written in C.
struct Flag {
  PyObject* function = nullptr;
  PyCFunction direct = nullptr;

  void keep(const py::object& given);
  PyObject* ask() const { return direct ? direct(PyCFunction_GET_SELF(function), nullptr) : PyObject_CallNoArgs(function); }
};

// Offsets in a tensor's memory of its negative bit and of its autograd data. Asking torch costs 40 to
// 70 ns for each tensor of a call. The places are found when torch is: tensors that differ in that alone are compared, word by
// word. Where there is not exactly one place (another layout, another C library), torch is asked.
struct Inside {
  size_t body = 0, keys = 0, autograd = 0;  // the body's pointer in Python's object, the words in the body; 0: not found
  uint64_t negative = 0;                    // the bit among the keys

  const uint64_t* of(PyObject* tensor) const {
    const uint64_t* found;
    __builtin_memcpy(&found, reinterpret_cast<const char*>(tensor) + body, sizeof found);
    return found;
  }
  void find(const py::module_& torch);
};

// New tensors from torch, in half the time of torch.empty_like called from Python: ordinary ones, of torch's allocators. Where a
// function is not there, or a dispatch mode is on that must see a tensor made, `empty` makes none.
struct Maker {
  int32_t (*make)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**) = nullptr;
  int32_t (*address)(void*, void**) = nullptr;
  int32_t (*forget)(void*) = nullptr;
  PyObject* (*wrap)(const void*) = nullptr;
  bool (*watched)(bool) = nullptr;
  int32_t dtypes[3], cpu, cuda;  // torch's numbers; dtypes in the order of abi.h

  // Contiguous; null without an error set where it cannot.
  PyObject* empty(const int64_t* shape, int ndim, int dtype, dlpack::Device device, void** data) const;
  void find(void* library);
};

struct Torch {
  Inside inside;
  Maker maker;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::Exchange* exchange = nullptr;
  PyObject *empty = nullptr, *forward_ad = nullptr;
  Flag grad_enabled, graph_task, inference, jit_traced;
  void* const& (*jit_trace)() = nullptr;  // std::shared_ptr to the trace that is being made, seen as the pointer it begins with
  PyMethodDef* is_neg = nullptr;  // of Tensor
  PyGetSetDef* requires_grad = nullptr;
  PyObject* dtypes[3] = {};

  bool exact(PyObject* object) const { return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter; }
  bool needs_grad(PyObject* object) const;  // of an exact tensor
  bool negative(PyObject* object) const;    // of any tensor
  bool forward_mode() const;  // tensors may have tangents that no kernel sees; what torch.func wraps has no memory to be viewed
  bool recorded() const { return jit_trace ? jit_trace() != nullptr : yes(jit_traced.ask()); }  // torch.jit.trace looks on
};
extern Torch torch_;

// Returns what was found of Inside and Maker, by name. quick: whether that is looked for at all (the tests also run without).
py::dict use_torch(const py::module_& torch, bool quick);
int dtype_code(PyObject* torch_dtype);  // OTHER for None and for what no kernel takes

}  // namespace fastedit
