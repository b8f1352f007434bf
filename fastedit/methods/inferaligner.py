"""InferAligner: a safety-aligned model guides another at inference (arXiv 2401.11206).

::

    guidance = inferaligner.fit(target, aligned, tokenizer, harmful, harmless)
    with fastedit.patch(target, guidance.edit(layers=guidance.decisive(), strength=1.0)):
        target.generate(...)

θ_l = mean(h_l | harmful) − mean(h_l | harmless) of the aligned model, at the last token. On the target model::

    x_l ← x_l + α g_l θ_l     at the output of block l, all positions.

g_l is decided once per prompt, at its last token, by the target's own direction s_l: 1 if x_l · s_l + b_l > 0, else 0.
The paper does not say how b_l is chosen. Here s_l is the target's own difference of means, and b_l puts the threshold
half-way between the two means. The paper's sketch shows this gate.
"""

from dataclasses import dataclass

from ..directions.contrast import contrast
from ..directions.directions import Directions
from ..edits.gates import Gate
from ..edits.kinds import Steer


@dataclass(frozen=True)
class Guidance:
    """theta: the aligned model's Directions. own: the target's, with "accuracy" (on held-out texts) and "offset",
    b_l."""

    theta: Directions
    own: Directions

    def edit(self, *, layers=None, strength=1.0):
        """The gated edit. strength: α. `fastedit.calibrate` finds one by its effect.

        layers: None for all. `decisive` names those whose gate decides well.
        """
        thresholds = {layer: -self.own.statistics[layer]["offset"] for layer in self.own}
        gate = Gate(self.own, thresholds, kind="dot", decide="prompt")
        return Steer(self.theta, site="block", layers=layers, strength=strength).when(gate)


    def decisive(self, at_least=0.9):
        """[layer, …] whose gate is right on at least that share of the held-out prompts.

        Raises:
            ValueError: no layer is. The message says which is best.
        """
        found = [layer for layer in self.own if self.own.statistics[layer]["accuracy"] >= at_least]
        if not found:
            best = self.own.best()
            raise ValueError(
                f"no layer's gate is right on {at_least:g} of the held-out prompts: layer {best} is best, with "
                f"{self.own.statistics[best]['accuracy']:.3g}"
            )
        return found


def fit(
    target, aligned, tokenizer, harmful, harmless, *, aligned_tokenizer=None, held_out=0.25, seed=0, batch_size=16,
    max_length=None, progress=None,
):  # fmt: skip
    """Both models' directions from two sets of prompts.

    Args:
        target: the model to guide. aligned: the model that guides, of the same width and depth. The two need not be in
            memory together: `aligned` may also be the Directions from `fastedit.contrast(aligned, …)`.
        tokenizer: the target's. aligned_tokenizer: the aligned model's, if another.
        harmful, harmless: prompts, as each model gets them, four or more of each.
        held_out, seed: the share of the prompts on which the target's gate is judged, and which ones.

    Raises:
        ValueError: widths or layers that differ, and what `fastedit.contrast` refuses.
    """
    _check_shapes(target, aligned)
    options = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    own = contrast(
        target, tokenizer, harmful, harmless, method="probe", probe="mass-mean", held_out=held_out, seed=seed, **options
    )
    theta = aligned
    if not isinstance(aligned, Directions):
        theta = contrast(aligned, aligned_tokenizer or tokenizer, harmful, harmless, **options)
    if theta.width != own.width or theta.layers != own.layers:
        raise ValueError(
            f"the aligned model's directions are {theta.width} wide in layers {_span(theta)}, the target is {own.width} wide "
            f"with layers {_span(own)}: guidance needs a model of the same width and depth, such as another fine-tune of "
            "the same base"
        )
    return Guidance(theta, own)


def _check_shapes(target, aligned):
    """Check the shapes before any forward, as far as the configs give them."""
    shapes = [getattr(model, "config", None) for model in (target, aligned)]
    if None in shapes:
        return
    found = [(c.get_text_config().hidden_size, c.get_text_config().num_hidden_layers) for c in shapes]
    if found[0] != found[1]:
        raise ValueError(
            f"the target is {found[0][0]} wide with {found[0][1]} layers, the aligned model {found[1][0]} wide with "
            f"{found[1][1]}: guidance needs a model of the same width and depth, such as another fine-tune of the same base"
        )


def _span(directions):
    return f"{directions.layers[0]} to {directions.layers[-1]}"
