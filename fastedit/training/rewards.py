"""A reward model as an edit: pairs of responses → a scalar head and an edit on the model that answers, in memory once.

    reward = training.RewardModel(model)                                     # adds model.score, (1, width), fp32
    handle = fastedit.patch(model, fastedit.RED(), freeze=True)
    training.fit_reward(reward, handle, tokenizer, pairs)                    # {"prompt", "chosen", "rejected"}
    recontrol.collect(model, tokenizer, prompts, reward.scorer(tokenizer))   # the edit acts while it scores, and not else
    handle.save("my-reward")

Loss: −log σ(r_chosen − r_rejected), r the head on the state of `final` at the response's last token (arXiv 2203.02155).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..capturing.truncated_forward import forward_until
from ..edits.kinds import Edit
from ..families import find_layers
from ..hints import Folder, Row
from ..patching.eval_mode import evaluating
from ..patching.handle import Handle, handles
from ..patching.layer_plan import choose
from ..patching.model_edits import root_of
from ..texts.chat import encode, prompt_ids
from .batches import Padded, _takes
from .responses import ResponseTrainer, _run, encode_pairs, pad_of


class RewardModel(nn.Module):
    """forward(input_ids, attention_mask (rows, tokens), padded on the left) → {"rewards": (rows,) fp32}.

    Args:
        model: a causal language model. A head `score` is added to it, and `remove` takes it off. Patch the edit onto
            `model` after this, with freeze=True, or load one: `fastedit.load(model, folder)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if hasattr(model, "score"):
            raise ValueError(f"{type(model).__name__} has a head `score` already; give a model without one")
        self.model = model
        first, width = next(model.parameters()), model.config.get_text_config().hidden_size
        model.score = nn.Linear(width, 1, bias=False, device=first.device, dtype=torch.float32)
        nn.init.normal_(model.score.weight, std=1 / (width + 1))
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        found, root = [], root_of(self.model)
        layers = find_layers(self.model) if root is None else root.layers
        place = [(choose(Edit((), site="final"), layers)[0], "final", lambda hidden: found.append(hidden[:, -1]))]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if "position_ids" in _takes(self.model):
            given["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
        if root is None:
            forward_until(self.model, place, given)
        else:  # to a reward the whole text is the prompt
            root.rows.labelled(torch.full_like(input_ids, -100), forward_until, self.model, place, given)
        return {"rewards": self.model.score(found[0].float())[:, 0]}

    def scorer(self, tokenizer: Any, batch_size: int = 8) -> Callable[[Sequence[Any], Sequence[str]], list[float]]:
        """A function (prompts, responses) → [float], as RE-Control's `reward=` and a report take; prompts as in training.

        While it scores, the handles that were on the model at this call act at their present strength, and no others.
        Outside of it they are at strength 0, so the model answers as it would without them.

        tokenizer: of the model. batch_size: rows per forward.
        """
        mine = [(handle, handle.strength) for handle in handles(self.model)]
        for handle, _ in mine:
            handle.strength = 0.0

        def score(prompts, responses):
            before = [(handle, handle.strength) for handle in handles(self.model) if not handle.merged]
            try:
                for handle, _ in before:
                    handle.strength = next((s for known, s in mine if known is handle), 0.0)
                return self._scores(tokenizer, prompts, responses, batch_size)
            finally:
                for handle, strength in before:
                    handle.strength = strength

        score.takes_messages = True
        return score

    @torch.no_grad()
    def _scores(self, tokenizer, prompts, responses, batch_size):
        rows = [{"ids": _ids(tokenizer, p, r), "prompt": 0} for p, r in zip(prompts, responses, strict=True)]
        device, found, collate = self.model.score.weight.device, [], Padded(pad_of(tokenizer))
        with evaluating(self):
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size])
                given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                found += self(**given)["rewards"].tolist()
        return found

    def remove(self) -> None:
        """Take the head off the model."""
        del self.model.score


def _ids(tokenizer, prompt, response):
    """Prompt and response as in training. An empty response is its end token alone; an empty prompt adds nothing."""
    if not prompt:
        return [*prompt_ids(tokenizer, response), tokenizer.eos_token_id]
    if not response.strip():
        return [*prompt_ids(tokenizer, prompt), tokenizer.eos_token_id]
    return encode(tokenizer, prompt, response).ids


class RewardTrainer(ResponseTrainer):
    """An EditTrainer for a RewardModel on pairs, with MetaRM's ascent step if it is given `shifted` rows.

    MetaRM (arXiv 2405.00438): before each step θ' = θ + η ∇J, where J is the mean over pairs of shifted responses of
    σ(|r_i − r_j|). The preference loss at θ' moves θ. The form of J is from a secondary source, the paper's figure and
    text.
    """

    def __init__(self, *, reward, shifted=(), ascent=0.0, **given):
        super().__init__(**given)
        self.model_accepts_loss_kwargs = False
        self.reward, self.ascent = reward, ascent
        self.shifted = itertools.cycle(shifted) if shifted else None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.shifted is None or not self.ascent:
            return super().training_step(model, inputs, num_items_in_batch)
        trained = [p for p in self.handle.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        count = len(inputs["input_ids"])
        batch = self._prepare_inputs(self.data_collator(list(itertools.islice(self.shifted, count))))
        spread = spread_of(self.reward(batch["input_ids"], batch["attention_mask"])["rewards"])
        grads = torch.autograd.grad(spread, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    parameter.add_(grad, alpha=self.ascent)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            with torch.no_grad():
                for parameter, tensor in zip(trained, before, strict=True):
                    parameter.copy_(tensor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = self.reward(inputs["input_ids"], inputs["attention_mask"])["rewards"].chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        return (loss, {"loss": loss}) if return_outputs else loss


def spread_of(rewards):
    """MetaRM's J: the mean over pairs of different rows of σ(|r_i − r_j|)."""
    apart = (rewards[:, None] - rewards[None]).abs()
    first, second = torch.triu_indices(len(rewards), len(rewards), 1)
    return torch.sigmoid(apart[first, second]).mean()


def fit_reward(
    reward: RewardModel, handle: Handle, tokenizer: Any, pairs: Sequence[Row], *, evaluate: Sequence[Row] | None = None,
    shifted: Sequence[Row] = (), ascent: float = 0.0, lr: float = 2e-3, epochs: float = 2, batch_size: int = 8,
    prompt: int | None = None, response: int | None = None, seed: int = 0, callbacks: Iterable[Any] = (),
    output_dir: Folder | None = None, resume: Folder | bool | None = None, **arguments: Any,
) -> RewardTrainer:  # fmt: skip
    """Train a RewardModel and the handle on its model. Returns the Trainer.

    Args:
        reward: a RewardModel. handle: from `fastedit.patch(reward.model, ..., freeze=True)`.
        pairs: rows {"prompt", "chosen", "rejected"}; a prompt is a text or a list of messages.
        shifted: rows {"prompt", "response"} of another distribution, without labels, two or more. ascent: MetaRM's η, 0
            for none.
        tokenizer: of the handle's model.
        evaluate: held-out rows, for `Trainer.evaluate()`. lr: of AdamW. epochs, batch_size: of the training.
        prompt, response: the most tokens of each. A longer prompt loses its beginning, a longer response its end.
        seed: of the order of rows and of dropout. callbacks: for the Trainer.
        output_dir: folder of checkpoints, one per epoch. None for none. resume: a checkpoint to continue from, or True
            for the last.
        arguments: further TrainingArguments, such as gradient_accumulation_steps, gradient_checkpointing, bf16.

    Raises:
        ValueError: a bad row, by number; a handle that is not on the reward's model; shifted rows without ascent, or
            ascent without shifted rows.
    """
    if handle.model is not reward.model:
        raise ValueError("the handle is not on the reward's model: fastedit.patch(reward.model, …, freeze=True)")
    if bool(shifted) != bool(ascent) or len(shifted) == 1:
        raise ValueError(f"MetaRM needs two or more shifted rows and an ascent: found {len(shifted)} and {ascent}")
    unlabelled = [{"ids": encode(tokenizer, row["prompt"], row["response"]).ids, "prompt": 0} for row in shifted]
    given = [encode_pairs(tokenizer, part, prompt, response) for part in (pairs, evaluate or [])]
    return _run(
        RewardTrainer, handle, tokenizer, *given, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, callbacks=callbacks,
        output_dir=output_dir, resume=resume, trainer={"reward": reward, "shifted": unlabelled, "ascent": ascent},
        arguments=arguments,
    )  # fmt: skip


def ranked(reward, tokenizer, pairs, batch_size=8):
    """The share of pairs {"prompt", "chosen", "rejected"} whose chosen response gets the higher reward."""
    features, hits = encode_pairs(tokenizer, pairs), 0
    collate, device = Padded(pad_of(tokenizer)), reward.model.score.weight.device
    with torch.no_grad(), evaluating(reward):
        for start in range(0, len(features), batch_size):
            batch = collate(features[start : start + batch_size])
            found = reward(batch["input_ids"].to(device), batch["attention_mask"].to(device))["rewards"]
            chosen, rejected = found.chunk(2)
            hits += int((chosen > rejected).sum())
    return hits / len(features)
