"""steering-vectors: a hook a block that adds a vector, or by its ablation operator takes a direction out, in place."""

from ..registry import INFERENCE, variant
from ..sizes import site_path

KIND = {"kinds": ("steer", "ablate"), "works": INFERENCE, "needs": ("steering_vectors",)}


@variant("steering-vectors", **KIND)
def steering_vectors(model, values):
    from steering_vectors import SteeringVector
    from steering_vectors.steering_operators import ablation_operator

    cast = values.to(model.device, model.dtype)
    steering = values.kind == "steer"
    vectors = {layer: form.bias if steering else form.read[0] for layer, form in enumerate(cast.forms)}
    SteeringVector(vectors, "decoder_block").patch_activations(
        model,
        layer_config={"decoder_block": site_path(model, values.site).format("{num}")},
        operator=None if steering else ablation_operator(),
    )
    return model
