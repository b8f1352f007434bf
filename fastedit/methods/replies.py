"""What a model replies, greedily and in batches, and how certain a share of the replies is."""

import math

import torch

from ..patching.eval_mode import evaluating
from ..texts.chat import prompt_ids


@torch.no_grad()
def replies(model, tokenizer, prompts, *, max_new_tokens=64, batch_size=8):
    """The greedy continuation of each prompt, a string or chat messages, without the prompt and without special tokens.

    Prompts of similar lengths share a batch, padded on the left. The model answers in eval mode and is left as it was.
    """
    given = [prompt_ids(tokenizer, prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    order, said = sorted(range(len(given)), key=lambda k: len(given[k])), [None] * len(given)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = left_padded([given[k] for k in batch], pad)
            made = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                max_new_tokens=max_new_tokens, pad_token_id=pad,
            )  # fmt: skip
            for k, reply in zip(batch, made[:, ids.shape[1] :], strict=True):
                said[k] = tokenizer.decode(reply, skip_special_tokens=True)
    return said


def left_padded(given, pad):
    """(input_ids, attention_mask), (sequences, columns) int64, of lists of token ids."""
    columns = max(map(len, given))
    ids = torch.tensor([[pad] * (columns - len(some)) + list(some) for some in given])
    return ids, torch.tensor([[0] * (columns - len(some)) + [1] * len(some) for some in given])


def plain(prompt):
    """What a judge sees: a string as it is; of messages the last one's content."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def wilson(hits, of, z=1.96):
    """Wilson's 95 % interval of a share."""
    share, square = hits / of, z * z / of
    centre, half = share + square / 2, z * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
