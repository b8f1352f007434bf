// edit_add_norm_backward: total = grad_residual + the norm's gradient at grad_normed, kept in fp32, then
// edit_backward's formulas with grad = total; d_weight = Σ grad_normed ⊙ unit, d_norm_bias = Σ grad_normed.
//
// Streams: grad_residual, grad_normed, residual_out and, where a wanted gradient reads it, h in; d_x and
// d_residual out; each once (backward_unit.h; what does not fit on the chip: backward_sums.cu). total is never
// rounded. Odd widths, unaligned views and rows of which no vector sum fits on the chip are read again for the
// sums (backward_rows.h, backward_columns.h). Then the pairwise sum of the partials (backward_sums.cu). Grids,
// registers and the order of additions are told there; no atomics.
#include "backward_run.h"
#include "backward_unit.h"

namespace fastedit::cuda {
namespace {

template <class G, class H, int V>
int launch_unit(const Backward& b, void* stream) {
  Shape shape{runs(b.units.cut, multiprocessors()), b.unit.threads, b.unit.shared_bytes};
  auto run = [&](auto kernel) { return launch(kernel, shape, stream, b); };
  auto run_rank = [&](auto part) {
    constexpr BackwardPart kPart = part.value;
    if constexpr (kPart == kPlainReft) {
      if (b.a.form.rank == 4) return run(unit_backward<G, H, V, kPart, kFourRanks>);
    }
    if (b.a.form.rank % kRanks == 0) return run(unit_backward<G, H, V, kPart, kWholeRanks>);
    return run(unit_backward<G, H, V, kPart, kAnyRanks>);
  };
  if constexpr (sizeof(G) == 2 && sizeof(H) == 2) {
    BackwardPart part = backward_part(b, int64_t{b.unit.threads} * b.unit.chunks * V);
    if (part == kPlainRed) return run(unit_backward<G, H, V, kPlainRed, kAnyRanks>);
    if (part == kPlainRankNorm) return run_rank(std::integral_constant<BackwardPart, kPlainRankNorm>{});
    if (part == kPlainRank) return run_rank(std::integral_constant<BackwardPart, kPlainRank>{});
    if (part == kPlainReftNorm) return run_rank(std::integral_constant<BackwardPart, kPlainReftNorm>{});
    if (part == kPlainReft) return run_rank(std::integral_constant<BackwardPart, kPlainReft>{});
  }
  if (b.a.slot_order.order) return run(unit_backward<G, H, V, kOverSlots, kAnyRanks>);
  return run(unit_backward<G, H, V, kGeneralBackward, kAnyRanks>);
}

template <class G, class H, int V>
int run_unit(const Backward& b, void* stream) {
  int error = launch_unit<G, H, V>(b, stream);
  for (Backward next = b; !error && next.left.vectors();) {
    error = next_launch(next);
    if (!error) error = launch_unit<G, H, V>(next, stream);
  }
  return error;
}

}  // namespace

int run_units(const Backward& b, void* stream) {
#ifdef FASTEDIT_TENSOR
  if (b.tensor) return run_tensor_units(b, stream);
#endif
  return with_types(b.a.x_dtype, b.a.residual_dtype, [&](auto narrow, auto wide) {
    using H = typename decltype(narrow)::type;
    using G = typename decltype(wide)::type;
    return run_unit<G, H, vector_width(sizeof(G))>(b, stream);
  });
}

int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs& args) {
  return plan_backward(args, args.residual_dtype, true, nullptr).workspace_bytes;
}

int edit_add_norm_backward(const EditAddNormBackwardArgs& args, void* workspace, void* stream) {
  return run_backward<true>(plan_backward(args, args.residual_dtype, true, workspace), stream);
}

}  // namespace fastedit::cuda
