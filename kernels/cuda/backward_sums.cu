// The second half of every backward: parameter gradients from the units' partials (backward.h).
//
// Streams: the partials in, one fp32 gradient a column out. Grid: 32 columns × slots; a block's eight
// warps take eight aligned runs of units. The sum is the pairwise tree over unit numbers, padded with zeros
// on the right to a power of two: which warp adds a subtree changes nothing, so no launch shape does.
#include "backward.h"
#include "reduce.h"
#include "run.h"

namespace fastedit::cuda {
namespace {

// Adds leaves as they come in the order of the pairwise tree: level l holds a finished subtree of 2^l.
class Pairwise {
 public:
  __device__ void push(float leaf) {
    bool carry = true;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      bool full = (count_ >> level) & 1;
      if (carry && full) leaf = held_[level] + leaf;
      if (carry && !full) held_[level] = leaf;
      carry = carry && full;
    }
    ++count_;
  }
  __device__ float sum() const {
    float right = 0.f;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      if ((count_ >> level) & 1) right = held_[level] + right;
    }
    return right;
  }

 private:
  static constexpr int kLevels = 20;
  float held_[kLevels] = {};
  unsigned count_ = 0;
};

__device__ inline float sum_of_eight(const float* leaf) {
  return ((leaf[0] + leaf[1]) + (leaf[2] + leaf[3])) + ((leaf[4] + leaf[5]) + (leaf[6] + leaf[7]));
}

struct Target {
  float* out;    // of slot 0
  int64_t size;  // of one slot
  int64_t at;    // of the column
  bool shared;   // one gradient for all slots
};

__device__ inline Target target(const Backward& b, int64_t column) {
  const FormGrad& d = b.a.d_form;
  int64_t width = b.a.width, rank = b.a.form.rank;
  float* out[] = {d.scale, d.bias, d.read, d.offset, d.write, b.a.d_weight, b.a.d_norm_bias};
  int64_t from[] = {b.sums.scale, b.sums.bias,   b.sums.read,     b.sums.offset,
                    b.sums.write, b.sums.weight, b.sums.norm_bias};
  int64_t size[] = {width, width, rank * width, rank, rank * width, width, width};
  Target found{};
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (from[i] >= 0 && column >= from[i] && column < from[i] + size[i]) {
      found = {out[i], size[i], column - from[i], i >= 5};
    }
  }
  return found;
}

__global__ void __launch_bounds__(kLaneColumns* kLines) reduce_kernel(const Backward b, unsigned tiles) {
  FASTEDIT_SHARED(shared);
  int slot = static_cast<int>(blockIdx.x / tiles);
  int64_t column = int64_t{blockIdx.x % tiles} * kLaneColumns + lane();
  Target to{};
  if (column < b.sums.size) to = target(b, column);
  UnitRange range = to.shared ? all_units(b) : units_of_slot(b, slot);
  int64_t units = to.out ? range.end - range.begin : 0, run = 1;
  while (run * kLines < units) run *= 2;

  Pairwise sum;
  int64_t end = min(units, (warp() + 1) * run);
  for (int64_t i = warp() * run; i < end; i += 8) {
    float leaf[8];
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      leaf[u] = i + u < end ? __ldcs(b.partials + (range.begin + i + u) * b.sums.size + column) : 0.f;
    }
    sum.push(sum_of_eight(leaf));
  }
  shared[warp() * kLaneColumns + lane()] = sum.sum();
  __syncthreads();
  if (warp() > 0 || !to.out || (to.shared && slot > 0)) return;
  float part[kLines];
#pragma unroll
  for (int w = 0; w < kLines; ++w) part[w] = shared[w * kLaneColumns + lane()];
  to.out[slot * to.size + to.at] = sum_of_eight(part);
}

int64_t padded(int64_t floats) { return ceil_div(floats, 4) * 4; }

// One access of a row's streams; the widest dtype decides.
int row_vector(const EditAddNormBackwardArgs& a, int sum_dtype) {
  return Alignment(a.rows, a.width, a.residual_dtype == F32 ? F32 : a.x_dtype)
      .stream(a.grad_residual, a.grad_residual_stride, a.residual_dtype)
      .stream(a.grad_normed, a.grad_normed_stride, a.residual_dtype)
      .stream(a.residual_out, a.width, a.residual_dtype)
      .stream(a.x, a.x_stride, a.x_dtype)
      .stream(a.residual, a.residual_stride, sum_dtype)
      .stream(a.weight, 0, a.residual_dtype)
      .stream(a.d_x, a.width, a.x_dtype)
      .stream(a.d_residual, a.width, a.residual_dtype)
      .form(a.form)
      .vector;
}

// The unit kernel's shape: with every sum if the chip holds them, else without d_read's, the one sum that
// needs nothing of the gradient but q; else without sums.
void plan_unit(Backward& b, bool norm) {
  const EditAddNormBackwardArgs& a = b.a;
  int rank = static_cast<int>(a.form.rank), tile = unit_tile(b.vector, norm), limit = shared_limit();
  int64_t read = b.sums.read >= 0 ? rank : 0, write = b.sums.write >= 0 ? rank : 0;
  int64_t vectors = (b.sums.scale >= 0) + (b.sums.bias >= 0) + (b.sums.weight >= 0) + (b.sums.norm_bias >= 0);
  auto shape = [&](bool fused, bool read_fused) {
    b.fused = fused, b.read_fused = read_fused;
    b.reads_h = a.x && ((a.d_form.coefficient && a.form.scale) || (fused && b.sums.scale >= 0) ||
                        (read_fused && b.sums.read >= 0));
    int streams = (a.grad_residual != nullptr) + 2 * (a.grad_normed != nullptr) + b.reads_h +
                  (b.reads_h && a.residual);
    b.unit_sums = static_cast<int>(fused ? vectors + write + (read_fused ? read : 0) : 0);
    b.unit = unit_shape(a.width, b.vector, rank, tile, streams, b.unit_sums, limit);
    return b.unit.shared_bytes > 0;
  };
  if (!shape(true, true) && !(read && shape(true, false))) shape(false, false);
}

}  // namespace

Backward plan_backward(const EditAddNormBackwardArgs& args, int sum_dtype, bool norm, void* workspace) {
  Backward b{};
  b.a = args;
  b.sum_dtype = sum_dtype;
  b.vector = row_vector(args, sum_dtype);
  const Form& form = args.form;
  const FormGrad& d = args.d_form;
  bool sorted = args.slot_order.order != nullptr, low_rank = form.rank > 0;
  int64_t floats = 0;
  auto want = [&](const void* out, int64_t size) {
    if (!out || size == 0) return int64_t{-1};
    b.sums.size += size;
    return b.sums.size - size;
  };
  b.sums.scale = want(d.scale, args.width);
  b.sums.bias = want(d.bias, args.width);
  b.sums.read = want(d.read, form.rank * args.width);
  b.sums.write = want(d.write, form.rank * args.width);
  b.sums.weight = want(args.d_weight, args.width);
  b.sums.norm_bias = want(args.d_norm_bias, args.width);
  b.sums.offset = want(d.offset, form.rank);
  b.sums.size = padded(b.sums.size);
  bool vectors = wants_vectors(b.sums);
  bool totals = b.sums.scale >= 0 || b.sums.bias >= 0 || b.sums.write >= 0;

  b.has_grad = args.grad_residual || args.grad_normed;
  b.pulls = low_rank && form.write && b.has_grad;
  bool d_rows = args.d_x || args.d_residual, whole = b.vector > 1 && (norm || low_rank || d.coefficient);
  if (whole) plan_unit(b, norm);
  bool own_q = b.pulls && (b.sums.read >= 0 || b.sums.offset >= 0) && !(b.fused && b.read_fused);
  bool own_means = args.grad_normed && totals && !b.fused;
  b.rows_kernel = b.fused || d.coefficient || own_q || own_means ||
                  (d_rows && (norm || low_rank || !vectors || (form.slot && !sorted)));
  if (b.rows_kernel && b.vector > 1 && !whole) plan_unit(b, norm);
  b.columns_d_x = args.d_x && !b.rows_kernel;

  b.unit_rows = kBlockRows, b.parts = 1, b.split = 1;
  if (b.rows_kernel && b.vector > 1) {
    int64_t target = unit_target(b.unit.threads, b.unit.shared_bytes);
    int64_t parts = unit_parts(args.rows, sorted ? form.slots : 0, target, kBlockRows);
    if (!b.fused) b.split = parts;
    else if (sorted) b.unit_rows = kBlockRows / parts, b.parts = parts;
    else b.unit_rows = unit_rows(args.rows, target, kBlockRows);
  }
  b.units = ceil_div(args.rows, b.unit_rows);
  if (sorted && args.rows) b.units = (args.rows / kBlockRows + least(form.slots, args.rows) + 2) * b.parts;

  auto take = [&](bool wanted, int64_t size) {
    float* at = static_cast<float*>(workspace) + floats;
    if (wanted) floats += padded(size);
    return wanted && workspace ? at : nullptr;
  };
  b.q_out = take(own_q, args.rows * form.rank);
  b.norm_means = take(own_means, args.rows * 2);
  b.partials = take(b.sums.size > 0, b.units * b.sums.size);
  b.q = own_q ? b.q_out : args.grad_z;
  b.workspace_bytes = floats * 4;
  return b;
}

int reduce_units(const Backward& b, void* stream) {
  int64_t tiles = ceil_div(b.sums.size, kLaneColumns), slots = most(1, b.a.form.slots);
  Shape shape{tiles * slots, kLaneColumns * kLines, kLaneColumns * kLines * 4};
  return launch(reduce_kernel, shape, stream, b, static_cast<unsigned>(tiles));
}

}  // namespace fastedit::cuda
