// What other threads are calling.
#pragma once
#include <pybind11/pybind11.h>

namespace fastedit {

namespace py = pybind11;

// [(thread's ident, first argument)] of the other threads' frames with one of these names, each thread's innermost first. For a
// frame that cannot be read, the first argument of what it has called.
// Empty on a build without the GIL.
py::list calls_of_other_threads(const py::frozenset& names);

}  // namespace fastedit
