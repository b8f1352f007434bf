"""PEFT's adapters at RED's site, as peers in training: other edits, of the same place and purpose."""

from ..registry import FAMILIES, TRAINING, variant
from ..sizes import site_path

OPTIONS = {"kinds": ("red",), "works": TRAINING, "needs": ("peft",), "same_edit": False, "families": FAMILIES}


def _targets(model):
    """The layers' FFN outputs and no others: in BERT the attention's output has the same name."""
    return [site_path(model, "mlp").format(layer) for layer in range(model.config.num_hidden_layers)]


@variant("PEFT LoRA r=8", note="another edit: the weight's, of rank 8", **OPTIONS)
def lora(model, values):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=_targets(model)))


@variant("PEFT (IA)3", note="another edit: scale without bias", **OPTIONS)
def ia3(model, values):
    from peft import IA3Config, get_peft_model

    return get_peft_model(model, IA3Config(target_modules=_targets(model), feedforward_modules=[]))
