// The part of a backward that needs sums along the row where the unit kernel does not run (backward.h): an element an
// access.
//   total = grad_residual + norm's gradient at grad_normed
//   q = k (total @ writeᵀ) + grad_z
//   d_coefficient = Σ total ⊙ ((scale − 1) ⊙ h + bias) + z · (total @ writeᵀ)
//   d_h = total + k (scale − 1) ⊙ total + q @ read
//
// Streams: grad_residual, grad_normed, residual_out in (h only for d_coefficient); d_x, d_residual out. Read
// again, from L1 or L2, for each of the sums: total is formed where it is needed.
// Grid: as many blocks as fit on the chip, a row at a time. Every sum belongs to one row and has a shape that
// the width fixes. What the columns need later (q, the norm's two means) goes to the workspace.
#pragma once
#include "backward_streams.h"

namespace fastedit::cuda {
namespace {

template <bool kNorm>
struct LoopBackward {
  const Backward& b;
  int64_t row;
  RowEdit edit;
  NormRow norm;

  __device__ float total(int64_t column) const {
    RowStreams<Any, Any, 1, kNorm> streams;
    float total[1], gain[1] = {};
    if (kNorm && b.a.grad_normed) load_gain<Any, 1>(gain, b.a.weight, b.a.kind, column, b.a.residual_dtype);
    streams.template load_total<kL2>(b.a, row, column);
    streams.get_total(total, b.a, norm, gain);
    return total[0];
  }

  __device__ void find_means(float* shared, int& turn) {
    float sum[2] = {}, g[1], r[1], gain[1], inverse = 1.f / static_cast<float>(b.a.width);
    norm = norm_row(b.a, row);
    for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
      RowStreams<Any, Any, 1, kNorm> streams;
      streams.template load_total<kL2>(b.a, row, column);
      streams.get_norm(g, r, b.a);
      load_gain<Any, 1>(gain, b.a.weight, b.a.kind, column, b.a.residual_dtype);
      sum[0] = fmaf(g[0] * gain[0], norm.unit(r[0]), sum[0]);
      sum[1] = fmaf(g[0], gain[0], sum[1]);
    }
    block_sum(sum, shared, turn);
    norm.dot = sum[0] * inverse;
    norm.sum = b.a.kind == LAYER ? sum[1] * inverse : 0.f;
    if (!b.norm_means || threadIdx.x > 0) return;
    b.norm_means[2 * row] = norm.dot;
    b.norm_means[2 * row + 1] = norm.sum;
  }

  __device__ void pull(float* part) const {
    int rank = static_cast<int>(b.a.form.rank);
    const float* write = b.a.form.write + int64_t{edit.slot} * rank * b.a.width;
    for (int first = 0; first < rank; first += 8) {
      float sum[8] = {};
      for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
        float grad = total(column);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j < rank) sum[j] = fmaf(grad, __ldg(write + (first + j) * b.a.width + column), sum[j]);
        }
      }
      float all = warp_sum_of_eight(sum);
      if (lane() < 8 && first + lane() < rank) part[(first + lane()) * warps() + warp()] = all;
    }
  }

  __device__ void store_all(const float* q) const {
    const Form& form = b.a.form;
    const float* read = form.read + int64_t{edit.slot} * form.rank * b.a.width;
    for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
      float grad = total(column), added = 0.f, d_h[1], at_total[1] = {grad};
#pragma unroll 2
      for (int j = 0; form.read && j < form.rank; ++j)
        added = fmaf(q[j], __ldg(read + j * b.a.width + column), added);
      float scale = form.scale ? __ldg(form.scale + edit.slot * b.a.width + column) : 1.f;
      d_h[0] = pulled_back(grad, edit, scale, added);
      RoundedRow<Any, Any, 1> rounded;
      rounded.round(d_h, b);
      rounded.store(b, b.a.d_x, b.a.d_residual, row * b.a.width + column);
      if (b.total) b.total[row * b.a.width + column] = grad;
      if (!kNorm || !b.a.d_residual || b.a.on_sum) continue;
      store<Any, 1>(b.a.d_residual, row * b.a.width + column, round_to<Any, 1>(at_total, b.a.residual_dtype),
                    b.a.residual_dtype);
    }
  }
};

template <bool kNorm>
__global__ void __launch_bounds__(kLoopThreads, 2) loop_backward(const Backward b) {
  FASTEDIT_SHARED(shared);
  const EditAddNormBackwardArgs& a = b.a;
  int rank = static_cast<int>(a.form.rank), turn = 0;
  LowRank low(shared, rank, 1);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    LoopBackward<kNorm> loop{b, row, row_edit(a.form, row), {}};
    if (kNorm && a.grad_normed) loop.find_means(shared, turn);
    if (rank) {
      if (b.pulls) loop.pull(low.part);
      finish_q<1>(b, low, 1, [&](int) { return row; });
    }
    if (a.d_form.coefficient) {
      float sum[1] = {}, h[1];
      for (int64_t column = threadIdx.x; column < a.width; column += blockDim.x) {
        int64_t at = loop.edit.slot * a.width + column;
        float update = a.form.bias ? __ldg(a.form.bias + at) : 0.f;
        if (a.form.scale && a.x) {
          RowStreams<Any, Any, 1, kNorm> streams;
          streams.template load_h<kL2>(b, row, column);
          streams.get_h(h, b);
          update = fmaf(__ldg(a.form.scale + at) - 1.f, h[0], update);
        }
        sum[0] = fmaf(loop.total(column), update, sum[0]);
      }
      block_sum(sum, shared, turn);
      if (threadIdx.x == 0) store_d_coefficient<1>(b, row, 0, sum[0], low.pulled);
    }
    if (a.d_x || a.d_residual || b.total) loop.store_all(low.q);
  }
}

template <bool kNorm>
int run_loop(const Backward& b, void* stream) {
  return launch(loop_backward<kNorm>, loop_shape(b.a.rows, b.a.width, b.a.form.rank, multiprocessors()), stream, b);
}

}  // namespace
}  // namespace fastedit::cuda
