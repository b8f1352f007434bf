// What other threads are calling, read from their Python frames while the GIL is held throughout.
//
// sys._current_frames() and frame.f_locals do not do for this on CPython 3.11: a frame that returns is cleared while it is
// still its thread's current one, a destructor may release the GIL meanwhile, and its locals are freed pointers then. Here
// nothing of such a frame is read, and between the first look at a frame and the last no other thread runs.
#include <opcode.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "frames.h"

namespace fastedit {
namespace {

bool returns(PyFrameObject* frame, PyCodeObject* code) {
  const auto bytes = py::reinterpret_steal<py::object>(PyCode_GetCode(code));
  const int at = PyFrame_GetLasti(frame);
  if (at < 0 || at >= PyBytes_GET_SIZE(bytes.ptr())) return true;  // not begun
  const auto op = static_cast<unsigned char>(PyBytes_AS_STRING(bytes.ptr())[at]);
#ifdef RETURN_CONST
  if (op == RETURN_CONST) return true;
#endif
  return op == RETURN_VALUE;
}

py::object first_argument(PyFrameObject* frame) {
  const auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  const auto names = py::reinterpret_steal<py::object>(PyCode_GetVarnames(reinterpret_cast<PyCodeObject*>(code.ptr())));
  PyObject* name = PyTuple_GET_ITEM(names.ptr(), 0);
#if PY_VERSION_HEX >= 0x030C0000
  auto found = py::reinterpret_steal<py::object>(PyFrame_GetVar(frame, name));
  if (!found) PyErr_Clear();
  return found;
#else
  const auto locals = py::reinterpret_steal<py::object>(PyFrame_GetLocals(frame));
  if (!locals) return PyErr_Clear(), py::object();
  return py::reinterpret_borrow<py::object>(PyDict_GetItem(locals.ptr(), name));
#endif
}

}  // namespace

py::list calls_of_other_threads(const py::frozenset& names) {
  py::list found;
#ifndef Py_GIL_DISABLED
  PyThreadState* mine = PyThreadState_Get();
  std::vector<std::pair<unsigned long, PyFrameObject*>> kept;
  const int collecting = PyGC_Disable();  // a collection runs destructors
  for (PyThreadState* thread = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(mine)); thread;
       thread = PyThreadState_Next(thread)) {
    if (thread == mine) continue;
    for (PyFrameObject* frame = PyThreadState_GetFrame(thread); frame;) {
      PyFrameObject* back = PyFrame_GetBack(frame);
      PyCodeObject* code = PyFrame_GetCode(frame);
      if (code->co_argcount > 0 && PySet_Contains(names.ptr(), code->co_name) == 1 && !returns(frame, code)) {
        kept.emplace_back(thread->thread_id, frame);  // it outlives its call while it is held
      } else {
        Py_DECREF(frame);
      }
      Py_DECREF(code);
      frame = back;
    }
  }
  if (collecting) PyGC_Enable();
  for (const auto& [ident, frame] : kept) {
    if (const py::object first = first_argument(frame)) found.append(py::make_tuple(ident, first));
    Py_DECREF(frame);
  }
#endif
  return found;
}

}  // namespace fastedit
