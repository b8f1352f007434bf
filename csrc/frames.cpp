// What other threads are calling, read from their Python frames.
//
// A frame that runs in another thread must be read in one hold of the GIL: CPython 3.11 copies a frame's variables into the
// dict behind f_locals, which frees what the dict held from the last time; a destructor may release the GIL there, and the
// frame may be gone when the copy goes on. sys._current_frames() and f_locals crashed so. Here nothing is freed on the way: no
// collection runs, and the dict is emptied again. A frame that uses it itself is not read; what it has called stands for it.
#include "frames.h"

#include <initializer_list>

namespace fastedit {
namespace {

// A frame's first argument. Null where there is none, or where it may not be read.
py::object first_argument(PyFrameObject* frame) {
  const auto own = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  auto* code = reinterpret_cast<PyCodeObject*>(own.ptr());
  if (!code->co_argcount) return {};
  const auto variables = py::reinterpret_steal<py::object>(PyCode_GetVarnames(code));
  PyObject* name = PyTuple_GET_ITEM(variables.ptr(), 0);
#if PY_VERSION_HEX >= 0x030C0000  // a variable by itself, without that dict
  auto found = py::reinterpret_steal<py::object>(PyFrame_GetVar(frame, name));
  if (!found) PyErr_Clear();
#else
  for (const char* user : {"locals", "vars", "dir"}) {
    const py::str used(user);
    if (PySequence_Contains(code->co_names, used.ptr())) return {};
  }
  const auto locals = py::reinterpret_steal<py::object>(PyFrame_GetLocals(frame));
  if (!locals || !PyDict_Check(locals.ptr())) return PyErr_Clear(), py::object();
  auto found = py::reinterpret_borrow<py::object>(PyDict_GetItem(locals.ptr(), name));
  PyDict_Clear(locals.ptr());  // the frame still holds all of it
#endif
  return found;
}

struct NoCollection {  // a collection runs destructors
  const int was = PyGC_Disable();
  ~NoCollection() {
    if (was) PyGC_Enable();
  }
};

}  // namespace

py::list calls_of_other_threads(const py::frozenset& names) {
  py::list found;
#ifndef Py_GIL_DISABLED
  PyThreadState* mine = PyThreadState_Get();
  const NoCollection none;
  for (PyThreadState* thread = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(mine)); thread;
       thread = PyThreadState_Next(thread)) {
    PyFrameObject* inner = nullptr;  // what `frame` has called
    for (PyFrameObject* frame = thread == mine ? nullptr : PyThreadState_GetFrame(thread); frame;) {
      PyCodeObject* code = PyFrame_GetCode(frame);
      if (PySet_Contains(names.ptr(), code->co_name) == 1) {
        auto first = first_argument(frame);
        if (!first && inner) first = first_argument(inner);  // transformers' generate calls locals(), and methods of its model
        if (first) found.append(py::make_tuple(thread->thread_id, first));
      }
      Py_DECREF(code);
      Py_XDECREF(inner);
      inner = frame;
      frame = PyFrame_GetBack(frame);
    }
    Py_XDECREF(inner);
  }
#endif
  return found;
}

}  // namespace fastedit
