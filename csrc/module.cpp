// The native module: kernels/abi.h as functions of tensors. No arithmetic here, and no framework's headers. What every call
// needs is pybind11's, but for its way of calling: a function of twenty arguments took 0.46 us to enter, of three 0.11.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/openmp.h"
#include "forms.h"
#include "frames.h"
#include "torch.h"
#include "xla.h"

namespace fastedit {

namespace {

template <class Args>
Args packed(const py::bytes& fields) {
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(fields.ptr(), &data, &size)) throw py::error_already_set();
  if (size != sizeof(Args)) throw py::type_error("the packed struct has " + std::to_string(size) + " bytes, expected " + std::to_string(sizeof(Args)));
  Args args;
  std::memcpy(&args, data, sizeof(Args));
  return args;
}

// A kernel over a packed struct of abi.h, addresses in it: for counting its instructions without a framework.
void raw(const std::string& op, const py::bytes& fields) {
#define FASTEDIT_RAW_FORWARD(name, Args) \
  if (op == #name) return check_error(cpu::name(packed<Args>(fields), nullptr), #name);
#define FASTEDIT_RAW_BACKWARD(name, Args) \
  if (op == #name) return check_error(cpu::name(packed<Args>(fields), nullptr, nullptr), #name);
#define FASTEDIT_RAW_F(space, name, Args) FASTEDIT_RAW_FORWARD(name, Args)
#define FASTEDIT_RAW_B(space, name, Args) FASTEDIT_RAW_BACKWARD(name, Args)
  FASTEDIT_EACH_OP(FASTEDIT_RAW_F, FASTEDIT_RAW_B, cpu)
  throw py::value_error("there is no op " + op);
}

// The bytes of workspace that a packed struct needs, on the backend that needs most: for XLA, which plans ahead.
int64_t workspace(const std::string& op, const py::bytes& fields) {
#ifdef FASTEDIT_CUDA
#define FASTEDIT_SIZE(name, args) std::max(cpu::name##_workspace(args), cuda::name##_workspace(args))
#else
#define FASTEDIT_SIZE(name, args) cpu::name##_workspace(args)
#endif
#define FASTEDIT_NO_SIZE(space, name, Args)
#define FASTEDIT_ITS_SIZE(space, name, Args)     \
  if (op == #name) {                             \
    const Args args = packed<Args>(fields);      \
    return FASTEDIT_SIZE(name, args);            \
  }
  FASTEDIT_EACH_OP(FASTEDIT_NO_SIZE, FASTEDIT_ITS_SIZE, cpu)
  return 0;
}

// The libgomp in torch's folder, without importing torch; "" where there is none.
std::string torch_openmp() try {
  const py::object spec = py::module_::import("importlib.util").attr("find_spec")("torch");
  if (spec.is_none() || spec.attr("origin").is_none()) return "";
  const py::object home = py::module_::import("pathlib").attr("Path")(spec.attr("origin")).attr("parent");
  for (const py::handle file : home.attr("joinpath")("lib").attr("glob")("libgomp*.so*")) return py::str(file);
  return "";
} catch (py::error_already_set&) {  // a torch without a spec
  return "";
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastedit's native kernels over tensors; call them through fastedit.ops or fastedit.arrays.";
  const std::string openmp = torch_openmp();
  cpu::find_openmp(openmp.empty() ? nullptr : openmp.c_str());
  m.attr("OPENMP") = cpu::openmp_path();  // its path; "" for one thread, None where the compiler's own is linked
  m.def("set_num_threads", cpu::set_openmp_threads, "How many threads parallel regions begun by this thread take.");
  static PyMethodDef ready_functions[] = {
      {"holds", holds, METH_O, nullptr},
      {"bound", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&bound)), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  for (PyMethodDef* functions : {forward_functions, backward_functions, ready_functions}) {
    if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();
  }
  m.def("use_torch", use_torch, py::arg("torch"), py::arg("quick") = true);
  m.def("calls_of_other_threads", calls_of_other_threads);
  m.def("serve", serve);
  m.def("raw", raw);
  m.def("workspace", workspace);
  m.def("instruction_set", [] { return cpu::isa_name(); }, "The instruction set of the CPU kernels in use.");
  m.def("set_instruction_set", [](const std::string& name) {
    if (!cpu::set_isa(name.c_str())) throw py::value_error("no CPU kernels for '" + name + "' on this machine");
  }, "Choose among the compiled CPU kernels: baseline, avx2 or avx512, where this processor has them.");
  m.def("xla_handlers", [] {
    py::list all;
    for (int i = 0; i < kXlaHandlerCount; ++i) {
      const XlaHandler& one = kXlaHandlers[i];
      all.append(py::make_tuple(one.platform, one.op, py::capsule(reinterpret_cast<void*>(one.handler))));
    }
    return all;
  }, "(platform, op, capsule) of each XLA handler, for jax.ffi.register_ffi_target.");
#define FASTEDIT_NAME_OF(space, op, Args) #op,
  const char* const ops[] = {FASTEDIT_EACH_OP(FASTEDIT_NAME_OF, FASTEDIT_NAME_OF, cpu)};
  py::list names;
  for (const char* op : ops) names.append(op);
  m.attr("OPS") = py::tuple(names);
  m.attr("POISONS") = poisons();
  m.attr("MAX_RANK") = static_cast<int64_t>(kMaxRank);
#ifdef FASTEDIT_CUDA
  m.attr("CUDA_ARCHITECTURES") = FASTEDIT_CUDA_ARCHITECTURES;
#else
  m.attr("CUDA_ARCHITECTURES") = "";
#endif
}

}  // namespace fastedit
