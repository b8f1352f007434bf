// The normal form, one row and one element at a time.
#pragma once
#include "vec.h"

namespace fastedit::cuda {

// What a row sees of the edit. `inside` is false for slot −1 and any slot out of range; k is then 0 and
// `slot` 0, a number that is safe to index with.
struct RowEdit {
  int slot;
  bool inside;
  float k;
};

__device__ inline RowEdit row_edit(const Form& form, int64_t row) {
  RowEdit edit{0, true, 1.f};
  if (form.slot) {
    int slot = __ldg(form.slot + row);
    edit.inside = slot >= 0 && slot < form.slots;
    edit.slot = edit.inside ? slot : 0;
  }
  if (form.coefficient) edit.k = __ldg(form.coefficient + row * form.coefficient_stride);
  if (!edit.inside) edit.k = 0.f;
  return edit;
}

// E(h) of one element; `shift` is bias and its share of z @ write. k is the row's, so the choice is uniform.
__device__ inline float edited(float h, float k, float scale, float shift) {
  float full = fmaf(scale, h, shift);
  float part = fmaf(k, fmaf(scale - 1.f, h, shift), h);
  return k == 1.f ? full : k == 0.f ? h : part;
}

// The same for the gradient: grad + k (scale − 1) grad + (q @ read)'s share.
__device__ inline float pulled_back(float grad, const RowEdit& row, float scale, float added) {
  float full = fmaf(scale, grad, added);
  float part = row.k == 0.f ? grad + added : fmaf(row.k * (scale - 1.f), grad, grad + added);
  return !row.inside ? grad : row.k == 1.f ? full : part;
}

}  // namespace fastedit::cuda
