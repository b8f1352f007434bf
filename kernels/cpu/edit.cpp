// edit:  h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write),  k = coefficient · gate(h)
//
// Streams: hidden in, h' out; z out where wanted. One pass at rank 0; with a low-rank part, or a gate, the row is read
// a second time from cache. Threads over groups of rows (rows.h); no thread sees another's rows.
#include "cpu/rows.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class T>
void edit_as(const EditArgs& a) {
  typedef typename T::T E;
  const E* in = static_cast<const E*>(a.hidden);
  E* out = static_cast<E*>(a.out);
  auto hidden_of = [in, stride = a.hidden_stride]<int R>(int64_t row) {
    const RowPointers<const E, R> from(in + row * stride, stride);
    return [=](int r, auto lane, int64_t c) { return T::template load<decltype(lane)::count>(from.at[r] + c); };
  };
  each_gated_group(a.form, a.rows, a.width, hidden_of, [&]<int R>(int64_t row, const Params& p, float k) {
    const RowPointers<E, R> to(out + row * a.width, a.width);
    auto hidden = hidden_of.template operator()<R>(row);
    float z[R][kMaxRank];
    if (p.rank && slot_of(a.form, row) >= 0 && (k != 0.0f || a.z)) {
      project_rows<R>(p.read, p.offset, p.rank, a.width, hidden, z);
    } else {
      memset(z, 0, sizeof(float) * static_cast<size_t>(p.rank ? R * kMaxRank : 0));
    }
    for (int r = 0; r < R; ++r) store_z(a.z, z[r], row + r, p.rank);
    if (k == 0.0f) {  // bit for bit, NaN payloads included
      memcpy(out + row * a.width, in + row * a.hidden_stride, static_cast<size_t>(a.width) * sizeof(E));
      return;
    }
    edit_rows<R, T::kWide>(p, k, a.width, z, hidden, AsItIs{}, [=](int r, auto lane, int64_t c, auto edited) {
      T::template store<decltype(lane)::count>(to.at[r] + c, edited);
    });
  });
}

}  // namespace

int edit(const EditArgs& a, void*) {
  if (a.dtype == F32) edit_as<Fp32>(a);
  if (a.dtype == BF16) edit_as<Bf16>(a);
  if (a.dtype == F16) edit_as<Fp16>(a);
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
