// edit, edit_add and edit_add_norm behind a gate: k = coefficient · g, where g follows from h · gate and ‖h‖ (abi.h).
//
// Streams: the ungated op's, each once: h is in registers when its score is known. A row too wide for a tile is read
// once more, from L2, than without its gate.
// Grid, tiles and determinism: edit_add_norm.cu, always as with a rank: the gate is one more read row, the sum of
// squares rides in the same tree of shuffles. k goes to the block through shared memory, behind z.
// A row that its gate closes keeps its bits and costs no other access: only where it holds a NaN, whose payload a
// conversion loses, is the vector loaded again.
#include "row_kernels.h"
#include "rows.h"

namespace fastedit::cuda {

int edit_gated_rows(const EditAddNormArgs& a, void* stream) { return run_any_rows<true>(a, stream); }

}  // namespace fastedit::cuda
