#include "forms.h"

#include <cmath>

#ifdef FASTEDIT_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastedit {

namespace {

// One number per row of `lead` (…, width): shaped as they are, or flat.
bool one_a_row(const View& v, const View& lead) {
  bool same = v.ndim == lead.ndim - 1;
  for (int i = 0; same && i < v.ndim; ++i) same = v.shape[i] == lead.shape[i];
  return same || (v.ndim == 1 && v.shape[0] == lead.size(lead.ndim - 1));
}

// strength: a number, one element for all rows, or one per row.
void read_strength(const Call& call, PyObject* object, const View& lead, FormViews& v, Form& form) {
  if (PyFloat_Check(object) || PyLong_Check(object)) {
    const double number = as_double(object);
    if (number == 1.0) return;
    v.strength = static_cast<float>(number);
    if (!call.host() || (std::isfinite(number) && !std::isfinite(v.strength))) {
      refuse("strength is a number that the kernel cannot be given");
    }
    form.coefficient = &v.strength;
    return;
  }
  View& c = v.coefficient;
  call.read(c, object, "strength");
  if (!c.given()) return;
  const bool one = c.numel() == 1 && c.ndim <= 1;
  if (c.dtype != F32 || !(one || one_a_row(c, lead))) {
    refuse("strength is " + c.about() + ", expected float32 " + shape_text(lead.shape, lead.ndim - 1) + " or one number");
  }
  if (!c.contiguous()) refuse("strength is not contiguous");
  form.coefficient = c;
  form.coefficient_stride = one ? 0 : 1;
}

}  // namespace

void read_form(const Call& call, const Given& given, int first, int gate, const View& lead, FormViews& v, Form& form) {
  const int64_t width = lead.width();
  const bool slotted = given.has(first + 5), reads = given.has(first + 2);
  form.slots = 1;
  read_strength(call, given[first + 6], lead, v, form);
  if (reads != given.has(first + 4) || (given.has(first + 3) && !reads)) {
    refuse("read, offset and write belong together: read and write are both needed (offset may be None)");
  }
  if (slotted) {
    int some = first;
    while (some < first + 2 && !given.has(some)) ++some;
    View leading;
    call.read(leading, given[some], "a parameter");
    if (!leading.given() || leading.ndim < 2 || leading.shape[0] == 0) {
      refuse("slot is given, so the parameters need a leading slot dimension, e.g. (slots, width)");
    }
    form.slots = leading.shape[0];
    call.read(v.slot, given[first + 5], "slot");
    if (v.slot.dtype != I32 || !one_a_row(v.slot, lead)) {
      refuse("slot is " + v.slot.about() + ", expected int32 " + shape_text(lead.shape, lead.ndim - 1));
    }
    if (!v.slot.contiguous()) refuse("slot is not contiguous");
    form.slot = v.slot;
  }
  if (reads) {
    call.read(v.read, given[first + 2], "read");
    form.rank = v.read.ndim >= 2 ? v.read.shape[v.read.ndim - 2] : 0;
    if (form.rank < 1 || form.rank > kMaxRank) {
      refuse("read has shape " + shape_text(v.read.shape, v.read.ndim) + ", expected (rank, width) with rank 1 to 64");
    }
  }
  const auto vector = [&](View& view, int at, const char* name, int64_t size) -> const float* {
    if (slotted) call.parameter(view, given[at], name, {form.slots, size});
    else call.parameter(view, given[at], name, {size});
    return view;
  };
  const auto matrix = [&](View& view, int at, const char* name) -> const float* {
    if (slotted) call.parameter(view, given[at], name, {form.slots, form.rank, width});
    else call.parameter(view, given[at], name, {form.rank, width});
    return view;
  };
  form.scale = vector(v.scale, first, "scale", width);
  form.bias = vector(v.bias, first + 1, "bias", width);
  if (reads) {
    form.read = matrix(v.read, first + 2, "read");
    form.offset = vector(v.offset, first + 3, "offset", form.rank);
    form.write = matrix(v.write, first + 4, "write");
  }
  if (!gate) return;
  if (given.has(gate) != given.has(gate + 1)) refuse("gate and rule belong together: one is given without the other");
  form.gate = vector(v.gate, gate, "gate", width);
  form.rule = vector(v.rule, gate + 1, "rule", 3);
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

void read_order(const Call& call, PyObject* given, int64_t rows, int64_t slots, SlotOrder& order) {
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != 3) refuse("on a GPU rows come sorted by slot");
  View views[3];
  call.parameter(views[0], PyTuple_GET_ITEM(given, 0), "order", {rows}, I32);
  call.parameter(views[1], PyTuple_GET_ITEM(given, 1), "first", {slots + 1}, I32);
  call.parameter(views[2], PyTuple_GET_ITEM(given, 2), "block_first", {slots + 1}, I32);
  order = {views[0], views[1], views[2]};
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
