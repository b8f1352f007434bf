// The backward ops as functions of tensors, in the order of fastedit.kernels.reference: gradients that are wanted, None for
// the others. A coefficient's gradient is one number per row, also where all rows share it.
#include <cstring>

#include "forms.h"

namespace fastedit {

namespace {

constexpr int kFormNeeds = 6;  // scale, bias, read, offset, write, coefficient

struct Needs {
  bool wanted[8] = {};
  Needs(py::handle given, size_t least) {
    const auto flags = py::reinterpret_borrow<py::sequence>(given);
    if (flags.size() < least || flags.size() > 8) refuse("needs has " + std::to_string(flags.size()) + " flags");
    for (size_t i = 0; i < flags.size(); ++i) wanted[i] = PyObject_IsTrue(py::object(flags[i]).ptr()) == 1;
  }
  bool operator[](size_t i) const { return wanted[i]; }
};

// Streams of rows beside the leading ones: as many, as wide.
struct Stream {
  View view;
  int64_t stride = 0;

  void read(const Call& call, py::handle object, const char* name, const Rows& like, int dtype) {
    call.read(view, object.ptr(), name);
    if (!view.given()) return;
    const Rows rows = call.rows(view, name);
    if (rows.rows != like.rows || rows.width != like.width || (dtype != OTHER && view.dtype != dtype)) {
      refuse(std::string(name) + " is " + view.about() + ", which does not fit the other rows");
    }
    stride = rows.stride;
  }
  const void* data() const { return pointer<const void>(view); }
};

const float* per_row(const Call& call, View& view, py::handle object, const char* name, int64_t numbers) {
  call.read(view, object.ptr(), name);
  if (!view.given()) return nullptr;
  if (view.dtype != F32 || view.numel() != numbers || !view.contiguous()) refuse(std::string(name) + " is " + view.about());
  return pointer<const float>(view);
}

void clear(const Call& call, const py::object& made, const View& out) {
  if (made && call.host()) std::memset(out.data, 0, static_cast<size_t>(out.numel() * out.itemsize));
}

// The gradients of a form: tensors for Python, pointers for the kernel.
struct FormGrads {
  py::object objects[kFormNeeds];
  View views[kFormNeeds];
  HostOrder sorted;

  void make(const Call& call, const FormViews& v, const Needs& needs, size_t first, int64_t rows, FormGrad& grad) {
    const View* like[] = {&v.scale, &v.bias, &v.read, &v.offset, &v.write};
    float** to[] = {&grad.scale, &grad.bias, &grad.read, &grad.offset, &grad.write, &grad.coefficient};
    for (size_t i = 0; i < kFormNeeds; ++i) {
      if (!needs[first + i]) continue;
      if (i < 5 && !like[i]->given()) refuse("a gradient is wanted of a parameter that is not there");
      objects[i] = i < 5 ? call.like(*like[i], views[i]) : call.make({rows}, F32, views[i]);
      *to[i] = pointer<float>(views[i]);
    }
  }
  void order(const Call& call, const Form& form, const Needs& needs, size_t first, py::handle given, int64_t rows, SlotOrder& to) {
    bool any = false;
    for (size_t i = 0; i < 5; ++i) any = any || needs[first + i];
    if (!form.slot || !any) return;
    if (!call.host()) return read_order(call, given, rows, form.slots, to);
    sorted.sort(form.slot, rows, form.slots);
    to = sorted.order();
  }
  void zero(const Call& call) const {
    for (size_t i = 0; i < kFormNeeds; ++i) clear(call, objects[i], views[i]);
  }
  py::object at(size_t i) const { return objects[i] ? objects[i] : py::none(); }
};

py::object none_or(const py::object& object) { return object ? object : py::none(); }

// A gradient of rows in the shape of `shaped`.
py::object rows_like(const Call& call, const View& shaped, int64_t width, int dtype, View& out) {
  if (shaped.width() == width && shaped.dtype == dtype) return call.like(shaped, out);
  int64_t shape[kMaxDims];
  std::copy(shaped.shape, shaped.shape + shaped.ndim, shape);
  shape[shaped.ndim - 1] = width;
  return call.make(shape, shaped.ndim, dtype, out);
}

// No rows: sums of nothing. On a GPU the caller makes them.
bool nothing(const Call& call, int64_t rows, int64_t width) {
  if (rows && width) return false;
  if (!call.host()) refuse("there are no rows");
  return true;
}

template <bool sure>
py::object edit_backward(py::handle grad, py::handle hidden, py::handle residual, py::handle scale, py::handle bias,
                         py::handle read, py::handle offset, py::handle write, py::handle slot, py::handle coefficient,
                         py::handle grad_z, py::handle z, py::handle wanted, py::handle out_dtype, py::handle order) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    const Needs needs(wanted, 7);
    Stream grads, hiddens, residuals;
    View lead, grad_zs, zs, d_hidden;
    FormViews views;
    FormGrads d;
    EditBackwardArgs a{};
    const bool has_grad = !grad.is_none(), has_hidden = !hidden.is_none();
    call.lead(lead, (has_grad ? grad : has_hidden ? hidden : grad_z).ptr(), has_grad ? "grad" : has_hidden ? "hidden" : "grad_z");
    Rows at = call.rows(lead, "the rows");
    View reads;
    call.read(reads, read.ptr(), "read");
    if (!has_grad && !has_hidden) {
      if (!reads.given()) refuse("grad_z without read");
      at.width = reads.width();
    }
    int64_t shape[kMaxDims];
    std::copy(lead.shape, lead.shape + lead.ndim, shape);
    shape[lead.ndim - 1] = at.width;
    View shaped = lead;
    shaped.shape = shape;
    read_form(call, {scale, bias, read, offset, write, slot, coefficient, py::none(), py::none()}, shaped, views, a.form);
    int dtype = out_dtype.is_none() ? lead.dtype : dtype_code(out_dtype.ptr());
    if (dtype > F16) refuse("hidden states of that dtype are served by the reference alone");
    grads.read(call, grad, "grad", at, OTHER);
    hiddens.read(call, hidden, "hidden", at, dtype);
    if (has_hidden) residuals.read(call, residual, "residual", at, dtype);
    a.rows = at.rows;
    a.width = at.width;
    a.grad_dtype = has_grad ? grads.view.dtype : dtype;
    if (a.grad_dtype != dtype && (a.grad_dtype != F32 || (call.host() && dtype == F16))) refuse("grad has another dtype");
    a.hidden_dtype = dtype;
    a.grad = grads.data();
    a.grad_stride = grads.stride;
    a.hidden = hiddens.data();
    a.hidden_stride = hiddens.stride;
    if (has_hidden && residuals.view.given()) {
      a.residual = residuals.data();
      a.residual_stride = residuals.stride;
    }
    a.grad_z = per_row(call, grad_zs, grad_z, "grad_z", at.rows * a.form.rank);
    a.z = per_row(call, zs, z, "z", at.rows * a.form.rank);
    const bool reads_hidden = needs[1] || needs[3] || (needs[6] && a.form.scale);
    if ((reads_hidden && has_grad && !a.hidden) || (a.form.rank && has_grad && (needs[5] || needs[6]) && !a.z)) {
      refuse("a gradient is wanted whose hidden states or projection are not given");
    }
    py::object d_rows;
    if (needs[0]) {
      d_rows = rows_like(call, lead, at.width, dtype, d_hidden);
      a.d_hidden = d_hidden.data;
    }
    d.make(call, views, needs, 1, at.rows, a.d_form);
    if (nothing(call, at.rows, at.width)) {
      d.zero(call);
    } else {
      d.order(call, a.form, needs, 1, order, at.rows, a.slot_order);
      backward(call, "edit_backward", a, FASTEDIT_ALL(edit_backward));
    }
    return py::make_tuple(none_or(d_rows), d.at(0), d.at(1), d.at(2), d.at(3), d.at(4), d.at(5));
  });
}

template <bool sure>
py::object edit_add_norm_backward(py::handle grad_residual, py::handle grad_normed, py::handle residual_out, py::handle x,
                                  py::handle residual, py::handle weight, py::handle mean, py::handle rstd, py::handle scale,
                                  py::handle bias, py::handle read, py::handle offset, py::handle write, py::handle slot,
                                  py::handle coefficient, py::handle grad_z, py::handle z, bool on_sum, int kind,
                                  py::handle wanted, py::handle wanted_norm, py::handle x_dtype, py::handle residual_dtype,
                                  py::handle order) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    const Needs needs(wanted, 8), needs_norm(wanted_norm, 2);
    View out, weights, means, rstds, grad_zs, zs, d_x, d_residual, d_weight, d_bias;
    Stream to_residual, to_normed, xs, residuals;
    FormViews views;
    FormGrads d;
    EditAddNormBackwardArgs a{};
    call.lead(out, residual_out.ptr(), "residual_out");
    const Rows at = call.rows(out, "residual_out");
    const auto code = [&](py::handle dtype) { return dtype.is_none() ? out.dtype : dtype_code(dtype.ptr()); };
    const int xd = code(x_dtype), rd = code(residual_dtype);
    if (xd > F16 || (xd != rd && (rd != F32 || on_sum || (call.host() && xd == F16))) || out.dtype != rd || !out.contiguous()) {
      refuse("rows of these dtypes are served by the reference alone");
    }
    read_form(call, {scale, bias, read, offset, write, slot, coefficient, py::none(), py::none()}, out, views, a.form);
    to_residual.read(call, grad_residual, "grad_residual", at, rd);
    to_normed.read(call, grad_normed, "grad_normed", at, rd);
    xs.read(call, x, "x", at, xd);
    if (on_sum && xs.view.given()) residuals.read(call, residual, "residual", at, rd);
    else residuals.view.object = nullptr;
    call.parameter(weights, weight.ptr(), "weight", {at.width}, rd);
    a.rows = at.rows;
    a.width = at.width;
    a.x_dtype = xd;
    a.residual_dtype = rd;
    a.grad_residual = to_residual.data();
    a.grad_residual_stride = to_residual.stride;
    a.grad_normed = to_normed.data();
    a.grad_normed_stride = to_normed.stride;
    a.residual_out = out.data;
    a.x = xs.data();
    a.x_stride = xs.stride;
    a.residual = residuals.data();
    a.residual_stride = residuals.stride;
    a.weight = pointer(weights);
    a.mean = per_row(call, means, mean, "mean", at.rows);
    a.rstd = per_row(call, rstds, rstd, "rstd", at.rows);
    a.grad_z = per_row(call, grad_zs, grad_z, "grad_z", at.rows * a.form.rank);
    a.z = per_row(call, zs, z, "z", at.rows * a.form.rank);
    a.on_sum = on_sum;
    a.kind = kind;
    const bool reads_x = needs[1] || needs[3] || (needs[6] && a.form.scale);
    if (kind < RMS || kind > LAYER || (a.grad_normed && (!a.rstd || (kind == LAYER ? !a.mean : !a.weight))) || (reads_x && !a.x) ||
        (a.form.rank && (needs[5] || needs[6]) && !a.z)) {
      refuse("a gradient is wanted whose rows, statistics or projection are not given");
    }
    const bool shared = on_sum && (needs[0] || needs[7]);  // x and the residual have one gradient
    py::object dx, dr, dw, db;
    if (needs[0] || shared) {
      dx = rows_like(call, out, at.width, xd, d_x);
      a.d_x = d_x.data;
    }
    if (needs[7] && !shared) {
      dr = call.like(out, d_residual);
      a.d_residual = d_residual.data;
    }
    d.make(call, views, needs, 1, at.rows, a.d_form);
    if (needs_norm[0]) {
      dw = call.make({at.width}, F32, d_weight);
      a.d_weight = pointer<float>(d_weight);
    }
    if (needs_norm[1]) {
      db = call.make({at.width}, F32, d_bias);
      a.d_norm_bias = pointer<float>(d_bias);
    }
    if (nothing(call, at.rows, at.width)) {
      d.zero(call);
      clear(call, dw, d_weight);
      clear(call, db, d_bias);
    } else {
      d.order(call, a.form, needs, 1, order, at.rows, a.slot_order);
      backward(call, "edit_add_norm_backward", a, FASTEDIT_ALL(edit_add_norm_backward));
    }
    if (shared && needs[7]) dr = dx;
    return py::make_tuple(none_or(dx), none_or(dr), d.at(0), d.at(1), d.at(2), d.at(3), d.at(4), d.at(5), none_or(dw), none_or(db));
  });
}

py::object project_backward(py::handle grad_z, py::handle hidden, py::handle read, py::handle wanted, py::handle out_dtype) {
  return answered(true, [&]() -> py::object {
    Call call(true);
    const Needs needs(wanted, 3);
    View grads, reads, d_hidden, d_read, d_offset;
    Stream hiddens;
    ProjectBackwardArgs a{};
    call.lead(grads, grad_z.ptr(), "grad_z");
    call.read(reads, read.ptr(), "read");
    if (!reads.given() || reads.ndim != 2 || grads.dtype != F32 || !grads.ndim || !grads.contiguous() || grads.width() != reads.shape[0]) {
      refuse("grad_z is " + grads.about() + ", which does not fit read");
    }
    a.rank = reads.shape[0];
    if (a.rank < 1 || a.rank > kMaxRank) refuse("read has a rank that the kernels do not take");
    const Rows at{grads.size(grads.ndim - 1), reads.width(), reads.width()};
    call.parameter(reads, read.ptr(), "read", {a.rank, at.width}, F32);
    const int dtype = out_dtype.is_none() ? static_cast<int>(F32) : dtype_code(out_dtype.ptr());
    if (dtype > F16) refuse("hidden states of that dtype are served by the reference alone");
    hiddens.read(call, hidden, "hidden", at, dtype);
    if (needs[1] && !hiddens.view.given()) refuse("the gradient of read is wanted, and hidden is not given");
    a.rows = at.rows;
    a.width = at.width;
    a.dtype = dtype;
    a.grad_z = pointer<const float>(grads);
    a.hidden = hiddens.data();
    a.hidden_stride = hiddens.stride;
    a.read = pointer<const float>(reads);
    py::object dh, dr, d_o;
    if (needs[0]) {
      dh = rows_like(call, grads, at.width, dtype, d_hidden);
      a.d_hidden = d_hidden.data;
    }
    if (needs[1]) {
      dr = call.like(reads, d_read);
      a.d_read = pointer<float>(d_read);
    }
    if (needs[2]) {
      d_o = call.make({a.rank}, F32, d_offset);
      a.d_offset = pointer<float>(d_offset);
    }
    if (nothing(call, at.rows, at.width)) {
      clear(call, dr, d_read);
      clear(call, d_o, d_offset);
      if (at.rows && d_o) refuse("rows of no columns are served by the reference alone");
    } else {
      backward(call, "project_backward", a, FASTEDIT_ALL(project_backward));
    }
    return py::make_tuple(none_or(dh), none_or(dr), none_or(d_o));
  });
}

}  // namespace

void bind_backwards(py::module_& m) {
  const auto none = py::none();
  using a = py::arg;
  for (bool sure : {true, false}) {
    m.def(sure ? "edit_backward" : "try_edit_backward", sure ? edit_backward<true> : edit_backward<false>, a(), a(), a(), a(), a(),
          a(), a(), a(), a(), a(), a(), a(), a("needs"), a("dtype"), a("order") = none);
    m.def(sure ? "edit_add_norm_backward" : "try_edit_add_norm_backward",
          sure ? edit_add_norm_backward<true> : edit_add_norm_backward<false>, a(), a(), a(), a(), a(), a(), a(), a(), a(), a(),
          a(), a(), a(), a(), a(), a(), a(), a("on_sum"), a("kind"), a("needs"), a("needs_norm"), a("x_dtype"),
          a("residual_dtype"), a("order") = none);
  }
  m.def("project_backward", project_backward);
}

}  // namespace fastedit
