#include "forms.h"

#include <cfloat>
#include <cmath>

#ifdef FASTEDIT_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastedit {

namespace {

// strength: a number, one element for all rows, or one a row.
void read_strength(const Call& call, py::handle given, const View& lead, FormViews& v, Form& form) {
  PyObject* object = given.ptr();
  v.coefficient.object = nullptr;
  if (!object || object == Py_None) return;
  if (PyFloat_Check(object) || PyLong_Check(object)) {
    const double number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      refuse("strength is an integer too large for a float, expected a finite number");
    }
    if (number == 1.0) return;
    v.strength = static_cast<float>(number);
    if (!call.host() || (std::isfinite(number) && !std::isfinite(v.strength))) {
      refuse("strength is a number that the kernel cannot be given");
    }
    form.coefficient = &v.strength;
    return;
  }
  call.read(v.coefficient, object, "strength");
  const View& c = v.coefficient;
  const bool one = c.numel() == 1 && c.ndim <= 1;
  bool right = c.dtype == F32 && (one || c.ndim == lead.ndim - 1);
  for (int i = 0; right && !one && i < c.ndim; ++i) right = c.shape[i] == lead.shape[i];
  // already flat: one a row of rows that are not
  right = right || (c.dtype == F32 && c.ndim == 1 && c.shape[0] == lead.size(lead.ndim - 1));
  if (!right) refuse("strength is " + c.about() + ", expected float32 " + shape_text(lead.shape, lead.ndim - 1) + " or one number");
  if (!c.contiguous()) refuse("strength is not contiguous");
  form.coefficient = pointer<const float>(c);
  form.coefficient_stride = one ? 0 : 1;
}

}  // namespace

void read_form(const Call& call, const Given& given, const View& lead, FormViews& v, Form& form) {
  const int64_t width = lead.width();
  form = Form{};
  form.slots = 1;
  read_strength(call, given.coefficient, lead, v, form);
  const bool slotted = given.slot.ptr() && !given.slot.is_none();
  v.slot.object = nullptr;
  if (slotted) {
    const View* some = nullptr;
    for (auto [view, object, name] : {std::tuple{&v.scale, given.scale, "scale"}, std::tuple{&v.bias, given.bias, "bias"},
                                      std::tuple{&v.read, given.read, "read"}}) {
      if (object.is_none()) continue;
      call.read(*view, object.ptr(), name);
      some = view;
      break;
    }
    if (!some || some->ndim < 2 || some->shape[0] == 0) {
      refuse("slot is given, so the parameters need a leading slot dimension, e.g. (slots, width)");
    }
    form.slots = some->shape[0];
    call.read(v.slot, given.slot.ptr(), "slot");
    const View& s = v.slot;
    bool right = s.dtype == I32 && (s.ndim == lead.ndim - 1 || s.ndim == 1) && s.numel() == lead.size(lead.ndim - 1);
    for (int i = 0; right && s.ndim == lead.ndim - 1 && i < s.ndim; ++i) right = s.shape[i] == lead.shape[i];
    if (!right) refuse("slot is " + s.about() + ", expected int32 " + shape_text(lead.shape, lead.ndim - 1));
    if (!s.contiguous()) refuse("slot is not contiguous");
    form.slot = pointer<const int32_t>(s);
  }
  const auto parameter = [&](View& view, py::handle object, const char* name, std::initializer_list<int64_t> tail) {
    view.object = nullptr;
    if (!object.ptr() || object.is_none()) return static_cast<float*>(nullptr);
    int64_t shape[3] = {form.slots};
    std::copy(tail.begin(), tail.end(), shape + 1);
    if (slotted) {
      if (tail.size() == 1) call.parameter(view, object.ptr(), name, {shape[0], shape[1]}, F32);
      else call.parameter(view, object.ptr(), name, {shape[0], shape[1], shape[2]}, F32);
    } else {
      call.parameter(view, object.ptr(), name, tail, F32);
    }
    return pointer<float>(view);
  };
  form.scale = parameter(v.scale, given.scale, "scale", {width});
  form.bias = parameter(v.bias, given.bias, "bias", {width});
  v.read.object = v.offset.object = v.write.object = v.gate.object = v.rule.object = nullptr;
  const bool reads = !given.read.is_none(), writes = !given.write.is_none();
  if (reads != writes || (!given.offset.is_none() && !reads)) {
    refuse("read, offset and write belong together: read and write are both needed (offset may be None)");
  }
  if (reads) {
    call.read(v.read, given.read.ptr(), "read");
    form.rank = v.read.ndim >= 2 ? v.read.shape[v.read.ndim - 2] : 0;
    if (form.rank < 1 || form.rank > kMaxRank) {
      refuse("read has shape " + shape_text(v.read.shape, v.read.ndim) + ", expected (rank, width) with rank 1 to 64");
    }
    form.read = parameter(v.read, given.read, "read", {form.rank, width});
    form.write = parameter(v.write, given.write, "write", {form.rank, width});
    form.offset = parameter(v.offset, given.offset, "offset", {form.rank});
  }
  if (!given.gate.ptr() || !given.rule.ptr() || (given.gate.is_none() && given.rule.is_none())) return;
  if (given.gate.is_none() || given.rule.is_none()) refuse("gate and rule belong together: one is given without the other");
  form.gate = parameter(v.gate, given.gate, "gate", {width});
  form.rule = parameter(v.rule, given.rule, "rule", {3});
}

void HostOrder::sort(const int32_t* slot, int64_t rows, int64_t slots) {
  if (rows > INT32_MAX || slots >= INT32_MAX) refuse("more rows or slots than the kernels can count");
  const auto group = [&](int64_t row) { return static_cast<size_t>(slot[row] < 0 || slot[row] >= slots ? 0 : slot[row] + 1); };
  const size_t edges = static_cast<size_t>(slots) + 1;
  std::vector<int32_t> counts(edges);
  for (int64_t row = 0; row < rows; ++row) ++counts[group(row)];
  first_.assign(edges, 0);  // where each group begins; once its rows are placed, where it ends: the next slot's first
  for (size_t g = 1; g < edges; ++g) first_[g] = first_[g - 1] + counts[g - 1];
  order_.resize(static_cast<size_t>(rows ? rows : 1));
  for (int64_t row = 0; row < rows; ++row) order_[static_cast<size_t>(first_[group(row)]++)] = static_cast<int32_t>(row);
  blocks_.assign(edges, 0);
  for (size_t s = 1; s < edges; ++s) {
    blocks_[s] = blocks_[s - 1] + static_cast<int32_t>((counts[s] + kBlockRows - 1) / kBlockRows);
  }
}

void read_order(const Call& call, py::handle given, int64_t rows, int64_t slots, SlotOrder& order) {
  if (!given.ptr() || given.is_none()) refuse("on a GPU rows come sorted by slot");
  const auto parts = given.cast<py::tuple>();
  View views[3];
  call.parameter(views[0], parts[0].ptr(), "order", {rows}, I32);
  call.parameter(views[1], parts[1].ptr(), "first", {slots + 1}, I32);
  call.parameter(views[2], parts[2].ptr(), "block_first", {slots + 1}, I32);
  order = {pointer<const int32_t>(views[0]), pointer<const int32_t>(views[1]), pointer<const int32_t>(views[2])};
}

void check_error(int error, const char* op) {
  if (!error) return;
  if (error == -1) {
    PyErr_NoMemory();
    throw py::error_already_set();
  }
  std::string text = std::string("fastedit's ") + op + " failed with CUDA error " + std::to_string(error);
#ifdef FASTEDIT_CUDA
  text += std::string(" (") + cudaGetErrorName(static_cast<cudaError_t>(error)) + ")";
#endif
  throw std::runtime_error(text);
}

#ifdef FASTEDIT_CUDA
OnDevice::OnDevice(bool host, int device) {
  int now = 0;
  if (host || cudaGetDevice(&now) || now == device) return;
  check_error(cudaSetDevice(device), "device");
  before_ = now;
}
OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}
#else
OnDevice::OnDevice(bool, int) {}
OnDevice::~OnDevice() {}
#endif

}  // namespace fastedit
