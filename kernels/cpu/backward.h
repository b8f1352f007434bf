// The backward of the normal form over rows, shared by edit_backward and edit_add_norm_backward.
//
//   q = k (G @ writeᵀ) + grad_z              d_hidden = G + k (scale − 1) ⊙ G + q @ read
//   d_scale Σ k G⊙h    d_bias Σ k G    d_read qᵀh    d_offset Σ q    d_write (k z)ᵀ G
//   d_coefficient Σ_width G ⊙ ((scale − 1) ⊙ h + bias + z @ write)
//
// The caller's `load` brings a row's G and h into fp32 scratch, `sink` takes d_hidden away; in between a group
// of rows shares each loaded parameter and each accumulator.
#pragma once
#include "cpu/sums.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Where a block's partial sums go inside its ColumnSums row; null where not wanted.
struct Accumulators {
  float *scale = nullptr, *bias = nullptr, *read = nullptr, *offset = nullptr, *write = nullptr;

  static int64_t columns(const FormGrad& d, int64_t width, int64_t rank) {
    return (d.scale ? width : 0) + (d.bias ? width : 0) + (d.read ? rank * width : 0) + (d.offset ? rank : 0) +
           (d.write ? rank * width : 0);
  }
  Accumulators(const FormGrad& d, float* at, int64_t width, int64_t rank) {
    if (!at) return;
    auto take = [&](const float* wanted, int64_t count) {
      float* own = wanted ? at : nullptr;
      if (wanted) at += count;
      return own;
    };
    scale = take(d.scale, width);
    bias = take(d.bias, width);
    read = take(d.read, rank * width);
    offset = take(d.offset, rank);
    write = take(d.write, rank * width);
  }
};

template <class F>
inline void accumulate(float* at, F value) {
  const F sum = load_as<F>(at) + value;
  memcpy(at, &sum, sizeof sum);
}

// One group: grad[r] and h[r] are fp32 rows (h may be null where nothing reads it), z[r] and q[r] have rank
// entries. d[r] receives d_hidden; d is null if not wanted.
template <int R>
inline void form_rows(const Params& p, float k, int64_t width, const float* const* grad, const float* const* h,
                      const float* const* z, const float (*q)[kMaxRank], const Accumulators& sums, float* const* d) {
  each_column(width, [=](auto lane, int64_t c) {
    constexpr int L = decltype(lane)::count;
    typedef typename Lane<L>::F F;
    F g[R], kg[R], hidden[R];
    for (int r = 0; r < R; ++r) {
      g[r] = load_as<F>(grad[r] + c);
      kg[r] = (R == 1 && k != 1.0f) ? k * g[r] : g[r];
      hidden[r] = h ? load_as<F>(h[r] + c) : F{};
    }
    if (sums.scale) {
      F total = kg[0] * hidden[0];
      for (int r = 1; r < R; ++r) total += kg[r] * hidden[r];
      accumulate(sums.scale + c, total);
    }
    if (sums.bias) {
      F total = kg[0];
      for (int r = 1; r < R; ++r) total += kg[r];
      accumulate(sums.bias + c, total);
    }
    if (sums.read) {
      for (int64_t j = 0; j < p.rank; ++j) {
        F total = q[0][j] * hidden[0];
        for (int r = 1; r < R; ++r) total += q[r][j] * hidden[r];
        accumulate(sums.read + j * width + c, total);
      }
    }
    if (sums.write) {
      for (int64_t j = 0; j < p.rank; ++j) {
        F total = z[0][j] * kg[0];
        for (int r = 1; r < R; ++r) total += z[r][j] * kg[r];
        accumulate(sums.write + j * width + c, total);
      }
    }
    if (!d) return;
    F back[R];
    const F scale = p.scale ? load_as<F>(p.scale + c) : splat<L>(1.0f);
    for (int r = 0; r < R; ++r) back[r] = (R == 1 && k != 1.0f) ? g[r] + (scale - 1.0f) * kg[r] : scale * g[r];
    for (int64_t j = 0; j < p.rank; ++j) {
      const F read = load_as<F>(p.read + j * width + c);
      for (int r = 0; r < R; ++r) back[r] += q[r][j] * read;
    }
    for (int r = 0; r < R; ++r) memcpy(d[r] + c, &back[r], sizeof(F));
  });
}

// A row on its way through: scratch to convert into, and where its G, h and d_hidden are. Rows that are fp32 in
// memory are used where they lie.
struct Row {
  float *grad_scratch, *hidden_scratch;
  const float *grad, *hidden;
  float* d_hidden;
};

// What of the backward does not depend on dtypes.
struct FormBackward {
  const Form& form;
  int64_t rows, width;
  const float *z, *grad_z;
  FormGrad d;
  SlotOrder slot_order;

  bool sums_wanted() const { return d.scale || d.bias || d.read || d.offset || d.write; }

  float coefficient_gradient(const Params& p, const float* grad, const float* h, const float* z_row) const {
    float total = sum_columns(width, [&](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      F update{};
      if (p.scale) update = (load_as<F>(p.scale + c) - 1.0f) * load_as<F>(h + c);
      if (p.bias) update += load_as<F>(p.bias + c);
      return load_as<F>(grad + c) * update;
    });
    for (int64_t j = 0; j < p.rank; ++j) {
      const float* write = p.write + j * width;
      total += z_row[j] * sum_columns(width, [&](auto lane, int64_t c) {
        typedef typename decltype(lane)::F F;
        return load_as<F>(grad + c) * load_as<F>(write + c);
      });
    }
    return total;
  }

  template <int R>
  void group(const int64_t* row, const Params& p, float k, const float* const* grad, const float* const* h,
             const Accumulators& sums, float* const* d_hidden) const {
    const float* z_rows[R];
    float q[R][kMaxRank];
    for (int r = 0; r < R; ++r) z_rows[r] = z ? z + row[r] * p.rank : nullptr;
    if (p.rank) {
      project_rows<R>(p.write, nullptr, p.rank, width, [&](int r, auto lane, int64_t c) {
        return load_as<typename decltype(lane)::F>(grad[r] + c);
      }, q);
      for (int r = 0; r < R; ++r) {
        for (int64_t j = 0; j < p.rank; ++j) {
          q[r][j] = k * q[r][j] + (grad_z ? grad_z[row[r] * p.rank + j] : 0.0f);
          if (sums.offset) sums.offset[j] += q[r][j];
        }
      }
    }
    form_rows<R>(p, k, width, grad, h, z_rows, q, sums, d_hidden);
  }

  // load(row, to, sums) fills the fp32 scratch of `to`, or points it at rows that are fp32 already; sink(row, from)
  // stores results. The sums of `norm_columns` more columns belong to the caller.
  template <class Load, class Sink>
  int run(bool want_d_hidden, bool want_h, int64_t norm_columns, float* norm_out[2], Load load, Sink sink) const {
    const bool own_pass = form.slot && sums_wanted();
    const int64_t form_columns = own_pass ? 0 : Accumulators::columns(d, width, rank());
    ColumnSums sums(rows, form_columns + norm_columns);
    if (!sums.ok()) return kOutOfMemory;
    each_task(sums.blocks(), rows * width, [&](int64_t block) {
      float* partial = form_columns + norm_columns ? sums.partial(block) : nullptr;
      const Accumulators into(own_pass ? FormGrad{} : d, partial, width, rank());
      walk(sums, block, into, want_d_hidden, want_h, true,
           [&](int64_t row, Row& to) { load(row, to, partial ? partial + form_columns : nullptr); }, sink);
    });
    const float* total = form_columns + norm_columns ? sums.reduce() : nullptr;
    FormGrad to = d;
    if (!own_pass) copy_out(to, total);
    for (int i = 0; i < 2; ++i) copy_sum(norm_out[i], total, width);
    return own_pass ? run_over_slots(load) : 0;
  }

 private:
  int64_t rank() const { return form.read ? form.rank : 0; }

  void copy_out(FormGrad& to, const float*& from) const {
    copy_sum(to.scale, from, width);
    copy_sum(to.bias, from, width);
    copy_sum(to.read, from, rank() * width);
    copy_sum(to.offset, from, rank());
    copy_sum(to.write, from, rank() * width);
  }

  // Parameter gradients over slots: the rows again, sorted by slot, in blocks that each belong to one slot.
  template <class Load>
  int run_over_slots(Load load) const {
    ColumnSums sums(slot_order, form.slots, Accumulators::columns(d, width, rank()));
    if (!sums.ok()) return kOutOfMemory;
    FormBackward without_k = *this;
    without_k.d.coefficient = nullptr;
    each_task(sums.blocks(), rows * width, [&](int64_t block) {
      const Accumulators into(d, sums.partial(block), width, rank());
      without_k.walk(sums, block, into, false, d.scale || d.read, false,
                     [&](int64_t row, Row& to) { load(row, to, nullptr); }, [](int64_t, const Row&) {});
    });
    FormGrad to = d;
    for (int64_t s = 0; s < form.slots; ++s) {
      const float* total = sums.reduce(s);
      copy_out(to, total);
    }
    return 0;
  }

  template <class Load, class Sink>
  void walk(const ColumnSums& sums, int64_t block, const Accumulators& into, bool want_d_hidden, bool want_h,
            bool want_rows, Load load, Sink sink) const {
    Scratch scratch(3 * kGroup * width);
    const int64_t last = sums.last(block);
    for (int64_t i = sums.first(block); i < last;) {
      int64_t row[kGroup] = {sums.row(i)};
      const int32_t slot = slot_of(form, row[0]);
      const Params p = params_of(form, width, slot);
      int count = 1;
      bool together = i + kGroup <= last && coefficient_of(form, row[0], slot) == 1.0f && slot >= 0;
      for (int r = 1; r < kGroup && together; ++r) {
        row[r] = sums.row(i + r);
        const int32_t own = slot_of(form, row[r]);
        together = own == slot && coefficient_of(form, row[r], own) == 1.0f;
      }
      if (together) count = kGroup;
      Row at[kGroup];
      const float *grads[kGroup], *hiddens[kGroup];
      float* backs[kGroup];
      for (int r = 0; r < count; ++r) {
        float* own = scratch.floats() + 3 * r * width;
        at[r] = {own, own + width, own, want_h ? own + width : nullptr, want_d_hidden ? own + 2 * width : nullptr};
        load(row[r], at[r]);
        grads[r] = at[r].grad, hiddens[r] = at[r].hidden, backs[r] = at[r].d_hidden;
      }
      if (want_rows && d.coefficient) {
        for (int r = 0; r < count; ++r) {
          d.coefficient[row[r]] =
              slot < 0 ? 0.0f : coefficient_gradient(p, grads[r], hiddens[r], z ? z + row[r] * p.rank : nullptr);
        }
      }
      const float* const* h = want_h ? hiddens : nullptr;
      float* const* back = want_d_hidden ? backs : nullptr;
      if (slot < 0) {  // untouched rows pass their gradient on
        if (back) memcpy(backs[0], grads[0], static_cast<size_t>(width) * sizeof(float));
      } else if (count == kGroup) {
        group<kGroup>(row, p, 1.0f, grads, h, into, back);
      } else {
        group<1>(row, p, coefficient_of(form, row[0], slot), grads, h, into, back);
      }
      for (int r = 0; r < count; ++r) sink(row[r], at[r]);
      i += count;
    }
  }
};

template <class T>
inline void load_row(float* to, const void* from, int64_t offset, int64_t width) {
  const typename T::T* in = static_cast<const typename T::T*>(from) + offset;
  each_column(width, [=](auto lane, int64_t c) {
    Fp32::store<decltype(lane)::count>(to + c, T::template load<decltype(lane)::count>(in + c));
  });
}
// The row in fp32: where it lies if it is fp32, else converted into scratch.
template <class T>
inline const float* row_of(float* scratch, const void* from, int64_t offset, int64_t width) {
  load_row<T>(scratch, from, offset, width);
  return scratch;
}
template <>
inline const float* row_of<Fp32>(float*, const void* from, int64_t offset, int64_t) {
  return static_cast<const float*>(from) + offset;
}
// Where d_hidden is formed: in its own row if that is fp32, else in scratch, to be stored rounded afterwards.
template <class T>
inline float* form_in(float* scratch, void*, int64_t) { return scratch; }
template <>
inline float* form_in<Fp32>(float*, void* out, int64_t offset) { return static_cast<float*>(out) + offset; }
template <class T>
inline void add_row(float* to, const void* from, int64_t offset, int64_t width) {
  const typename T::T* in = static_cast<const typename T::T*>(from) + offset;
  each_column(width, [=](auto lane, int64_t c) {
    accumulate(to + c, T::template load<decltype(lane)::count>(in + c));
  });
}
template <class T>
inline void store_row(void* to, int64_t offset, const float* from, int64_t width) {
  typename T::T* out = static_cast<typename T::T*>(to) + offset;
  if (static_cast<const void*>(out) == from) return;  // formed in place
  each_column(width, [=](auto lane, int64_t c) {
    T::template store<decltype(lane)::count>(out + c, load_as<typename decltype(lane)::F>(from + c));
  });
}
inline void zero_row(float* to, int64_t width) { memset(to, 0, static_cast<size_t>(width) * sizeof(float)); }

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
