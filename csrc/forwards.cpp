// The forward ops as functions of tensors, in the order of fastedit.kernels.reference. A caller who is sure gets every result,
// None for those not wanted; one who asks gets what fastedit.ops returns.
#include <pybind11/stl.h>

#include "forms.h"

namespace fastedit {

namespace {

template <class... Results>
py::object results(const Results&... all) {
  return py::make_tuple(none_or(all)...);
}

// The rows that an op reads, where its struct has them.
void read_rows(Call& call, const Given& given, View& view, int64_t& rows, int64_t& width, int& dtype, const void*& data,
               int64_t& stride, const char* name = "hidden") {
  call.lead(view, given[0], name);
  const Rows at = call.rows(view, name);
  rows = at.rows, width = at.width, stride = at.stride, dtype = view.dtype, data = view.data;
}
template <class Args>
void read_rows(Call& call, const Given& given, View& view, Args& a) {
  read_rows(call, given, view, a.rows, a.width, a.dtype, a.hidden, a.hidden_stride);
}

py::object projection(const Call& call, const View& rows, int64_t rank, bool wanted, float*& z) {
  if (!wanted) return {};
  if (!rank) refuse("return_projection=True needs `read`, the directions to project on; found read=None");
  View view;
  const py::object made = call.rows_like(rows, rank, F32, view);
  z = view;
  return made;
}

// (hidden, 7 of the form, want_z, gate, rule)
py::object edit(Call& call, const Given& given) {
  View rows, out;
  FormViews views;
  EditArgs a{};
  read_rows(call, given, rows, a);
  read_form(call, given, 1, 9, rows, views, a.form);
  const py::object result = call.like(rows, out), z = projection(call, rows, a.form.rank, given.flag(8), a.z);
  a.out = out;
  forward(call, FASTEDIT_BOTH(edit));
  return call.sure || z ? results(result, z) : result;
}

// What edit_add and edit_add_norm have in common: (x, residual, …, 7 of the form from `first` on, on_sum)
struct Added {
  View x, residual, out;
  FormViews views;
  py::object result, z;

  void read(Call& call, const Given& given, int first, int gate, bool want_z, bool want_out, EditAddArgs& a) {
    read_rows(call, given, x, a.rows, a.width, a.x_dtype, a.x, a.x_stride, "x");
    call.read(residual, given[1], "residual");
    if (!residual.given()) refuse_type("residual is None");
    a.residual_stride = call.rows(residual, "residual").stride;
    a.on_sum = given.flag(first + 7);
    const bool fp32 = residual.dtype == F32 && !a.on_sum && !(call.host() && x.dtype == F16);
    bool alike = x.ndim == residual.ndim && (x.dtype == residual.dtype || fp32);
    for (int i = 0; alike && i < x.ndim; ++i) alike = x.shape[i] == residual.shape[i];
    if (!alike) refuse("residual is " + residual.about() + ", expected " + x.about() + " as the rows");
    read_form(call, given, first, gate, x, views, a.form);
    a.residual_dtype = residual.dtype;
    a.residual = residual;
    if (want_out) {
      result = call.like(residual, out);
      a.out = out;
    }
    z = projection(call, x, a.form.rank, want_z, a.z);
  }
};

// (x, residual, 7 of the form, on_sum, want_z, gate, rule)
py::object edit_add(Call& call, const Given& given) {
  Added added;
  EditAddArgs a{};
  added.read(call, given, 2, 11, given.flag(10), true, a);
  forward(call, FASTEDIT_BOTH(edit_add));
  return call.sure || added.z ? results(added.result, added.z) : added.result;
}

// (x, residual, weight, norm_bias, 7 of the form, on_sum, kind, eps, want_z, want_residual, want_stats, gate, rule)
py::object edit_add_norm(Call& call, const Given& given) {
  Added added;
  EditAddNormArgs a{};
  const bool want_stats = given.flag(16, true);
  added.read(call, given, 4, 17, given.flag(14), given.flag(15, true), a.add);
  View weight, norm_bias, normed, mean, rstd;
  call.parameter(weight, given[2], "weight", {a.add.width}, added.residual.dtype);
  call.parameter(norm_bias, given[3], "norm_bias", {a.add.width}, added.residual.dtype);
  a.kind = given.count > 12 ? static_cast<int>(given.integer(12)) : RMS;
  a.eps = given.count > 13 ? given.number(13) : 1e-6f;
  if (a.kind < RMS || a.kind > LAYER || (a.kind != LAYER && (!weight.given() || norm_bias.given()))) {
    refuse("the norm's kind does not fit its weight and bias");
  }
  a.weight = weight;
  a.norm_bias = norm_bias;
  const py::object result = call.like(added.residual, normed);
  a.normed = normed;
  py::object means, rstds;
  if (want_stats) rstds = call.make({a.add.rows}, F32, rstd);
  if (want_stats && a.kind == LAYER) means = call.make({a.add.rows}, F32, mean);
  a.rstd = rstd;
  a.mean = mean;
  forward(call, FASTEDIT_BOTH(edit_add_norm));
  if (call.sure || want_stats) return results(added.result, result, added.z, means, rstds);
  return added.z ? results(added.result, result, added.z) : results(added.result, result);
}

// (hidden, read, offset)
py::object project(Call& call, const Given& given) {
  View rows, read, offset;
  ProjectArgs a{};
  read_rows(call, given, rows, a);
  call.read(read, given[1], "read");
  a.rank = read.given() && read.ndim == 2 ? read.shape[0] : 0;
  if (a.rank < 1 || a.rank > kMaxRank) refuse("read has another shape than (rank, width) with rank 1 to 64");
  call.parameter(read, given[1], "read", {a.rank, a.width});
  call.parameter(offset, given[2], "offset", {a.rank});
  a.read = read;
  a.offset = offset;
  const py::object result = projection(call, rows, a.rank, true, a.z);
  forward(call, FASTEDIT_BOTH(project));
  return result;
}

// (hidden, group, groups, order) → ((groups + 1,) int32 where each group begins, or None without groups; mean and m2,
// (2, groups, width): high and low parts)
py::object moments(Call& call, const Given& given) {
  View rows, group, mean, m2;
  MomentsArgs a{};
  HostOrder own;
  py::object first;
  read_rows(call, given, rows, a);
  a.groups = given.integer(2);
  if (a.groups < 1) refuse("groups is " + std::to_string(a.groups) + ", expected a number of groups from 1 on");
  call.read(group, given[1], "group");
  if (!group.given() && a.groups != 1) refuse("groups without group");
  if (group.given() && (group.dtype != I32 || group.numel() != a.rows || !group.contiguous())) {
    refuse("group is " + group.about() + ", expected int32 " + shape_text(rows.shape, rows.ndim - 1));
  }
  if (group.given() && call.host()) {
    own.sort(group, a.rows, a.groups);
    a.group_order = own.order();
    first = py::cast(own.first());
  } else if (group.given()) {
    read_order(call, given[3], a.rows, a.groups, a.group_order);
  }
  const py::object means = call.make({2, a.groups, a.width}, F32, mean), m2s = call.make({2, a.groups, a.width}, F32, m2);
  a.mean = mean;
  a.m2 = m2;
  backward(call, FASTEDIT_ALL(moments));
  return results(first, means, m2s);
}

// (hidden, weight, bias, weight2, bias2, head, gram, steps, step_size)
py::object value_ascent(Call& call, const Given& given) {
  View rows, weight, bias, weight2, bias2, head, gram, out;
  ValueAscentArgs a{};
  read_rows(call, given, rows, a);
  if (!call.host()) refuse("value_ascent takes arrays on the host; fastedit.ops.value_ascent serves a GPU");
  call.read(weight, given[1], "weight");
  call.read(weight2, given[3], "weight2");
  if (!weight.given() || weight.ndim != 2) refuse("weight is missing or not (units, width)");
  if (weight2.given() && weight2.ndim != 2) refuse("weight2 is " + weight2.about() + ", expected (units2, units)");
  if (weight2.given() != given.has(4)) refuse("weight2 and bias2 belong together: one is given without the other");
  a.units = weight.shape[0];
  a.units2 = weight2.given() ? weight2.shape[0] : 0;
  if (weight2.given() && a.units2 == 0) refuse("weight2 has no units");
  call.parameter(weight, given[1], "weight", {a.units, a.width});
  call.parameter(bias, given[2], "bias", {a.units});
  call.parameter(weight2, given[3], "weight2", {a.units2, a.units});
  call.parameter(bias2, given[4], "bias2", {a.units2});
  call.parameter(head, given[5], "head", {weight2.given() ? a.units2 : a.units});
  call.parameter(gram, given[6], "gram", {a.units, a.units});
  if (!bias.given() || !head.given() || !gram.given()) refuse("bias, head or gram is None, and the ascent needs them");
  a.steps = given.integer(7);
  a.step_size = given.number(8);
  a.weight = weight, a.bias = bias, a.weight2 = weight2, a.bias2 = bias2, a.head = head, a.gram = gram;
  const py::object result = call.like(rows, out);
  a.out = out;
  forward(call, FASTEDIT_BOTH(value_ascent));
  return result;
}

// The other way of abi.h, for a GPU: (z, slope, head, gram, steps, step_size) → (rows, units) of Σ_t 1[z_t > 0] ⊙ head
py::object value_ascent_flips(Call& call, const Given& given) {
  View z, slope, head, gram, total;
  ValueAscentArgs a{};
  call.lead(z, given[0], "z");
  if (z.ndim != 2) refuse("z is " + z.about() + ", expected (rows, units)");
  a.rows = z.shape[0];
  a.units = z.shape[1];
  call.parameter(z, given[0], "z", {a.rows, a.units});
  call.parameter(slope, given[1], "slope", {a.rows, a.units});
  call.parameter(head, given[2], "head", {a.units});
  call.parameter(gram, given[3], "gram", {a.units, a.units});
  a.steps = given.integer(4);
  a.step_size = given.number(5);
  a.head = head, a.gram = gram, a.z = z, a.slope = slope;
  const py::object result = call.like(z, total);
  a.total = total;
  forward(call, FASTEDIT_BOTH(value_ascent));
  return result;
}

}  // namespace

PyMethodDef forward_functions[] = {
    FASTEDIT_FUNCTION("edit", edit, true, false),
    FASTEDIT_FUNCTION("edit_add", edit_add, true, false),
    FASTEDIT_FUNCTION("edit_add_norm", edit_add_norm, true, false),
    FASTEDIT_FUNCTION("project", project, true, false),
    FASTEDIT_FUNCTION("moments", moments, true, false),
    FASTEDIT_FUNCTION("value_ascent", value_ascent, true, false),
    FASTEDIT_FUNCTION("value_ascent_flips", value_ascent_flips, true, false),
    FASTEDIT_FUNCTION("try_edit", edit, false, true),
    FASTEDIT_FUNCTION("try_edit_add", edit_add, false, true),
    FASTEDIT_FUNCTION("try_edit_add_norm", edit_add_norm, false, true),
    FASTEDIT_FUNCTION("try_project", project, false, true),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastedit
