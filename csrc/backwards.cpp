// The backward ops as functions of tensors, in the order of fastedit.kernels.reference: gradients that are wanted, None for
// the others. A coefficient's gradient is one number per row, also where all rows share it.
#include <cstring>

#include "forms.h"
#include "torch.h"

namespace fastedit {

namespace {

constexpr int kFormNeeds = 6;  // scale, bias, read, offset, write, coefficient

struct Needs {
  bool wanted[8] = {};
  Needs(PyObject* given, Py_ssize_t least) {
    const auto flags = py::reinterpret_borrow<py::tuple>(given);
    const auto count = static_cast<Py_ssize_t>(PyTuple_Check(given) ? flags.size() : 0);
    if (count < least || count > 8) refuse("needs has another number of flags");
    for (Py_ssize_t i = 0; i < count; ++i) wanted[i] = PyTuple_GET_ITEM(given, i) == Py_True;
  }
  bool operator[](int i) const { return wanted[i]; }
};

// Streams of rows beside the leading ones: as many, as wide.
struct Stream {
  View view;
  int64_t stride = 0;

  void read(const Call& call, PyObject* object, const char* name, const Rows& like, int dtype) {
    call.read(view, object, name);
    if (!view.given()) return;
    const Rows rows = call.rows(view, name);
    if (rows.rows != like.rows || rows.width != like.width || (dtype != OTHER && view.dtype != dtype)) {
      refuse(std::string(name) + " is " + view.about() + ", which does not fit the other rows");
    }
    stride = rows.stride;
  }
  void to(const void*& data, int64_t& its_stride) const { data = view, its_stride = stride; }
};

const float* numbers(const Call& call, PyObject* object, const char* name, int64_t count) {
  View view;
  call.read(view, object, name);
  if (view.given() && (view.dtype != F32 || view.numel() != count || !view.contiguous())) refuse(std::string(name) + " is " + view.about());
  return view;
}

// What a kernel would sum over no rows.
void clear(const Call& call, const View& out) {
  if (out.given() && call.host()) std::memset(out.data, 0, static_cast<size_t>(out.numel() * out.itemsize));
}

// The gradients of a form: tensors for Python, pointers for the kernel.
struct FormGrads {
  py::object objects[kFormNeeds];
  View views[kFormNeeds];
  HostOrder sorted;

  void make(const Call& call, const FormViews& v, const Needs& needs, int64_t rows, FormGrad& grad) {
    const View* like[] = {&v.scale, &v.bias, &v.read, &v.offset, &v.write};
    float** to[] = {&grad.scale, &grad.bias, &grad.read, &grad.offset, &grad.write, &grad.coefficient};
    for (int i = 0; i < kFormNeeds; ++i) {
      if (!needs[i + 1]) continue;
      if (i < 5 && !like[i]->given()) refuse("a gradient is wanted of a parameter that is not there");
      objects[i] = i < 5 ? call.like(*like[i], views[i]) : call.make({rows}, F32, views[i]);
      *to[i] = views[i];
    }
  }
  // False where there is nothing to sum: then the gradients are zeros. On a GPU the caller makes them.
  bool order(const Call& call, const Form& form, const Needs& needs, PyObject* given, int64_t rows, int64_t width, SlotOrder& to) {
    if (!rows || !width) {
      if (!call.host()) refuse("there are no rows");
      for (const View& view : views) clear(call, view);
      return false;
    }
    bool any = false;
    for (int i = 1; i < 6; ++i) any = any || needs[i];
    if (!form.slot || !any) return true;
    if (!call.host()) {
      read_order(call, given, rows, form.slots, to);
    } else {
      sorted.sort(form.slot, rows, form.slots);
      to = sorted.order();
    }
    return true;
  }
  py::object at(int i) const { return none_or(objects[i]); }
};

int row_dtype(PyObject* dtype, int missing) {
  const int code = dtype == Py_None ? missing : dtype_code(dtype);
  if (code > F16) refuse("hidden states of that dtype are served by the reference alone");
  return code;
}

// Whether some wanted gradient reads what was not given: rows (0 where they are), z.
void check_read(const Needs& needs, const Form& form, const void* rows, const float* z) {
  const bool reads_rows = needs[1] || needs[3] || (needs[6] && form.scale);
  if ((reads_rows && !rows) || (form.rank && (needs[5] || needs[6]) && !z)) {
    refuse("a gradient is wanted whose hidden states or projection are not given");
  }
}

// (grad, hidden, residual, 7 of the form, grad_z, z, needs, dtype, order)
py::object edit_backward(Call& call, const Given& given) {
  const Needs needs(given[12], 7);
  Stream grad, hidden, residual;
  View lead, read, d_hidden;
  FormViews views;
  FormGrads d;
  EditBackwardArgs a{};
  const int leader = given.has(0) ? 0 : given.has(1) ? 1 : 10;
  call.lead(lead, given[leader], "grad");
  Rows at = call.rows(lead, "grad");
  call.read(read, given[5], "read");
  if (leader == 10 && !read.given()) refuse("grad_z without read");
  if (leader == 10) at.width = read.width();
  View shaped = lead;  // the rows, whose width grad_z has not
  shaped.strides = nullptr;
  std::copy(lead.shape, lead.shape + lead.ndim, shaped.own);
  shaped.own[lead.ndim - 1] = at.width;
  shaped.shape = shaped.own;
  read_form(call, given, 3, 0, shaped, views, a.form);
  const int dtype = row_dtype(given[13], lead.dtype);
  grad.read(call, given[0], "grad", at, OTHER);
  hidden.read(call, given[1], "hidden", at, dtype);
  if (given.has(1)) residual.read(call, given[2], "residual", at, dtype);
  a.rows = at.rows;
  a.width = at.width;
  a.grad_dtype = given.has(0) ? grad.view.dtype : dtype;
  if (a.grad_dtype != dtype && (a.grad_dtype != F32 || (call.host() && dtype == F16))) refuse("grad has another dtype");
  a.hidden_dtype = dtype;
  grad.to(a.grad, a.grad_stride);
  hidden.to(a.hidden, a.hidden_stride);
  residual.to(a.residual, a.residual_stride);
  a.grad_z = numbers(call, given[10], "grad_z", at.rows * a.form.rank);
  a.z = numbers(call, given[11], "z", at.rows * a.form.rank);
  if (given.has(0)) check_read(needs, a.form, a.hidden, a.z);
  py::object d_rows;
  if (needs[0]) d_rows = call.rows_like(lead, at.width, dtype, d_hidden);
  a.d_hidden = d_hidden;
  d.make(call, views, needs, at.rows, a.d_form);
  if (d.order(call, a.form, needs, given[14], at.rows, at.width, a.slot_order)) backward(call, FASTEDIT_ALL(edit_backward));
  return py::make_tuple(none_or(d_rows), d.at(0), d.at(1), d.at(2), d.at(3), d.at(4), d.at(5));
}

// (grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, 7 of the form, grad_z, z, on_sum, kind, needs,
// needs_norm, x_dtype, residual_dtype, order)
py::object edit_add_norm_backward(Call& call, const Given& given) {
  const Needs needs(given[19], 8), needs_norm(given[20], 2);
  View out, weight, d_x, d_residual, d_weight, d_bias;
  Stream to_residual, to_normed, x, residual;
  FormViews views;
  FormGrads d;
  EditAddNormBackwardArgs a{};
  call.lead(out, given[2], "residual_out");
  const Rows at = call.rows(out, "residual_out");
  const int xd = row_dtype(given[21], out.dtype), rd = row_dtype(given[22], out.dtype);
  a.on_sum = given.flag(17);
  a.kind = static_cast<int>(given.integer(18));
  if ((xd != rd && (rd != F32 || a.on_sum || (call.host() && xd == F16))) || out.dtype != rd || !out.contiguous()) {
    refuse("rows of these dtypes are served by the reference alone");
  }
  read_form(call, given, 8, 0, out, views, a.form);
  to_residual.read(call, given[0], "grad_residual", at, rd);
  to_normed.read(call, given[1], "grad_normed", at, rd);
  x.read(call, given[3], "x", at, xd);
  if (a.on_sum && x.view.given()) residual.read(call, given[4], "residual", at, rd);
  call.parameter(weight, given[5], "weight", {at.width}, rd);
  a.rows = at.rows;
  a.width = at.width;
  a.x_dtype = xd;
  a.residual_dtype = rd;
  to_residual.to(a.grad_residual, a.grad_residual_stride);
  to_normed.to(a.grad_normed, a.grad_normed_stride);
  a.residual_out = out;
  x.to(a.x, a.x_stride);
  residual.to(a.residual, a.residual_stride);
  a.weight = weight;
  a.mean = numbers(call, given[6], "mean", at.rows);
  a.rstd = numbers(call, given[7], "rstd", at.rows);
  a.grad_z = numbers(call, given[15], "grad_z", at.rows * a.form.rank);
  a.z = numbers(call, given[16], "z", at.rows * a.form.rank);
  check_read(needs, a.form, a.x, a.z);
  if (a.kind < RMS || a.kind > LAYER || (a.grad_normed && (!a.rstd || (a.kind == LAYER ? !a.mean : !a.weight)))) {
    refuse("a gradient is wanted whose statistics are not given");
  }
  const bool shared = a.on_sum && (needs[0] || needs[7]);  // x and the residual have one gradient
  py::object dx, dr, dw, db;
  if (needs[0] || shared) dx = call.rows_like(out, at.width, xd, d_x);
  if (needs[7] && !shared) dr = call.like(out, d_residual);
  d.make(call, views, needs, at.rows, a.d_form);
  if (needs_norm[0]) dw = call.make({at.width}, F32, d_weight);
  if (needs_norm[1]) db = call.make({at.width}, F32, d_bias);
  a.d_x = d_x, a.d_residual = d_residual, a.d_weight = d_weight, a.d_norm_bias = d_bias;
  if (d.order(call, a.form, needs, given[23], at.rows, at.width, a.slot_order)) {
    backward(call, FASTEDIT_ALL(edit_add_norm_backward));
  } else {
    clear(call, d_weight);
    clear(call, d_bias);
  }
  if (shared && needs[7]) dr = dx;
  return py::make_tuple(none_or(dx), none_or(dr), d.at(0), d.at(1), d.at(2), d.at(3), d.at(4), d.at(5), none_or(dw), none_or(db));
}

// (grad_z, hidden, read, needs, dtype)
py::object project_backward(Call& call, const Given& given) {
  const Needs needs(given[3], 3);
  View grad, read, d_hidden, d_read, d_offset;
  Stream hidden;
  ProjectBackwardArgs a{};
  call.lead(grad, given[0], "grad_z");
  call.read(read, given[2], "read");
  if (!read.given() || read.ndim != 2 || grad.dtype != F32 || !grad.ndim || !grad.contiguous() || grad.width() != read.shape[0]) {
    refuse("grad_z is " + grad.about() + ", which does not fit read");
  }
  a.rank = read.shape[0];
  if (a.rank < 1 || a.rank > kMaxRank) refuse("read has a rank that the kernels do not take");
  const Rows at{grad.size(grad.ndim - 1), read.width(), read.width()};
  call.parameter(read, given[2], "read", {a.rank, at.width});
  a.dtype = row_dtype(given[4], F32);
  hidden.read(call, given[1], "hidden", at, a.dtype);
  if (needs[1] && !hidden.view.given()) refuse("the gradient of read is wanted, and hidden is not given");
  a.rows = at.rows;
  a.width = at.width;
  a.grad_z = grad;
  hidden.to(a.hidden, a.hidden_stride);
  a.read = read;
  py::object dh, dr, d_o;
  if (needs[0]) dh = call.rows_like(grad, at.width, a.dtype, d_hidden);
  if (needs[1]) dr = call.like(read, d_read);
  if (needs[2]) d_o = call.make({a.rank}, F32, d_offset);
  a.d_hidden = d_hidden, a.d_read = d_read, a.d_offset = d_offset;
  if (at.rows && at.width) {
    backward(call, FASTEDIT_ALL(project_backward));
  } else {
    if (!call.host() || (at.rows && d_o)) refuse("rows of no columns are served by the reference alone");
    clear(call, d_read);
    clear(call, d_offset);
  }
  return py::make_tuple(none_or(dh), none_or(dr), none_or(d_o));
}

}  // namespace

PyMethodDef backward_functions[] = {
    FASTEDIT_FUNCTION("edit_backward", edit_backward, true, false),
    FASTEDIT_FUNCTION("edit_add_norm_backward", edit_add_norm_backward, true, false),
    FASTEDIT_FUNCTION("project_backward", project_backward, true, false),
    FASTEDIT_FUNCTION("try_edit_backward", edit_backward, false, false),
    FASTEDIT_FUNCTION("try_edit_add_norm_backward", edit_add_norm_backward, false, false),
    FASTEDIT_FUNCTION("try_project_backward", project_backward, false, false),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastedit
