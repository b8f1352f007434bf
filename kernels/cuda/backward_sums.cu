// The plan of every backward, and its second half: parameter gradients from the leaves' partials (backward.h),
//
//     d = Σ over leaves of partial[leaf].
//
// Streams: the partials in, one fp32 gradient a column out. Grid: 32 columns × slots; a block's eight
// warps take eight aligned runs of leaves. The sum is the pairwise tree over their numbers, padded with zeros
// on the right to a power of two: which warp adds a subtree changes nothing, so no launch shape does.
#include "backward_outer.h"
#include "plain.h"

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
  int64_t from[] = {b.wanted.scale, b.wanted.bias,   b.wanted.read,     b.wanted.offset,
                    b.wanted.write, b.wanted.weight, b.wanted.norm_bias};
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
  if (column < b.columns) to = target(b, column);
  const bool later = column >= b.later.first;
  const Range range = partials_of_slot(b, later ? b.later.cut : b.units.cut, slot, to.shared);
  const float* partials = (later ? b.later.of(range.begin) : b.units.of(range.begin)) + column;
  const int64_t size = later ? b.later.size : b.units.size;
  int64_t leaves = to.out ? range.end - range.begin : 0, run = 1;
  while (run * kLines < leaves) run *= 2;

  Pairwise sum;
  int64_t end = min(leaves, (warp() + 1) * run);
  for (int64_t i = warp() * run; i < end; i += 8) {
    float leaf[8];
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      leaf[u] = i + u < end ? __ldcs(partials + (i + u) * size) : 0.f;
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

// Columns of sums.
int count(const Sums& s, int rank) {
  return (s.scale >= 0) + (s.bias >= 0) + (s.weight >= 0) + (s.norm_bias >= 0) + rank * ((s.read >= 0) + (s.write >= 0));
}

// The unit kernel's shape for the sums that are taken; false where they do not fit.
bool fits(Backward& b) {
  const EditAddNormBackwardArgs& a = b.a;
  const Sums& s = b.taken;
  int rank = static_cast<int>(a.form.rank);
  b.unit_sums = count(s, rank);
  b.reads_h = a.x && ((a.d_form.coefficient && a.form.scale) || s.scale >= 0 || s.read >= 0);
  int of_total = (a.grad_residual != nullptr) + 2 * (a.grad_normed != nullptr);
  int of_h = b.reads_h + (b.reads_h && a.residual);
  b.unit = unit_shape(a.width, b.vector, rank, b.vector / 4, of_total, of_h, b.unit_sums,
                      shared_limit());
  return b.unit.shared_bytes > 0;
}

// Whether a launch that takes nothing but one vector sum has room for it.
bool one_sum_fits(const Backward& b) {
  return unit_shape(b.a.width, b.vector, 0, b.vector / 4, 0, 0, 1, shared_limit()).shared_bytes > 0;
}

// Leaves sums over until the rest fits: d_read first, which needs nothing of the gradient but q. False where
// the launch does not fit without any.
bool take_what_fits(Backward& b) {
  int64_t Sums::* const in_turn[] = {&Sums::read, &Sums::write,  &Sums::scale,
                                     &Sums::bias, &Sums::weight, &Sums::norm_bias};
  for (auto sum : in_turn) {
    if (fits(b)) return true;
    b.left.*sum = b.taken.*sum;
    b.taken.*sum = -1;
  }
  return fits(b);
}

// Takes every sum of four ranks to the kernel on tensor cores, where it serves and all of them fit.
void take_all_to_tensor_cores(Backward& b) {
#ifdef FASTEDIT_TENSOR
  const EditAddNormBackwardArgs& a = b.a;
  Backward all = b;
  all.taken = b.wanted, all.left = {}, all.tensor = true;
  all.unit_sums = count(all.taken, static_cast<int>(a.form.rank));
  all.unit = tensor_shape(a.width, a.grad_normed ? 9 : 4, all.unit_sums, shared_limit());
  BackwardPart part = backward_part(all, a.width);
  if (a.form.rank == 4 && a.x_dtype == a.residual_dtype && a.x_dtype != F32 &&
      a.form.scale && all.unit_sums == 10 && all.taken.scale >= 0 && all.unit.shared_bytes &&
      (part == kPlainRank || part == kPlainRankNorm))
    b = all;
#endif
}

// Bytes of a row's streams in the unit kernel over those of a unit's partials of so many sums, written and read.
double partial_share(const Backward& b, int64_t sums) {
  const EditAddNormBackwardArgs& a = b.a;
  int64_t wide = element_bytes(a.residual_dtype), narrow = element_bytes(a.x_dtype);
  int64_t bytes = wide * ((a.grad_residual != nullptr) + 2 * (a.grad_normed != nullptr) + (a.d_residual != nullptr)) +
                  narrow * (b.reads_h + (a.d_x != nullptr)) + (b.reads_h && a.residual ? element_bytes(b.sum_dtype) : 0);
  return static_cast<double>(bytes) / (8 * most(1, sums));
}

// How the unit kernel's rows are cut, and those of the sums that it leaves to others.
void cut_rows(Backward& b, int64_t slots) {
  int64_t rows = b.a.rows, outer = (b.left.read >= 0) + (b.left.write >= 0);
  if (b.unit_kernel) {
    int64_t blocks = unit_blocks(b.unit.threads, b.unit.shared_bytes, shared_limit());
    b.units.cut = unit_cut(rows, slots, b.tensor ? kTensorRows : b.vector / 4, chips_of(capability()), blocks,
                           partial_share(b, b.unit_sums), kBlockRows);
  }
  b.later.first = !b.unit_kernel ? 0 : b.left.write >= 0 ? b.left.write : b.left.read >= 0 ? b.left.read : b.columns;
  b.units.size = b.later.first, b.later.size = b.columns - b.later.first;
  int64_t items = column_tiles(b.a.width, b.vector) * most(1, outer * ceil_div(b.a.form.rank, kRankGroup));
  b.later.cut = column_cut(rows, items, kBlockRows, fewest_rows(rows, slots, outer ? 32 : 64, 8));
}

// Where each wanted sum lies among all; those that the unit kernel may leave to others last.
void place_sums(Backward& b) {
  const FormGrad& d = b.a.d_form;
  int64_t width = b.a.width, rank = b.a.form.rank;
  auto want = [&](const void* out, int64_t size) {
    if (!out || size == 0) return int64_t{-1};
    int64_t at = b.columns;
    b.columns += padded(size);
    return at;
  };
  b.wanted.scale = want(d.scale, width);
  b.wanted.bias = want(d.bias, width);
  b.wanted.weight = want(b.a.d_weight, width);
  b.wanted.norm_bias = want(b.a.d_norm_bias, width);
  b.wanted.offset = want(d.offset, rank);
  b.wanted.write = want(d.write, rank * width);
  b.wanted.read = want(d.read, rank * width);
}

// d_read and d_write of what is left, in total's dtype where total was kept.
int run_left(const Backward& b, void* stream) {
  Backward outer = b;
  EditAddNormBackwardArgs& a = outer.a;
  if (b.total) a.grad_residual = b.total, a.grad_residual_stride = a.width, a.residual_dtype = F32;
  bool scalar = b.vector == 1 || (a.residual && b.sum_dtype != a.x_dtype);
  return with_types(a.x_dtype, a.residual_dtype, [&](auto narrow, auto wide) {
    using H = typename decltype(narrow)::type;
    using G = typename decltype(wide)::type;
    return scalar ? run_outer<Any, Any, 1>(outer, stream)
                  : run_outer<G, H, vector_width(sizeof(G))>(outer, stream);
  });
}

}  // namespace

Backward plan_backward(const EditAddNormBackwardArgs& args, int sum_dtype, bool norm, void* workspace) {
  Backward b{};
  b.a = args;
  b.sum_dtype = sum_dtype;
  b.vector = row_vector(args, sum_dtype);
  place_sums(b);
  const Form& form = args.form;
  bool sorted = args.slot_order.order != nullptr, low_rank = form.rank > 0;
  bool d_rows = args.d_x || args.d_residual, coefficient = args.d_form.coefficient != nullptr;
  bool along = norm || low_rank || coefficient ||
               (d_rows && (!b.wanted.vectors() || (form.slot && !sorted)));
  b.has_grad = args.grad_residual || args.grad_normed;
  b.pulls = low_rank && form.write && b.has_grad;
  bool one_wide = !args.residual || sum_dtype == args.residual_dtype;  // the unit kernel's second dtype
  b.taken = b.wanted;
  b.unit_kernel = along && b.vector > 1 && one_wide && args.width > 0 &&
                  (!b.wanted.vectors() || one_sum_fits(b)) && take_what_fits(b);
  if (b.unit_kernel) take_all_to_tensor_cores(b);
  else b.taken = {}, b.left = b.wanted;
  const int64_t slots = sorted ? form.slots : 0;
  cut_rows(b, slots);

  bool own_q = b.pulls && (b.left.read >= 0 || b.left.offset >= 0);
  bool own_means = !b.unit_kernel && args.grad_normed && (b.left.scale >= 0 || b.left.bias >= 0);
  bool own_total = args.grad_normed && b.left.write >= 0;
  b.rows_kernel = !b.unit_kernel && (coefficient || own_q || own_means || own_total || (d_rows && along));
  b.columns_d_x = args.d_x && !b.unit_kernel && !b.rows_kernel;

  int64_t floats = 0;
  auto take = [&](bool wanted, int64_t size) {
    float* at = static_cast<float*>(workspace) + floats;
    if (wanted) floats += padded(size);
    return wanted && workspace ? at : nullptr;
  };
  b.q_out = take(own_q, args.rows * form.rank);
  b.norm_means = take(own_means, args.rows * 2);
  b.total = take(own_total, args.rows * args.width);
  for (Partials* partials : {&b.units, &b.later})
    partials->data = take(partials->size > 0, partials_of(partials->cut, args.rows, slots, kBlockRows) * partials->size);
  b.q = own_q ? b.q_out : args.grad_z;
  b.workspace_bytes = floats * 4;
  return b;
}

int next_launch(Backward& b) {
  b.taken = b.left;
  b.taken.read = b.taken.write = b.taken.offset = -1;
  b.left = {};
  b.a.d_x = b.a.d_residual = nullptr;
  b.a.d_form.coefficient = b.q_out = b.total = nullptr;
  b.a.form.rank = 0;
  b.pulls = false;
  bool fits = take_what_fits(b);
  return fits && b.taken.vectors() ? cudaSuccess : cudaErrorInvalidConfiguration;
}

int finish_sums(const Backward& b, void* stream) {
  int error = run_left(b, stream);
  if (error || b.columns == 0) return error;
  int64_t tiles = ceil_div(b.columns, kLaneColumns), slots = most(1, b.a.form.slots);
  Shape shape{tiles * slots, kLaneColumns * kLines, kLaneColumns * kLines * 4};
  return launch(reduce_kernel, shape, stream, b, static_cast<unsigned>(tiles));
}

}  // namespace fastedit::cuda
