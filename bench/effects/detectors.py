"""What concepts.py trains with the model's own loss to tell texts that hold a concept from others: ReFT-r1 and RED.

    ReFT-r1   arXiv 2501.17148: a unit vector v at the output of a block. A token's score is ReLU(h·v); (mean of a text's k
              largest scores)·v is added to all of its tokens; the loss is −log p a token of the answer + λ·(mean score
              outside the k largest), λ rising from 0 to its end along the training. Half of its texts hold the concept
    RED       scale and bias behind the FFN of that block, trained on the texts that hold it alone. A text's score is by how
              much they raise log p a token of its answer
"""

import torch

import fastedit as fe
from fastedit.patching.eval_mode import evaluating
from fastedit.training.batches import Padded, token_logps
from fastedit.training.reference import at_strength

K, L1, RATE_R1, RATE_RED, EPOCHS, BATCH = 8, 0.005, 0.01, 0.02, 2, 12


def reft_r1(model, positive, negative, blocks, seed):
    """v (width,) float64, from the features of texts that hold the concept and of as many others."""
    v = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    v = (v / v.norm()).requires_grad_()
    now = {}

    def add(_module, _inputs, output):
        h = output[0] if isinstance(output, tuple) else output
        scores = (h @ v).relu() * now["mask"]
        top = scores.topk(min(K, scores.shape[1]), dim=1)
        now["outside"] = (scores.sum() - top.values.sum()) / now["mask"].sum()
        h = h + top.values.mean(1)[:, None, None] * v
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def loss(batch, progress):
        now["mask"] = batch["attention_mask"].to(v.dtype)
        return _unlikely(model, batch) + progress * L1 * now["outside"]

    def unit():
        v.data /= v.data.norm()

    was = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hook = model.model.layers[blocks - 1].register_forward_hook(add)
    try:
        model.requires_grad_(False)
        _descend(model, [v], RATE_R1, [*positive, *negative[::2][: len(positive)]], loss, seed, unit)
    finally:
        hook.remove()
        for parameter, needs in was:
            parameter.requires_grad_(needs)
    return v.detach().double()


def red_gain(model, positive, judged, blocks, seed):
    """By how much RED, trained on `positive`, raises log p a token of each judged answer, nats (texts,)."""
    handle = fe.patch(model, fe.RED(layers=[blocks - 1]), freeze=True)
    try:
        _descend(model, handle.parameters(), RATE_RED, positive, lambda batch, _: _unlikely(model, batch), seed)
        with at_strength(handle, 0.0):
            before = _likely(model, judged)
        return _likely(model, judged) - before
    finally:
        handle.remove()


def _descend(model, parameters, rate, features, loss, seed, after=None):
    optimizer, draw = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), torch.Generator().manual_seed(seed)
    steps, step = EPOCHS * -(-len(features) // BATCH), 0
    with evaluating(model):
        for _ in range(EPOCHS):
            order = torch.randperm(len(features), generator=draw).tolist()
            for start in range(0, len(order), BATCH):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                loss(Padded(0)([features[n] for n in order[start : start + BATCH]]), step / steps).backward()
                optimizer.step()
                optimizer.zero_grad()
                if after is not None:
                    after()
                step += 1


def _unlikely(model, batch):
    said, mask = token_logps(model, model, batch)
    return -said.sum() / mask.sum()


@torch.no_grad()
def _likely(model, features):
    """log p a token of each answer, nats (texts,)."""
    order, found = sorted(range(len(features)), key=lambda n: len(features[n]["ids"])), torch.empty(len(features))
    with evaluating(model):
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            said, mask = token_logps(model, model, Padded(0)([features[n] for n in some]))
            found[some] = said.sum(1) / mask.sum(1)
    return found
