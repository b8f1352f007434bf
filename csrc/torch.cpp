#include "torch.h"

#include <algorithm>
#include <string>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "tensors.h"

namespace fastedit {

Torch torch_;

py::object taken(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void Flag::keep(const py::object& given) {
  function = py::object(given).release().ptr();
  if (PyCFunction_Check(function) && PyCFunction_GET_FLAGS(function) == METH_NOARGS) direct = PyCFunction_GET_FUNCTION(function);
}

bool Torch::needs_grad(PyObject* object) const {
  return !(inside.autograd && !inside.of(object)[inside.autograd]) && yes(requires_grad->get(object, requires_grad->closure));
}

bool Torch::negative(PyObject* object) const {
  if (inside.keys && exact(object)) return inside.of(object)[inside.keys] & inside.negative;
  return yes(is_neg->ml_meth(object, nullptr));
}

bool Torch::forward_mode() const {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* level = PyDict_GetItem(forward_ad, name);
  return !level || PyLong_AsLong(level) >= 0;
}

void Inside::find(const py::module_& torch) {
#ifdef __GLIBC__
  std::vector<py::object> plain, turned, learning;  // equal but for that one thing
  for (const char* dtype : {"float32", "bfloat16"}) {
    for (const int64_t rows : {1, 3}) {
      const auto zeros = [&](bool grad) {
        return torch.attr("zeros")(  // on the CPU, whatever torch.set_default_device says
            rows, 5, py::arg("dtype") = torch.attr(dtype), py::arg("device") = "cpu", py::arg("requires_grad") = grad);
      };
      plain.push_back(zeros(false));
      turned.push_back(torch.attr("_neg_view")(plain.back()));
      learning.push_back(zeros(true));
    }
  }
  const auto all = [&](const auto& holds) {
    for (size_t i = 0; i < plain.size(); ++i) {
      if (!holds(plain[i].ptr(), turned[i].ptr(), learning[i].ptr())) return false;
    }
    return true;
  };
  const auto only = [](size_t first, size_t end, size_t step, const auto& holds) {  // the one place; 0 if none or several
    size_t found = 0, count = 0;
    for (size_t at = first; at < end; at += step) {
      if (holds(at)) found = at, ++count;
    }
    return count == 1 ? found : 0;
  };
  const auto address = [](PyObject* tensor) { return py::handle(tensor).attr("_cdata").cast<uintptr_t>(); };
  const size_t place = only(sizeof(PyObject), static_cast<size_t>(Py_TYPE(plain[0].ptr())->tp_basicsize), sizeof(void*), [&](size_t at) {
    body = at;
    return all([&](auto... each) { return ((reinterpret_cast<uintptr_t>(of(each)) == address(each)) && ...); });
  });
  if (!(body = place)) return;
  size_t words = SIZE_MAX;
  all([&](auto... each) {
    words = std::min({words, malloc_usable_size(reinterpret_cast<void*>(address(each))) / sizeof(uint64_t)...});
    return true;
  });
  autograd = only(1, words, 1, [&](size_t at) {
    return all([&](auto p, auto, auto l) { return !of(p)[at] && of(l)[at]; });
  });
  keys = only(1, words, 1, [&](size_t at) {
    negative = of(plain[0].ptr())[at] ^ of(turned[0].ptr())[at];
    const bool one = negative && !(negative & (negative - 1));
    return one && all([&](auto p, auto t, auto l) { return (of(p)[at] ^ of(t)[at]) == negative && (of(t)[at] & ~of(l)[at] & negative); });
  });
  if (keys) negative = of(plain[0].ptr())[keys] ^ of(turned[0].ptr())[keys];
#endif
}

// torch's library for Python, through which those that it is linked with are looked into; null where it is not found.
void* library_of(const py::module_& torch) {
#ifdef _WIN32
  return nullptr;
#else
  const py::object folder = py::module_::import("pathlib").attr("Path")(torch.attr("__file__")).attr("parent").attr("joinpath")("lib");
#ifdef __APPLE__
  const char* name = "libtorch_python.dylib";
#else
  const char* name = "libtorch_python.so";
#endif
  const std::string path = py::str(folder.attr("joinpath")(name));
  return dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
#endif
}

template <class Function>
bool take(void* library, Function& function, const char* symbol) {
#ifndef _WIN32
  if (library) function = reinterpret_cast<Function>(dlsym(library, symbol));
#endif
  return function;
}

void Maker::find(void* library) {
  bool whole = true;
  const auto find = [&](auto& function, const char* symbol) { whole = take(library, function, symbol) && whole; };
  const auto number = [&](int32_t& value, const char* symbol) {
    int32_t (*ask)() = nullptr;
    find(ask, symbol);
    if (ask) value = ask();
  };
  number(dtypes[F32], "aoti_torch_dtype_float32");
  number(dtypes[BF16], "aoti_torch_dtype_bfloat16");
  number(dtypes[F16], "aoti_torch_dtype_float16");
  number(cpu, "aoti_torch_device_type_cpu");
  number(cuda, "aoti_torch_device_type_cuda");
  find(address, "aoti_torch_get_data_ptr");
  find(forget, "aoti_torch_delete_tensor_object");
  find(wrap, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
  find(watched, "_ZN3c104impl20TorchDispatchModeTLS13any_modes_setEb");
  decltype(make) last = nullptr;
  find(last, "aoti_torch_empty_strided");
  if (whole) make = last;
}

PyObject* Maker::empty(const int64_t* shape, int ndim, int dtype, dlpack::Device device, void** data) const {
  if (!make || dtype > F16 || watched(false)) return nullptr;
  int64_t strides[kMaxDims], step = 1;
  for (int i = ndim - 1; i >= 0; step *= std::max<int64_t>(shape[i--], 1)) strides[i] = step;
  void* made = nullptr;
  if (make(ndim, shape, strides, dtypes[dtype], device.type == dlpack::kCuda ? cuda : cpu, device.id, &made)) return nullptr;
  PyObject* tensor = address(made, data) ? nullptr : wrap(made);
  forget(made);
  return tensor;
}

py::dict use_torch(const py::module_& torch, bool quick) {
  const py::object tensor = torch.attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->version.major > 1) found = found->before;
  if (PyErr_Occurred()) PyErr_Clear();
  if (!found || found->version.major != 1 || !found->view) {
    throw py::import_error("this torch has no DLPack C exchange interface; fastedit needs torch 2.11 or newer");
  }
  const auto kept = [](const py::object& object) { return py::object(object).release().ptr(); };
  const py::object inner = torch.attr("_C");
  torch_.exchange = found;
  torch_.empty = kept(torch.attr("empty"));
  torch_.forward_ad = kept(torch.attr("autograd").attr("forward_ad").attr("__dict__"));
  torch_.grad_enabled.keep(torch.attr("is_grad_enabled"));
  torch_.inference.keep(torch.attr("is_inference_mode_enabled"));
  torch_.graph_task.keep(inner.attr("_current_graph_task_id"));
  torch_.jit_traced.keep(inner.attr("_is_tracing"));
  const py::object is_neg = tensor.attr("is_neg"), wanted = inner.attr("TensorBase").attr("requires_grad");
  if (Py_TYPE(is_neg.ptr()) != &PyMethodDescr_Type || Py_TYPE(wanted.ptr()) != &PyGetSetDescr_Type) {
    throw py::import_error("this torch's tensors are not written as fastedit knows them");
  }
  torch_.is_neg = reinterpret_cast<PyMethodDescrObject*>(is_neg.ptr())->d_method;
  torch_.requires_grad = reinterpret_cast<PyGetSetDescrObject*>(wanted.ptr())->d_getset;
  torch_.dtypes[F32] = kept(torch.attr("float32"));
  torch_.dtypes[BF16] = kept(torch.attr("bfloat16"));
  torch_.dtypes[F16] = kept(torch.attr("float16"));
  torch_.parameter = reinterpret_cast<PyTypeObject*>(kept(torch.attr("nn").attr("Parameter")));
  torch_.tensor = reinterpret_cast<PyTypeObject*>(kept(tensor));
  torch_.inside = {}, torch_.maker = {}, torch_.jit_trace = nullptr;
  if (quick) {
    torch_.inside.find(torch);
    void* library = library_of(torch);
    torch_.maker.find(library);
    take(library, torch_.jit_trace, "_ZN5torch3jit6tracer15getTracingStateEv");
  }
  return py::dict(py::arg("negative") = torch_.inside.keys != 0, py::arg("autograd") = torch_.inside.autograd != 0,
                  py::arg("maker") = torch_.maker.make != nullptr, py::arg("trace") = torch_.jit_trace != nullptr);
}

int dtype_code(PyObject* dtype) {
  for (int code : {F32, BF16, F16}) {
    if (dtype == torch_.dtypes[code]) return code;
  }
  return OTHER;
}

}  // namespace fastedit
