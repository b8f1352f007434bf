// project:  z = hidden @ readᵀ + offset,  and its backward:  d_hidden = grad_z @ read,
//           d_read = grad_zᵀ hidden,  d_offset = Σ grad_z
//
// Streams: hidden in, z (rows, rank) out. Threads over groups of rows. The backward's column sums go over
// fixed blocks of rows and a fixed tree (sums.h).
#include "cpu/backward.h"

namespace fastedit {
namespace FASTEDIT_ISA {

int project(const ProjectArgs& a, void*) {
  const Stream hidden{a.dtype, a.hidden, a.hidden_stride};
  each_group(Form{}, a.rows, a.width, [&]<int R>(int64_t row, const Params&, float) {
    const void* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = hidden.row(row + r);
    float z[R][kMaxRank];
    project_stream<R>(a.dtype, rows, a.read, a.offset, a.rank, a.width, z);
    for (int r = 0; r < R; ++r) store_z(a.z, z[r], row + r, a.rank);
  });
  return 0;
}

namespace {

template <int R>
void rows_backward(const ProjectBackwardArgs& a, int64_t first, float* d_read, double* d_offset) {
  const int64_t width = a.width, rank = a.rank;
  const Stream hidden{a.dtype, a.hidden, a.hidden_stride}, d_hidden{a.dtype, a.d_hidden, width};
  int64_t row[R];
  float q[R][kMaxRank];
  for (int r = 0; r < R; ++r) {
    row[r] = first + r;
    memcpy(q[r], a.grad_z + row[r] * rank, static_cast<size_t>(rank) * sizeof(float));
    for (int64_t j = 0; j < rank; ++j) d_offset[j] += q[r][j];
  }
  alignas(64) float space[R * kRun];
  for (int64_t from = 0; from < width; from += kRun) {
    const int64_t count = from + kRun < width ? kRun : width - from;
    if (d_read) {
      gather<R>(q, rank, 1.0f, rows_of<R>(hidden, row, from, count, space), d_read + from, width, count);
    }
    if (!a.d_hidden) continue;
    if (a.dtype == F32 && rank) {
      float* to = static_cast<float*>(d_hidden.out(first)) + from;
      spread<R>(q, rank, a.read + from, width, count, kZeros, 0, to, width);
      continue;
    }
    if (rank) spread<R>(q, rank, a.read + from, width, count, kZeros, 0, space);
    else memset(space, 0, sizeof space);
    for (int r = 0; r < R; ++r) narrow(a.dtype, space + r * kRun, d_hidden.out(row[r]), from, count);
  }
}

}  // namespace

int64_t project_backward_workspace(const ProjectBackwardArgs&) { return 0; }

int project_backward(const ProjectBackwardArgs& a, void*, void*) {
  const int64_t width = a.width, rank = a.rank;
  ColumnSums sums(a.rows, (a.d_read ? rank * width : 0) + (a.d_offset ? rank : 0));
  if (!sums.ok()) return kOutOfMemory;
  each_task(sums.blocks(), a.rows * width, [&](int64_t block) {
    float* d_read = a.d_read ? sums.partial(block) : nullptr;
    float* d_offset = a.d_offset ? sums.partial(block) + (a.d_read ? rank * width : 0) : nullptr;
    double offset[kMaxRank] = {};
    const int64_t last = sums.last(block);
    int64_t row = sums.first(block);
    for (; row + kGroup <= last; row += kGroup) rows_backward<kGroup>(a, row, d_read, offset);
    for (; row < last; ++row) rows_backward<1>(a, row, d_read, offset);
    for (int64_t j = 0; j < rank && d_offset; ++j) d_offset[j] = static_cast<float>(offset[j]);
  });
  const float* total = sums.reduce();
  float *d_read = a.d_read, *d_offset = a.d_offset;
  copy_sum(d_read, total, rank * width);
  copy_sum(d_offset, total, rank);
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
