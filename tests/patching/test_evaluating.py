"""One way into eval mode, and every submodule back in its own mode."""

import pytest
import tiny_models as tiny
import torch

import fastedit as fe
from fastedit.methods import recontrol, replies
from fastedit.patching.eval_mode import evaluating


def mixed():
    """A model that trains, but for one layer: as users freeze dropout in a part."""
    model = tiny.build("llama").train()
    model.model.layers[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_evaluates_and_gets_its_own_mode_back():
    model = mixed()
    before = modes(model)
    assert len(set(before)) == 2
    with evaluating(model) as same:
        assert same is model and not any(modes(model))
        model.model.layers[1].train()
    assert modes(model) == before


def test_after_an_exception_too():
    model = mixed()
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before


def test_modules_that_override_train_are_not_called():
    """`train` may do more than set the flag, such as merge weights; behind mixed modes it could not be undone."""

    class Merges(torch.nn.Linear):
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = torch.nn.Sequential(Merges(2, 2), torch.nn.Dropout())
    model.train()
    with evaluating(model):
        assert not model[0].training and not model[0].merged
    assert all(modes(model)) and not model[0].merged


class Letters:
    pad_token_id = eos_token_id = 0
    bos_token_id = bos_token = eos_token = chat_template = None

    def __call__(self, text, *special, **options):
        if isinstance(text, str):
            return {"input_ids": [3 + ord(c) % 50 for c in text]}
        ids = torch.tensor([[3 + ord(c) % 50 for c in one] for one in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids, skip_special_tokens):
        return str(ids.tolist())


def seen_by(model):
    """A list of the modes in which the model's layers ran."""
    found = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: found.append(module.training))
    return found


def failing(prompts, responses):
    raise KeyError("no reward")


USES = {
    "capture": lambda model: fe.capture(model, None, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], layers=[2]),
    "replies": lambda model: replies.replies(model, Letters(), ["abc", "de"], max_new_tokens=2),
    "collect": lambda model: recontrol.collect(model, Letters(), ["abc"], lambda p, r: [1.0], max_new_tokens=2),
    "collect, the reward raises": lambda model: recontrol.collect(model, Letters(), ["abc"], failing, max_new_tokens=2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_measures_a_model_leaves_its_modes(use):
    model = mixed()
    before, ran = modes(model), seen_by(model)
    if use is USES["collect, the reward raises"]:
        with pytest.raises(KeyError, match="no reward"):
            use(model)
    else:
        use(model)
    assert ran and not any(ran) and modes(model) == before
