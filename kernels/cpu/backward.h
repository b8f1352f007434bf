// The backward of the normal form over rows, shared by edit_backward and edit_add_norm_backward.
//
//   q = k (G @ writeᵀ) + grad_z              d_hidden = G + k (scale − 1) ⊙ G + q @ read
//   d_scale Σ k G⊙h    d_bias Σ k G    d_read qᵀh    d_offset Σ q    d_write (k z)ᵀ G
//   d_coefficient Σ_width G ⊙ ((scale − 1) ⊙ h + bias + z @ write)
//
// Rows are brought into fp32 a run of columns at a time and stay in the first cache between the passes over it; a group
// of rows shares each loaded parameter and each accumulator. What depends on dtypes is widen.h and project_stream.
#pragma once
#include "cpu/sums.h"
#include "cpu/widen.h"

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

// A stream of rows as it lies in memory; data is null where the stream is absent.
struct Stream {
  int dtype;
  const void* data;
  int64_t stride;

  const void* row(int64_t i) const {
    return data ? static_cast<const char*>(data) + i * stride * (dtype == F32 ? 4 : 2) : nullptr;
  }
  void* out(int64_t i) const { return const_cast<void*>(row(i)); }
};

// `count` columns of R rows in fp32, in `space` or where they lie.
template <int R>
inline RowPointers<const float, R> taken(int dtype, const void* const* rows, int64_t from, int64_t count, float* space) {
  RowPointers<const float, R> at(nullptr, 0);
  for (int r = 0; r < R; ++r) at.at[r] = widen(dtype, rows[r], from, space + r * kRun, count);
  return at;
}
template <int R>
inline RowPointers<const float, R> rows_of(const Stream& stream, const int64_t* row, int64_t from, int64_t count, float* space) {
  const void* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = stream.row(row[r]);
  return taken<R>(stream.dtype, rows, from, count, space);
}

// Where a row's G comes from: a row of memory, or one that is made in `space` (width floats) while the caller's own
// column sums are added to.
struct GradSource {
  int dtype;
  virtual const void* row(int64_t row, float* space, float* own_sums) const = 0;
};

// into_j += factor Σ_r by[r][j] row_r for `count` columns; the sums of one j and the next lie `width` apart.
template <int R>
inline void gather(const float by[][kMaxRank], int64_t rank, float factor, const RowPointers<const float, R> rows,
                   float* into, int64_t width, int64_t count) {
  auto add = [=]<int N>(int64_t first) {
    float weight[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) weight[r][n] = factor * by[r][first + n];
    }
    each_column(count, [=, to = into + first * width](auto lane, int64_t c) {
      typedef typename decltype(lane)::F F;
      F row[R];
      for (int r = 0; r < R; ++r) row[r] = load_as<F>(rows.at[r] + c);
      F sum[N];  // all of them read before one is stored (rows.h, edit_rows)
      for (int n = 0; n < N; ++n) {
        F total = weight[0][n] * row[0];
        for (int r = 1; r < R; ++r) total += weight[r][n] * row[r];
        sum[n] = load_as<F>(to + n * width + c) + total;
      }
      for (int n = 0; n < N; ++n) memcpy(to + n * width + c, &sum[n], sizeof(F));
    });
  };
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) add.template operator()<4>(j);
  for (; j < rank; ++j) add.template operator()<1>(j);
}

struct FormBackward {
  const Form& form;
  int64_t rows, width;
  const float *z, *grad_z;
  FormGrad d;
  SlotOrder slot_order;
  Stream hidden, residual;      // h = hidden, or their sum; absent where no wanted gradient reads it
  Stream d_hidden, d_residual;  // the second gets G, or d_hidden where on_sum
  bool on_sum;

  // The caller's own column sums, `own_columns` of them a row, go to own_out.
  int run(const GradSource& source, int64_t own_columns, float* own_out[2]) const {
    const bool own_pass = form.slot && sums_wanted();
    const int64_t form_columns = own_pass ? 0 : Accumulators::columns(d, width, rank());
    ColumnSums sums(rows, form_columns + own_columns);
    if (!sums.ok()) return kOutOfMemory;
    each_task(sums.blocks(), rows * width, [&](int64_t block) {
      float* partial = form_columns + own_columns ? sums.partial(block) : nullptr;
      const Accumulators into(own_pass ? FormGrad{} : d, partial, width, rank());
      walk(source, sums, block, into, own_columns ? partial + form_columns : nullptr);
    });
    const float* total = form_columns + own_columns ? sums.reduce() : nullptr;
    FormGrad to = d;
    if (!own_pass) copy_out(to, total);
    for (int i = 0; i < 2; ++i) copy_sum(own_out[i], total, width);
    return own_pass ? run_over_slots(source) : 0;
  }

 private:
  bool sums_wanted() const { return d.scale || d.bias || d.read || d.offset || d.write; }
  int64_t rank() const { return form.read ? form.rank : 0; }

  void copy_out(FormGrad& to, const float*& from) const {
    copy_sum(to.scale, from, width);
    copy_sum(to.bias, from, width);
    copy_sum(to.read, from, rank() * width);
    copy_sum(to.offset, from, rank());
    copy_sum(to.write, from, rank() * width);
  }

  // Parameter gradients over slots: the rows again, sorted by slot, in blocks that each belong to one slot.
  int run_over_slots(const GradSource& source) const {
    ColumnSums sums(slot_order, form.slots, Accumulators::columns(d, width, rank()));
    if (!sums.ok()) return kOutOfMemory;
    FormBackward sums_alone = *this;
    sums_alone.d.coefficient = nullptr;
    sums_alone.d_hidden.data = sums_alone.d_residual.data = nullptr;
    each_task(sums.blocks(), rows * width, [&](int64_t block) {
      sums_alone.walk(source, sums, block, Accumulators(d, sums.partial(block), width, rank()), nullptr);
    });
    FormGrad to = d;
    for (int64_t s = 0; s < form.slots; ++s) {
      const float* total = sums.reduce(s);
      copy_out(to, total);
    }
    return 0;
  }

  void walk(const GradSource& source, const ColumnSums& sums, int64_t block, const Accumulators& into,
            float* own_sums) const {
    Scratch scratch(kGroup * width);
    double offset[kMaxRank] = {};  // a block's Σ q
    const int64_t last = sums.last(block);
    for (int64_t i = sums.first(block); i < last;) {
      int64_t row[kGroup] = {sums.row(i)};
      const int32_t slot = slot_of(form, row[0]);
      bool together = i + kGroup <= last && coefficient_of(form, row[0], slot) == 1.0f && slot >= 0;
      for (int r = 1; r < kGroup && together; ++r) {
        row[r] = sums.row(i + r);
        const int32_t own = slot_of(form, row[r]);
        together = own == slot && coefficient_of(form, row[r], own) == 1.0f;
      }
      const int count = together ? kGroup : 1;
      const void* grad[kGroup];
      for (int r = 0; r < count; ++r) grad[r] = source.row(row[r], scratch.floats() + r * width, own_sums);
      if (together) {
        group<kGroup>(source.dtype, grad, row, slot, 1.0f, into, offset);
      } else {
        group<1>(source.dtype, grad, row, slot, coefficient_of(form, row[0], slot), into, offset);
      }
      i += count;
    }
    for (int64_t j = 0; j < rank() && into.offset; ++j) into.offset[j] = static_cast<float>(offset[j]);
  }

  template <int R>
  void group(int dtype, const void* const* grad, const int64_t* row, int32_t slot, float k, const Accumulators& into,
             double* offset) const {
    const Params p = params_of(form, width, slot);
    const bool edited = slot >= 0;  // other rows pass their gradient on
    float q[R][kMaxRank], z_rows[R][kMaxRank], coefficient[R] = {};
    if (p.rank && edited) {
      if (z) {
        for (int r = 0; r < R; ++r) memcpy(z_rows[r], z + row[r] * p.rank, static_cast<size_t>(p.rank) * sizeof(float));
      }
      double product[R][kMaxRank];
      project_stream<R>(dtype, grad, p.write, nullptr, p.rank, width, product);
      for (int r = 0; r < R; ++r) {
        for (int64_t j = 0; j < p.rank; ++j) {
          if (d.coefficient) coefficient[r] += z_rows[r][j] * static_cast<float>(product[r][j]);
          const double sum = k * product[r][j] + (grad_z ? grad_z[row[r] * p.rank + j] : 0.0f);
          q[r][j] = static_cast<float>(sum);
          offset[j] += sum;
        }
      }
    }
    alignas(64) float space[4][R * kRun];
    for (int64_t from = 0; from < width; from += kRun) {
      const int64_t count = from + kRun < width ? kRun : width - from;
      const RowPointers<const float, R> g = taken<R>(dtype, grad, from, count, space[0]);
      RowPointers<const float, R> h = g;
      if (hidden.data && edited) {
        h = rows_of<R>(hidden, row, from, count, space[1]);
        if (residual.data) {
          const auto other = rows_of<R>(residual, row, from, count, space[2]);
          float* sum = space[1];
          each_column(count, [=](auto lane, int64_t c) {
            typedef typename decltype(lane)::F F;
            for (int r = 0; r < R; ++r) {
              Fp32::store<decltype(lane)::count>(sum + r * kRun + c, load_as<F>(h.at[r] + c) + load_as<F>(other.at[r] + c));
            }
          });
          h = {sum, kRun};
        }
      }
      if (edited) parameter_sums<R>(p, k, q, z_rows, g, h, into, from, count);
      if (edited && d.coefficient) {
        for (int r = 0; r < R; ++r) coefficient[r] += update_sum(p, g.at[r], h.at[r], from, count);
      }
      const bool want_back = d_hidden.data || (d_residual.data && on_sum);
      RowPointers<const float, R> back = g;
      if (edited && want_back) {
        form_back<R>(p, k, q, g, from, count, space[3]);
        back = {space[3], kRun};
      }
      for (int r = 0; r < R; ++r) {
        if (d_hidden.data) narrow(d_hidden.dtype, back.at[r], d_hidden.out(row[r]), from, count);
        if (d_residual.data) narrow(d_residual.dtype, (on_sum ? back : g).at[r], d_residual.out(row[r]), from, count);
      }
    }
    if (!d.coefficient) return;
    for (int r = 0; r < R; ++r) d.coefficient[row[r]] = coefficient[r];
  }

  template <int R>
  void parameter_sums(const Params& p, float k, const float (*q)[kMaxRank], const float (*z_rows)[kMaxRank],
                      const RowPointers<const float, R> g, const RowPointers<const float, R> h, const Accumulators& into,
                      int64_t from, int64_t count) const {
    if (into.scale) {
      each_column(count, [=, to = into.scale + from](auto lane, int64_t c) {
        typedef typename decltype(lane)::F F;
        F total = load_as<F>(g.at[0] + c) * k * load_as<F>(h.at[0] + c);
        for (int r = 1; r < R; ++r) total += load_as<F>(g.at[r] + c) * load_as<F>(h.at[r] + c);
        accumulate<decltype(lane)::count>(to + c, total);
      });
    }
    if (into.bias) {
      each_column(count, [=, to = into.bias + from](auto lane, int64_t c) {
        typedef typename decltype(lane)::F F;
        F total = load_as<F>(g.at[0] + c);
        for (int r = 1; r < R; ++r) total += load_as<F>(g.at[r] + c);
        accumulate<decltype(lane)::count>(to + c, total * k);
      });
    }
    if (into.read) gather<R>(q, p.rank, 1.0f, h, into.read + from, width, count);
    if (into.write) gather<R>(z_rows, p.rank, k, g, into.write + from, width, count);
  }

  // to_r = G + k (scale − 1) ⊙ G + q @ read
  template <int R>
  void form_back(const Params& p, float k, const float (*q)[kMaxRank], const RowPointers<const float, R> g, int64_t from,
                 int64_t count, float* to) const {
    const float* scale = p.scale ? p.scale + from : kOnes.at;
    if (R == 1 && k != 1.0f) {
      each_column(count, [=](auto lane, int64_t c) {
        typedef typename decltype(lane)::F F;
        const F grad = load_as<F>(g.at[0] + c);
        Fp32::store<decltype(lane)::count>(to + c, grad + (load_as<F>(scale + c) - 1.0f) * (grad * k));
      });
    } else {
      each_column(count, [=](auto lane, int64_t c) {
        typedef typename decltype(lane)::F F;
        const F gain = load_as<F>(scale + c);
        F back[R];
        for (int r = 0; r < R; ++r) back[r] = gain * load_as<F>(g.at[r] + c);
        for (int r = 0; r < R; ++r) memcpy(to + r * kRun + c, &back[r], sizeof(F));
      });
    }
    if (p.rank) spread<R>(q, p.rank, p.read + from, width, count, to, kRun, to);
  }

  // Σ G ⊙ ((scale − 1) ⊙ h + bias) over a run of one row
  float update_sum(const Params& p, const float* g, const float* h, int64_t from, int64_t count) const {
    const float* scale = p.scale ? p.scale + from : kOnes.at;
    const float* bias = p.bias ? p.bias + from : kZeros;
    if (!p.scale) h = kZeros;  // it may be absent, or infinite
    return sum_columns(count, [=](auto lane, int64_t c) {
      typedef typename decltype(lane)::F F;
      return load_as<F>(g + c) * ((load_as<F>(scale + c) - 1.0f) * load_as<F>(h + c) + load_as<F>(bias + c));
    });
  }
};

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
