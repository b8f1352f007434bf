"""Where the prompt ends, in training: by the labels, by what the user says, or refused."""

import pytest
import tiny_models as tiny
import torch

import fastedit as fe

IDS = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(3))
LENGTHS = [3, 5, 2]


def labelled(left):
    """Ids, mask and labels of three rows with 3, 5 and 2 tokens of prompt and 3, 2 and 4 of response."""
    mask, labels = torch.zeros_like(IDS), torch.full_like(IDS, -100)
    for row, (prompt, response) in enumerate(zip(LENGTHS, (3, 2, 4), strict=True)):
        first = IDS.shape[1] - prompt - response if left else 0
        mask[row, first : first + prompt + response] = 1
        labels[row, first + prompt : first + prompt + response] = IDS[row, first + prompt : first + prompt + response]
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels}


def gradients(model, handle, given):
    model(**given, use_cache=False).loss.backward()
    found = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("spec", ["last 2", "prompt", "generated", "first 1 + last 1", "generated + first 2"])
def test_labels_say_where_the_prompt_ends(spec, left, family):
    model = tiny.exact(tiny.build(family)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    handle = fe.patch(model, fe.RED(positions=spec), freeze=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    given = labelled(left)
    by_labels = gradients(model, handle, given)
    with torch.no_grad():
        logits = model(**given).logits
    handle.prompt(LENGTHS)
    for found, expected in zip(by_labels, gradients(model, handle, given), strict=True):
        assert torch.equal(found, expected) and expected.abs().max() > 0
    unlabelled = {name: value for name, value in given.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**unlabelled).logits, logits)
        handle.prompt(None)
        assert spec == "first 1" or not torch.equal(model.eval()(**unlabelled).logits, logits), (
            "a bare forward is all prompt"
        )


@pytest.mark.parametrize("spec", ["last 2", "prompt", "generated"])
def test_training_that_does_not_say_where_the_prompt_ends_is_refused(spec):
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED(positions=spec), freeze=True)
    given = labelled(True)
    labels = given.pop("labels")
    with pytest.raises(RuntimeError, match=f"positions '{spec}' depend on where the prompt ends.*labels with -100"):
        model(**given)
    handle.prompt(LENGTHS)
    model(**given)
    handle.prompt(None)
    turns = labels.clone()
    turns[1, -2], turns[1, -4] = -100, 5
    with pytest.raises(ValueError, match="sequence 1 has several responses in its labels"):
        model(**given, labels=turns)
    if spec != "generated":
        with pytest.raises(ValueError, match="sequence 0 has no prompt by its labels"):
            model(**given, labels=given["input_ids"])
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(ValueError, match="the rows of this forward are packed"):
        model(input_ids=IDS, labels=labels, position_ids=packed)
    padded = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**given, labels=labels, position_ids=padded)


@pytest.mark.parametrize("decide", ["prompt", "prompt mean"])
def test_a_gate_on_the_prompt_decides_on_what_stands_before_the_labels(decide):
    model = tiny.exact(tiny.build("llama")).train()
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    handle = fe.patch(model, fe.RED().when(fe.Gate(vector, sharpness=1.0, decide=decide)), freeze=True)
    given = labelled(True)
    by_labels = gradients(model, handle, given)
    handle.prompt(LENGTHS)
    for found, expected in zip(by_labels, gradients(model, handle, given), strict=True):
        assert torch.equal(found, expected) and expected.abs().max() > 0
    handle.prompt(None)
    unlabelled = {name: value for name, value in given.items() if name != "labels"}
    with pytest.raises(RuntimeError, match="a gate on the prompt depends on where the prompt ends"):
        model(**unlabelled)
    with pytest.raises(ValueError, match=r"a gate on the prompt: sequence 0 has no prompt.*decide by token"):
        model(**unlabelled, labels=IDS)


def test_what_does_not_depend_on_the_prompt_s_end_trains_as_before():
    for spec in (None, "first 2", {"tokens": [5]}):
        model = tiny.build("llama").train()
        fe.patch(model, fe.RED(positions=spec), freeze=True)
        model(input_ids=IDS).logits.sum().backward()
    encoder = tiny.build("bert").train()
    fe.patch(encoder, fe.RED(positions="last 2"), freeze=True)
    encoder(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
