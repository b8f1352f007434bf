// edit_add:  residual' = residual + E(x)  or  E(residual + x),  E the edit of edit.cpp
//
// Streams: x and residual in, residual' out: those of the plain add; a gate reads them a second time, from cache.
// Rounded once, on the store. Threads over groups of rows (rows.h); no thread sees another's rows.
#include "cpu/add.h"

namespace fastedit {
namespace FASTEDIT_ISA {

int edit_add(const EditAddArgs& a, void*) {
  with_dtypes(a.x_dtype, a.residual_dtype, [&]<class X, class R0>() {
    typename R0::T* out = static_cast<typename R0::T*>(a.out);
    each_add<X, R0>(a, [&]<int R>(int64_t row, const Params& p, float k) {
      const RowPointers<typename R0::T, R> to(out + row * a.width, a.width);
      add_rows<X, R0, R>(a, row, p, k, [=](int r, auto lane, int64_t c, auto sum) {
        R0::template store<decltype(lane)::count>(to.at[r] + c, sum);
      });
    });
  });
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
