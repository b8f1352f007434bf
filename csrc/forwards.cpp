// The forward ops as functions of tensors: edit, edit_add, edit_add_norm, project, moments, value_ascent.
#include <pybind11/stl.h>

#include "forms.h"

namespace fastedit {

namespace {

py::object none_or(const py::object& object) { return object ? object : py::none(); }

// What `edit_add` and `edit_add_norm` have in common, filled in place.
struct Added {
  View x, residual, out, z;
  FormViews views;
  py::object out_object, z_object;

  void read(Call& call, PyObject* x_object, PyObject* residual_object, const Given& given, bool on_sum, bool want_z,
            bool want_out, EditAddArgs& a) {
    call.lead(x, x_object, "x");
    call.read(residual, residual_object, "residual");
    if (!residual.given()) refuse_type("residual is None");
    const Rows rows = call.rows(x, "x"), added = call.rows(residual, "residual");
    const bool fp32 = residual.dtype == F32 && !on_sum && !(call.host() && x.dtype == F16);
    bool alike = x.ndim == residual.ndim && (x.dtype == residual.dtype || fp32);
    for (int i = 0; alike && i < x.ndim; ++i) alike = x.shape[i] == residual.shape[i];
    if (!alike) refuse("residual is " + residual.about() + ", expected " + x.about() + " as the rows");
    read_form(call, given, x, views, a.form);
    a.rows = rows.rows;
    a.width = rows.width;
    a.x_dtype = x.dtype;
    a.residual_dtype = residual.dtype;
    a.x = x.data;
    a.x_stride = rows.stride;
    a.residual = residual.data;
    a.residual_stride = added.stride;
    a.on_sum = on_sum;
    if (want_out) {
      out_object = call.like(residual, out);
      a.out = out.data;
    }
    z_object = project_to(call, x, a.form.rank, want_z, z);
    a.z = z_object ? pointer<float>(z) : nullptr;
  }

  static py::object project_to(const Call& call, const View& rows, int64_t rank, bool wanted, View& z) {
    if (!wanted) return {};
    if (!rank) refuse("return_projection=True needs `read`, the directions to project on; found read=None");
    int64_t shape[kMaxDims];
    std::copy(rows.shape, rows.shape + rows.ndim, shape);
    shape[rows.ndim - 1] = rank;
    return call.make(shape, rows.ndim, F32, z);
  }
};

template <bool sure>
py::object edit(py::handle hidden, py::handle scale, py::handle bias, py::handle read, py::handle offset, py::handle write,
                py::handle slot, py::handle coefficient, bool want_z, py::handle gate, py::handle rule) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    View rows, out, z;
    FormViews views;
    EditArgs a{};
    call.lead(rows, hidden.ptr(), "hidden");
    const Rows at = call.rows(rows, "hidden");
    read_form(call, {scale, bias, read, offset, write, slot, coefficient, gate, rule}, rows, views, a.form);
    a.rows = at.rows;
    a.width = at.width;
    a.dtype = rows.dtype;
    a.hidden = rows.data;
    a.hidden_stride = at.stride;
    const py::object result = call.like(rows, out), projected = Added::project_to(call, rows, a.form.rank, want_z, z);
    a.out = out.data;
    a.z = projected ? pointer<float>(z) : nullptr;
    forward(call, "edit", a, FASTEDIT_BOTH(edit));
    return py::make_tuple(result, none_or(projected));
  });
}

template <bool sure>
py::object edit_add(py::handle x, py::handle residual, py::handle scale, py::handle bias, py::handle read, py::handle offset,
                    py::handle write, py::handle slot, py::handle coefficient, bool on_sum, bool want_z, py::handle gate,
                    py::handle rule) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    Added added;
    EditAddArgs a{};
    added.read(call, x.ptr(), residual.ptr(), {scale, bias, read, offset, write, slot, coefficient, gate, rule}, on_sum,
               want_z, true, a);
    forward(call, "edit_add", a, FASTEDIT_BOTH(edit_add));
    return py::make_tuple(added.out_object, none_or(added.z_object));
  });
}

template <bool sure>
py::object edit_add_norm(py::handle x, py::handle residual, py::handle weight, py::handle norm_bias, py::handle scale,
                         py::handle bias, py::handle read, py::handle offset, py::handle write, py::handle slot,
                         py::handle coefficient, bool on_sum, int kind, double eps, bool want_z, bool want_residual,
                         bool want_stats, py::handle gate, py::handle rule) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    Added added;
    EditAddNormArgs a{};
    added.read(call, x.ptr(), residual.ptr(), {scale, bias, read, offset, write, slot, coefficient, gate, rule}, on_sum,
               want_z, want_residual, a.add);
    View weights, biases, normed, mean, rstd;
    call.parameter(weights, weight.ptr(), "weight", {a.add.width}, added.residual.dtype);
    call.parameter(biases, norm_bias.ptr(), "norm_bias", {a.add.width}, added.residual.dtype);
    if (kind < RMS || kind > LAYER || (kind != LAYER && (!weights.given() || biases.given()))) {
      refuse("the norm's kind does not fit its weight and bias");
    }
    a.kind = kind;
    a.eps = static_cast<float>(eps);
    a.weight = pointer(weights);
    a.norm_bias = pointer(biases);
    const py::object result = call.like(added.residual, normed);
    a.normed = normed.data;
    py::object means, rstds;
    if (want_stats) {
      rstds = call.make({a.add.rows}, F32, rstd);
      a.rstd = pointer<float>(rstd);
      if (kind == LAYER) {
        means = call.make({a.add.rows}, F32, mean);
        a.mean = pointer<float>(mean);
      }
    }
    forward(call, "edit_add_norm", a, FASTEDIT_BOTH(edit_add_norm));
    return py::make_tuple(none_or(added.out_object), result, none_or(added.z_object), none_or(means), none_or(rstds));
  });
}

template <bool sure>
py::object project(py::handle hidden, py::handle read, py::handle offset) {
  return answered(sure, [&]() -> py::object {
    Call call(sure);
    View rows, reads, offsets, z;
    ProjectArgs a{};
    call.lead(rows, hidden.ptr(), "hidden");
    const Rows at = call.rows(rows, "hidden");
    call.read(reads, read.ptr(), "read");
    a.rank = reads.given() && reads.ndim == 2 ? reads.shape[0] : 0;
    if (a.rank < 1 || a.rank > kMaxRank) refuse("read has another shape than (rank, width) with rank 1 to 64");
    call.parameter(reads, read.ptr(), "read", {a.rank, at.width}, F32);
    call.parameter(offsets, offset.ptr(), "offset", {a.rank}, F32);
    a.rows = at.rows;
    a.width = at.width;
    a.dtype = rows.dtype;
    a.hidden = rows.data;
    a.hidden_stride = at.stride;
    a.read = pointer<const float>(reads);
    a.offset = pointer<const float>(offsets);
    const py::object result = Added::project_to(call, rows, a.rank, true, z);
    a.z = pointer<float>(z);
    forward(call, "project", a, FASTEDIT_BOTH(project));
    return result;
  });
}

// ((groups + 1,) int32 where each group begins, or None without groups; mean and m2, (2, groups, width): high and low parts)
py::object moments(py::handle hidden, py::handle group, int64_t groups, py::handle order) {
  return answered(true, [&]() -> py::object {
    Call call(true);
    View rows, sorted, mean, m2;
    MomentsArgs a{};
    call.lead(rows, hidden.ptr(), "hidden");
    const Rows at = call.rows(rows, "hidden");
    a.rows = at.rows;
    a.width = at.width;
    a.groups = groups;
    a.dtype = rows.dtype;
    a.hidden = rows.data;
    a.hidden_stride = at.stride;
    HostOrder own;
    py::object first = py::none();
    if (groups < 1) refuse("groups is " + std::to_string(groups) + ", expected a number of groups from 1 on");
    if (!group.is_none()) {
      call.read(sorted, group.ptr(), "group");
      if (sorted.dtype != I32 || sorted.numel() != at.rows || !sorted.contiguous()) {
        refuse("group is " + sorted.about() + ", expected int32 " + shape_text(rows.shape, rows.ndim - 1));
      }
      if (call.host()) {
        own.sort(pointer<const int32_t>(sorted), at.rows, groups);
        a.group_order = own.order();
        first = py::cast(own.first());
      } else {
        read_order(call, order, at.rows, groups, a.group_order);
      }
    } else if (groups != 1) {
      refuse("groups without group");
    }
    const py::object means = call.make({2, groups, at.width}, F32, mean), m2s = call.make({2, groups, at.width}, F32, m2);
    a.mean = pointer<float>(mean);
    a.m2 = pointer<float>(m2);
    backward(call, "moments", a, FASTEDIT_ALL(moments));
    return py::make_tuple(first, means, m2s);
  });
}

py::object value_ascent(py::handle hidden, py::handle weight, py::handle bias, py::handle weight2, py::handle bias2,
                        py::handle head, py::handle gram, int64_t steps, double step_size) {
  return answered(true, [&]() -> py::object {
    Call call(true);
    View rows, w, b, w2, b2, h, g, out;
    ValueAscentArgs a{};
    call.lead(rows, hidden.ptr(), "hidden");
    if (!call.host()) refuse("value_ascent takes arrays on the host; fastedit.ops.value_ascent serves a GPU");
    const Rows at = call.rows(rows, "hidden");
    call.read(w, weight.ptr(), "weight");
    call.read(w2, weight2.ptr(), "weight2");
    if (!w.given() || w.ndim != 2) refuse("weight is missing or not (units, width)");
    if (w2.given() && w2.ndim != 2) refuse("weight2 is " + w2.about() + ", expected (units2, units)");
    a.rows = at.rows;
    a.width = at.width;
    a.units = w.shape[0];
    a.units2 = w2.given() ? w2.shape[0] : 0;
    const int64_t last = w2.given() ? a.units2 : a.units;
    call.parameter(w, weight.ptr(), "weight", {a.units, a.width}, F32);
    call.parameter(b, bias.ptr(), "bias", {a.units}, F32);
    call.parameter(w2, weight2.ptr(), "weight2", {a.units2, a.units}, F32);
    call.parameter(b2, bias2.ptr(), "bias2", {a.units2}, F32);
    call.parameter(h, head.ptr(), "head", {last}, F32);
    call.parameter(g, gram.ptr(), "gram", {a.units, a.units}, F32);
    for (const auto& [view, name] : {std::pair{&b, "bias"}, std::pair{&h, "head"}, std::pair{&g, "gram"}}) {
      if (!view->given()) refuse(std::string(name) + " is None, and the ascent needs it");
    }
    if (w2.given() != b2.given()) refuse("weight2 and bias2 belong together: one is given without the other");
    if (w2.given() && a.units2 == 0) refuse("weight2 has no units");
    a.steps = steps;
    a.step_size = static_cast<float>(step_size);
    a.dtype = rows.dtype;
    a.hidden = rows.data;
    a.hidden_stride = at.stride;
    a.weight = pointer<const float>(w);
    a.bias = pointer<const float>(b);
    a.weight2 = pointer<const float>(w2);
    a.bias2 = pointer<const float>(b2);
    a.head = pointer<const float>(h);
    a.gram = pointer<const float>(g);
    const py::object result = call.like(rows, out);
    a.out = out.data;
    forward(call, "value_ascent", a, FASTEDIT_BOTH(value_ascent));
    return result;
  });
}

// The other way of abi.h, for a GPU: (rows, units) of Σ_t 1[z_t > 0] ⊙ head from z and slope.
py::object value_ascent_flips(py::handle z, py::handle slope, py::handle head, py::handle gram, int64_t steps, double step_size) {
  return answered(true, [&]() -> py::object {
    Call call(true);
    View zs, slopes, heads, grams, total;
    ValueAscentArgs a{};
    call.lead(zs, z.ptr(), "z");
    if (zs.ndim != 2) refuse("z is " + zs.about() + ", expected (rows, units)");
    a.rows = zs.shape[0];
    a.units = zs.shape[1];
    call.parameter(zs, z.ptr(), "z", {a.rows, a.units}, F32);
    call.parameter(slopes, slope.ptr(), "slope", {a.rows, a.units}, F32);
    call.parameter(heads, head.ptr(), "head", {a.units}, F32);
    call.parameter(grams, gram.ptr(), "gram", {a.units, a.units}, F32);
    a.steps = steps;
    a.step_size = static_cast<float>(step_size);
    a.head = pointer<const float>(heads);
    a.gram = pointer<const float>(grams);
    a.z = pointer<const float>(zs);
    a.slope = pointer<const float>(slopes);
    const py::object result = call.like(zs, total);
    a.total = pointer<float>(total);
    forward(call, "value_ascent", a, FASTEDIT_BOTH(value_ascent));
    return result;
  });
}

}  // namespace

// For callers who ask: None where autograd, a tracer or another backend must see the call.
template <class... Handles>
bool unasked(Handles... given) {
  return Call::unasked({(PyFloat_Check(given.ptr()) || PyLong_Check(given.ptr()) ? Py_None : given.ptr())...});
}

void bind_forwards(py::module_& m) {
  using h = py::handle;
  const auto none = py::none();
  m.def("edit", edit<true>, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg("want_z") = false, py::arg("gate") = none, py::arg("rule") = none);
  m.def("edit_add", edit_add<true>, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg("on_sum") = false, py::arg("want_z") = false, py::arg("gate") = none, py::arg("rule") = none);
  m.def("edit_add_norm", edit_add_norm<true>, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg(), py::arg("on_sum") = false, py::arg("kind") = 0, py::arg("eps") = 1e-6,
        py::arg("want_z") = false, py::arg("want_residual") = true, py::arg("want_stats") = true, py::arg("gate") = none,
        py::arg("rule") = none);
  m.def("project", project<true>);
  m.def("moments", moments, py::arg("hidden"), py::arg("group"), py::arg("groups"), py::arg("order") = none);
  m.def("value_ascent", value_ascent);
  m.def("value_ascent_flips", value_ascent_flips);

  m.def("try_edit", [](h x, h s, h b, h r, h o, h w, h slot, h k, bool z, h gate, h rule) -> py::object {
    if (unasked(x, s, b, r, o, w, k, gate, rule)) return py::none();
    return edit<false>(x, s, b, r, o, w, slot, k, z, gate, rule);
  });
  m.def("try_edit_add", [](h x, h y, h s, h b, h r, h o, h w, h slot, h k, bool on_sum, bool z, h gate, h rule) -> py::object {
    if (unasked(x, y, s, b, r, o, w, k, gate, rule)) return py::none();
    return edit_add<false>(x, y, s, b, r, o, w, slot, k, on_sum, z, gate, rule);
  });
  m.def("try_edit_add_norm",
        [](h x, h y, h weight, h norm_bias, h s, h b, h r, h o, h w, h slot, h k, bool on_sum, int kind, double eps, bool z,
           bool residual, bool stats, h gate, h rule) -> py::object {
          if (unasked(x, y, weight, norm_bias, s, b, r, o, w, k, gate, rule)) return py::none();
          return edit_add_norm<false>(x, y, weight, norm_bias, s, b, r, o, w, slot, k, on_sum, kind, eps, z, residual, stats,
                                      gate, rule);
        });
  m.def("try_project", [](h x, h r, h o) -> py::object {
    if (unasked(x, r, o)) return py::none();
    return project<false>(x, r, o);
  });
}

}  // namespace fastedit
