// What other threads are calling, read from their Python frames.
//
// A frame that runs in another thread must be read in one hold of the GIL: CPython 3.11 copies a frame's variables into the
// dict behind f_locals, which frees what the dict held from the last time; a destructor may release the GIL there, and the
// frame may be gone when the copy goes on. sys._current_frames() and f_locals crashed so. Here nothing is freed on the way: no
// collection runs, and the dict is emptied again. Frames that use it themselves are not read.
#include "frames.h"

#include <initializer_list>

namespace fastedit {
namespace {

#if PY_VERSION_HEX >= 0x030C0000  // a variable by itself, without that dict
py::object variable(PyFrameObject* frame, PyCodeObject*, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyFrame_GetVar(frame, name));
  if (!found) PyErr_Clear();
  return found;
}
#else
py::object variable(PyFrameObject* frame, PyCodeObject* code, PyObject* name) {
  for (const char* user : {"locals", "vars", "dir", "eval", "exec"}) {
    const py::str used(user);
    if (PySequence_Contains(code->co_names, used.ptr())) return {};
  }
  const auto locals = py::reinterpret_steal<py::object>(PyFrame_GetLocals(frame));
  if (!locals || !PyDict_Check(locals.ptr())) return PyErr_Clear(), py::object();
  const auto found = py::reinterpret_borrow<py::object>(PyDict_GetItem(locals.ptr(), name));
  PyDict_Clear(locals.ptr());  // the frame still holds all of it
  return found;
}
#endif

}  // namespace

py::list calls_of_other_threads(const py::frozenset& names) {
  py::list found;
#ifndef Py_GIL_DISABLED
  PyThreadState* mine = PyThreadState_Get();
  const int collecting = PyGC_Disable();  // a collection runs destructors
  for (PyThreadState* thread = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(mine)); thread;
       thread = PyThreadState_Next(thread)) {
    for (PyFrameObject* frame = thread == mine ? nullptr : PyThreadState_GetFrame(thread); frame;) {
      PyCodeObject* code = PyFrame_GetCode(frame);
      if (code->co_argcount > 0 && PySet_Contains(names.ptr(), code->co_name) == 1) {
        const auto variables = py::reinterpret_steal<py::object>(PyCode_GetVarnames(code));
        if (const auto first = variable(frame, code, PyTuple_GET_ITEM(variables.ptr(), 0))) {
          found.append(py::make_tuple(thread->thread_id, first));
        }
      }
      PyFrameObject* back = PyFrame_GetBack(frame);
      Py_DECREF(code);
      Py_DECREF(frame);
      frame = back;
    }
  }
  if (collecting) PyGC_Enable();
#endif
  return found;
}

}  // namespace fastedit
