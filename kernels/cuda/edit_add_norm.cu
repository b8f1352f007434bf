// edit_add_norm: residual' = residual + E(x), or E(residual + x), and a norm of the rounded residual':
//   RMS weight · round(r · rstd)   GEMMA round(r · rstd · (1 + weight))
//   LAYER round((r − mean) · rstd · weight + norm_bias)
//
// Behind a gate: edit_gated.cu. The kernels: row_kernels.h.
//
// Streams: x, residual in; residual', normed out. With parts left out the same kernels are edit and
// edit_add of rank > 0, and project.
// Grid: as many blocks as fit on the chip, each taking tiles of 32 / E rows in turn. A tile stays in
// registers from the first load to the last store; parameters come through L1, once for a tile's rows.
// Rows wider than kTileWidth, odd widths and unaligned views go row by row through loop_rows, which forms each
// vector again, from L1 or L2, where it needs it: once for z, once for out and the squares, once for normed, and
// once more for LayerNorm's mean. Vectors are of one element where width or alignment ask for it. Under FASTEDIT_CLUSTERS
// (off: cluster.h) a cluster of blocks takes most wide rows, in tiles.
// A row's sums are trees over lanes and warps whose shape the width fixes: no other row, and no grid,
// changes a bit of it.
#include "row_kernels.h"
#include "rows.h"

namespace fastedit::cuda {

int edit_rows(const EditAddNormArgs& a, void* stream) {
#ifdef FASTEDIT_TENSOR
  if (tensor_rows_serve(a)) return run_tensor_rows(a, stream);
#endif
  return a.add.form.gate ? edit_gated_rows(a, stream) : run_any_rows<false>(a, stream);
}

int edit_add_norm(const EditAddNormArgs& a, void* stream) {
  EditAddNormArgs rows = a;
  // Rows without columns have statistics, though `normed`, by which the kernels know a norm, may have no address.
  if (a.add.width == 0) rows.normed = a.rstd;
  return edit_rows(rows, stream);
}

}  // namespace fastedit::cuda
