"""What a model is made to do: each work prepares a step, a function of no arguments, whose result is compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .edits import TOKEN
from .registry import FAMILIES
from .sizes import VOCABULARY

PROMPT = 64  # tokens in the cache that decoding starts behind
ANSWER = 32  # of generation
BATCH, LENGTH = 4, 128  # of a training step


@dataclass(frozen=True)
class Work:
    """prepare(model, base) → step; the base says what config and device. families: of models that can do it."""

    name: str
    prepare: Callable
    training: bool = False
    families: tuple = FAMILIES


def ids(base, batch, length):
    return torch.arange(batch * length, device=base.device).view(batch, length) % VOCABULARY


def decode(batch):
    """One token through the model behind a cache of PROMPT, the cache cropped back after each."""

    def prepare(model, base):
        from transformers import DynamicCache

        with torch.no_grad():
            cache = DynamicCache(config=base.config)
            model(input_ids=ids(base, batch, PROMPT), past_key_values=cache, use_cache=True)
        token = torch.full((batch, 1), TOKEN, device=base.device)

        def step():
            with torch.no_grad():
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)  # negative: how many to drop
            return logits

        return step

    return prepare


def prefill(length):
    def prepare(model, base):
        tokens = ids(base, 1, length)
        more = {"use_cache": False} if base.config.model_type == "llama" else {}

        def step():
            with torch.no_grad():
                return model(input_ids=tokens, **more).logits

        return step

    return prepare


def generate(model, base, **more):
    """Greedy generation of ANSWER tokens after a prompt of PROMPT; more: what else `generate` is to return."""
    prompt = ids(base, 1, PROMPT)
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": ANSWER}

    def step():
        with torch.no_grad():
            return model.generate(**asked, do_sample=False, pad_token_id=0, **more)

    return step


def answer(model, base):
    """What a step of generation chooses, with `sequences` and the `logits` of each token chosen."""
    return generate(model, base, return_dict_in_generate=True, output_logits=True)()


def training_step(model, base):
    """Forward, backward and an AdamW step; the step returns the loss."""
    tokens = ids(base, BATCH, LENGTH)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing of this variant trains")
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def training_logits(model, base):
    """What a training step's forward says, before anything has moved."""
    model.train()
    tokens = ids(base, BATCH, LENGTH)
    return model(input_ids=tokens, labels=tokens).logits.detach()


WORKS = {
    work.name: work
    for work in (
        Work("decode", decode(1), families=("llama",)),
        Work("decode 16", decode(16), families=("llama",)),
        Work("decode 64", decode(64), families=("llama",)),
        Work("prefill 256", prefill(256)),
        Work("generate 32", generate, families=("llama",)),
        Work("training step", training_step, training=True),
    )
}
