// edit and edit_add of ranks that are a multiple of eight with their products on tensor cores (tensor.h), for the calls that
// plain.h names: tiles of sixteen rows, so that read and write come from L2 once for sixteen rows instead of two. Compiled
// with FASTEDIT_TENSOR, which is off until a GPU has shown a gain; the other kernels: row_kernels.h.
//
// Streams: x in, once, into shared memory, where it waits until z is known; residual in and out out, once.
// Grid: as many blocks as fit on the chip, each taking tiles in turn. A warp takes 64 columns at a time: in the first pass,
// for eight ranks at a time, a thread has a row of either half of the tile and 8 + 8 columns; in the second, of either half,
// two rows and eight columns. A row's sums run in an order that the width fixes.
#ifdef FASTEDIT_TENSOR
#include "plain.h"
#include "rows.h"
#include "run.h"
#include "tensor.h"

namespace fastedit::cuda {
namespace {

constexpr int kV = 8, kHalves = 2, kRows = kHalves * kTensorRows;  // of a tile

template <class T, bool kAdd>
struct TensorRows {
  using Vector = Pack<T, kV>;
  const EditAddArgs& a;
  const int chunks, rank;
  float *z, *part;  // (rank, kRows), and of every warp
  uint4* stage;     // 64 columns take 128 vectors: by the half, the row's last bit, the vector, the row's other bits
  int first, rows;
  const int group = lane() / 4, member = lane() % 4;

  __device__ int chunk_at(int i) const { return i * warps() + warp(); }
  __device__ Vector& cell(int chunk, int half, int row, int vector) const {
    return *reinterpret_cast<Vector*>(stage + ((chunk * kHalves + half) * 2 + row % 2) * kWarp + vector * 4 + row / 2);
  }
  template <class P>
  __device__ P* at(P* data, int64_t stride, int row, int column) const {
    return row_at<T, true>(data, first + row, stride, column);
  }
  // The lane's vectors of the tile `ahead` rows below.
  __device__ void ask_for(int ahead, int chunk) const {
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * member + r, below = ahead + half * kTensorRows + row;
        copy_async(&cell(chunk, half, row, group), at(a.x, a.x_stride, below, chunk * kTensorColumns + group * kV),
                   first + below < rows);
      }
  }

  // The warp's shares of z, eight ranks at a time: m is a rank, its low part 8 further on, n a row (backward_tensor.cu).
  static __device__ int row_at_n(int n) { return n % 4 * 2 + n / 4; }
  __device__ void project(int ranks) const {
    float sum[kHalves][4] = {};
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        const int chunk = chunk_at(i), vector = member + 4 * quarter;
        float read[kV], value[kHalves][kV], share[kHalves][4] = {};
        load_vector(read, a.form.read + (ranks + group) * a.width + chunk * kTensorColumns + vector * kV);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) unpack<T, kV>(cell(chunk, half, row_at_n(group), vector), value[half], 0);
#pragma unroll
        for (int v = 0; v < kV; v += 2) {
          const Parts even = parts(read[v]), odd = parts(read[v + 1]);
#pragma unroll
          for (int half = 0; half < kHalves; ++half)
            multiply(share[half], even.high, even.low, odd.high, odd.low, value[half][v], value[half][v + 1]);
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[half][j] += share[half][j];
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        part[((ranks + group) * kRows + half * kTensorRows + row_at_n(2 * member + n)) * warps() + warp()] =
            sum[half][n] + sum[half][n + 2];
  }
  __device__ void finish_z() const {
    finish_dots<kRows>(rank, part, [&](int j, int r, float sum) {
      if (a.form.offset) sum += __ldg(a.form.offset + j);
      z[j * kRows + r] = sum;
      if (a.z && first + r < rows) a.z[int64_t{first + r} * rank + j] = sum;
    });
  }

  // z @ write of four rows and eight columns: m is the lane's column v or v + 1 of a vector, k a rank, n a row.
  __device__ void combine(float (&sum)[kHalves][4][4], int column) const {
#pragma unroll 1
    for (int ranks = 0; ranks < rank; ranks += 8) {
      float write[2][kV];
      Parts b[kHalves][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int j = ranks + 4 * k + member;
        load_vector(write[k], a.form.write + j * a.width + column);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) b[half][k] = cut(z[j * kRows + half * kTensorRows + group]);
      }
#pragma unroll
      for (int v = 0; v < kV; v += 2) {
        const Parts w[4] = {cut(write[0][v]), cut(write[0][v + 1]), cut(write[1][v]), cut(write[1][v + 1])};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float(&s)[4] = sum[half][v / 2];
          multiply(s, w[0].high, w[1].high, w[2].high, w[3].high, b[half][0].low, b[half][1].low);
          multiply(s, w[0].low, w[1].low, w[2].low, w[3].low, b[half][0].high, b[half][1].high);
          multiply(s, w[0].high, w[1].high, w[2].high, w[3].high, b[half][0].high, b[half][1].high);
        }
      }
    }
  }
  __device__ void edit(int chunk, int step) const {
    const int column = chunk * kTensorColumns + group * kV;
    Vector residual[kHalves][2], x[kHalves][2];
    float sum[kHalves][4][4] = {}, scale[kV], bias[kV];
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int half = i / 2, r = i % 2, row = 2 * member + r;
      x[half][r] = cell(chunk, half, row, group);
      if (!kAdd) continue;
      residual[half][r] = {};
      if (first + half * kTensorRows + row < rows)
        residual[half][r] = load<kOnce, T, kV>(at(a.residual, a.residual_stride, half * kTensorRows + row, column), 0, 0);
    }
    ask_for(step, chunk);
    combine(sum, column);
    load_parameters(scale, a.form.scale, column, 1.f);
    load_parameters(bias, a.form.bias, column, 0.f);
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int half = i / 2, r = i % 2, row = half * kTensorRows + 2 * member + r;
      float h[kV], before[kV];
      unpack<T, kV>(x[half][r], h, 0);
      if constexpr (kAdd) unpack<T, kV>(residual[half][r], before, 0);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        h[v] = fmaf(scale[v], h[v], bias[v] + sum[half][v / 2][v % 2 * 2 + r]);
        if constexpr (kAdd) h[v] += before[v];
      }
      if (first + row < rows) store<T, kV>(at(a.out, a.width, row, column), 0, round_to<T, kV>(h, 0), 0);
    }
  }
};

template <class T, Part kPart>
__global__ void __launch_bounds__(32 * kTensorWarps, 2) tensor_rows_kernel(const EditAddNormArgs given, const int chunks) {
  const EditAddNormArgs args = plain<kPart, true, true>(given);
  const EditAddArgs& a = args.add;
  FASTEDIT_SHARED(shared);
  const int rank = static_cast<int>(a.form.rank), step = static_cast<int>(gridDim.x) * kRows;
  float* part = shared + rank * kRows;
  uint4* stage = reinterpret_cast<uint4*>(part + rank * kRows * warps());
  TensorRows<T, kPart == kPlainAdd> tile{
      a, chunks, rank, shared, part, stage, static_cast<int>(blockIdx.x) * kRows, static_cast<int>(a.rows)};
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) tile.ask_for(0, tile.chunk_at(i));
  for (; tile.first < tile.rows; tile.first += step) {
    wait_copies();
    __syncwarp();
#pragma unroll 1
    for (int ranks = 0; ranks < rank; ranks += 8) tile.project(ranks);
    tile.finish_z();
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) tile.edit(tile.chunk_at(i), step);
  }
  wait_copies();  // the zeros of rows that do not come
}

struct TensorShape {
  int warps, chunks, shared_bytes;
};
TensorShape shape_of(int64_t width, int64_t rank) {
  UnitShape unit = tensor_shape(width, 0, 0, 1 << 30);  // how warps share the columns
  int warps = unit.threads / 32;
  return {warps, unit.chunks, static_cast<int>(kRows * (rank * (1 + warps) * 4 + width * 2))};
}

}  // namespace

bool tensor_rows_serve(const EditAddNormArgs& args) {
  const EditAddArgs& a = args.add;
  Part part = part_of(args);
  int64_t rank = a.form.rank;
  if ((part != kPlainEdit && part != kPlainAdd) || rank == 0 || rank % 8 || a.x_dtype != a.residual_dtype || a.x_dtype == F32)
    return false;
  int vector = Alignment(a.rows, a.width, a.x_dtype)
                   .stream(a.x, a.x_stride, a.x_dtype)
                   .stream(a.residual, a.residual_stride, a.x_dtype)
                   .stream(a.out, a.width, a.x_dtype)
                   .form(a.form)
                   .vector;
  TensorShape shape = shape_of(a.width, rank);
  return vector == kV && shape.warps > 0 && shape.shared_bytes <= shared_limit();
}

int run_tensor_rows(const EditAddNormArgs& args, void* stream) {
  const EditAddArgs& a = args.add;
  TensorShape tile = shape_of(a.width, a.form.rank);
  int64_t resident = multiprocessors() * unit_blocks(32 * tile.warps, tile.shared_bytes, shared_limit());
  Shape shape{least(ceil_div(a.rows, kRows), resident), 32 * tile.warps, tile.shared_bytes};
  auto run = [&](auto kernel) { return launch(kernel, shape, stream, args, tile.chunks); };
  if (a.x_dtype == BF16)
    return a.residual ? run(tensor_rows_kernel<Brain, kPlainAdd>) : run(tensor_rows_kernel<Brain, kPlainEdit>);
  return a.residual ? run(tensor_rows_kernel<Half, kPlainAdd>) : run(tensor_rows_kernel<Half, kPlainEdit>);
}

}  // namespace fastedit::cuda
#endif
