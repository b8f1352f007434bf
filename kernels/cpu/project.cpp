// project:  z = hidden @ readᵀ + offset,  and its backward:  d_hidden = grad_z @ read,
//           d_read = grad_zᵀ hidden,  d_offset = Σ grad_z
//
// Streams: hidden in, z (rows, rank) out. Threads over groups of rows. The backward's column sums go over
// fixed blocks of rows and a fixed tree (sums.h).
#include "cpu/backward.h"
#include "cpu/sums.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class Body>
inline void with_dtype(int dtype, Body body) {
  if (dtype == F32) body.template operator()<Fp32>();
  if (dtype == BF16) body.template operator()<Bf16>();
  if (dtype == F16) body.template operator()<Fp16>();
}

}  // namespace

int project(const ProjectArgs& a, void*) {
  with_dtype(a.dtype, [&]<class T>() {
    const typename T::T* in = static_cast<const typename T::T*>(a.hidden);
    each_group(Form{}, a.rows, a.width, [&]<int R>(int64_t row, const Params&, float) {
      float z[R][kMaxRank];
      project_rows<R>(a.read, a.offset, a.rank, a.width, [&](int r, auto lane, int64_t c) {
        return T::template load<decltype(lane)::count>(in + (row + r) * a.hidden_stride + c);
      }, z);
      for (int r = 0; r < R; ++r) store_z(a.z, z[r], row + r, a.rank);
    });
  });
  return 0;
}

namespace {

// R rows: a loaded read vector, and an accumulator, serve them all.
template <class T, int R>
void rows_backward(const ProjectBackwardArgs& a, int64_t row, float* d_read, float* d_offset) {
  typedef typename T::T E;
  const int64_t width = a.width, rank = a.rank;
  const RowPointers<const float, R> q(a.grad_z + row * rank, rank);
  const auto hidden = rows_at<const E, R>(a.hidden, row, a.hidden_stride);
  const auto d_hidden = rows_at<E, R>(a.d_hidden, row, width);
  const float* read = a.read;
  const bool want_hidden = a.d_hidden;
  each_column(width, [=](auto lane, int64_t c) {
    constexpr int L = decltype(lane)::count;
    typedef typename Lane<L>::F F;
    if (d_read) {
      F h[R];
      for (int r = 0; r < R; ++r) h[r] = T::template load<L>(hidden.at[r] + c);
      for (int64_t j = 0; j < rank; ++j) {
        F total = q.at[0][j] * h[0];
        for (int r = 1; r < R; ++r) total += q.at[r][j] * h[r];
        accumulate_columns<L>(d_read + j * width + c, total);
      }
    }
    if (want_hidden) {
      F back[R] = {};
      for (int64_t j = 0; j < rank; ++j) {
        const F direction = load_as<F>(read + j * width + c);
        for (int r = 0; r < R; ++r) back[r] += q.at[r][j] * direction;
      }
      for (int r = 0; r < R; ++r) T::template store<L>(d_hidden.at[r] + c, back[r]);
    }
  });
  if (!d_offset) return;
  for (int r = 0; r < R; ++r) {
    for (int64_t j = 0; j < rank; ++j) d_offset[j] += q.at[r][j];
  }
}

}  // namespace

int64_t project_backward_workspace(const ProjectBackwardArgs&) { return 0; }

int project_backward(const ProjectBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtype(a.dtype, [&]<class T>() {
    const int64_t width = a.width, rank = a.rank;
    ColumnSums sums(a.rows, (a.d_read ? rank * width : 0) + (a.d_offset ? rank : 0));
    if (!sums.ok()) {
      error = kOutOfMemory;
      return;
    }
    each_task(sums.blocks(), a.rows * width, [&](int64_t block) {
      float* d_read = a.d_read ? sums.partial(block) : nullptr;
      float* d_offset = a.d_offset ? sums.partial(block) + (a.d_read ? rank * width : 0) : nullptr;
      const int64_t last = sums.last(block);
      int64_t row = sums.first(block);
      for (; row + kGroup <= last; row += kGroup) rows_backward<T, kGroup>(a, row, d_read, d_offset);
      for (; row < last; ++row) rows_backward<T, 1>(a, row, d_read, d_offset);
    });
    const float* total = sums.reduce();
    float *d_read = a.d_read, *d_offset = a.d_offset;
    copy_sum(d_read, total, rank * width);
    copy_sum(d_offset, total, rank);
  });
  return error;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
