// project:  z = hidden @ readᵀ + offset,  and its backward:  d_hidden = grad_z @ read,
//           d_read = grad_zᵀ hidden,  d_offset = Σ grad_z
//
// Streams: hidden in, z (rows, rank) out. Threads over groups of rows. The backward's column sums go over
// fixed blocks of rows and a fixed tree (sums.h).
#include "cpu/rows.h"
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

int64_t project_backward_workspace(const ProjectBackwardArgs&) { return 0; }

int project_backward(const ProjectBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtype(a.dtype, [&]<class T>() {
    typedef typename T::T E;
    const int64_t width = a.width, rank = a.rank;
    ColumnSums sums(a.rows, (a.d_read ? rank * width : 0) + (a.d_offset ? rank : 0));
    if (!sums.ok()) {
      error = kOutOfMemory;
      return;
    }
    each_task(sums.blocks(), a.rows * width, [&](int64_t block) {
      float* d_read = sums.partial(block);
      float* d_offset = d_read + (a.d_read ? rank * width : 0);
      Scratch one(2 * width);
      for (int64_t row = sums.first(block); row < sums.last(block); ++row) {
        const float* g = a.grad_z + row * rank;
        if (a.d_read) {
          const E* in = static_cast<const E*>(a.hidden) + row * a.hidden_stride;
          float* h = one.floats();
          each_column(width, [=](auto lane, int64_t c) {
            Fp32::store<decltype(lane)::count>(h + c, T::template load<decltype(lane)::count>(in + c));
          });
          for (int64_t j = 0; j < rank; ++j) add_scaled(d_read + j * width, h, g[j], width);
        }
        if (a.d_offset) add_scaled(d_offset, g, 1.0f, rank);
        if (a.d_hidden) {
          float* d = one.floats() + width;
          memset(d, 0, static_cast<size_t>(width) * sizeof(float));
          for (int64_t j = 0; j < rank; ++j) add_scaled(d, a.read + j * width, g[j], width);
          E* out = static_cast<E*>(a.d_hidden) + row * width;
          each_column(width, [=](auto lane, int64_t c) {
            T::template store<decltype(lane)::count>(out + c, load_as<typename decltype(lane)::F>(d + c));
          });
        }
      }
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
