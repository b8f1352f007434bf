"""RE-Control beside other ways to buy reward with compute: best of n, and reranking of tokens or samples by the value.

    rows = report(handle, tokenizer, prompts, reward, net, samples=4)        # handle: of a Control (fastedit.patch)
    print(table(rows))

Each row has the mean reward, distinct 2-grams as diversity, and the mean log-probability of a token under the model
without control. So reward that is bought with repetition or nonsense shows.
"""

import torch

from ..patching.eval_mode import evaluating
from ..texts.chat import prompt_ids
from ..training.batches import Padded, token_logps
from .replies import left_padded
from .trajectories import _states, collect, rewards_of


def report(
    handle, tokenizer, prompts, reward, net, *, samples=4, max_new_tokens=64, k=8, weight=1.0, batch_size=16, seed=0
):
    """[{"way", "reward", "diversity", "log_p", "responses"}].

    The ways: none, control, best of n, reranked by value (samples, tokens).

    Args:
        handle: on a causal model, with a Control. Its present strength is the control's.
        reward: (prompts, responses) → numbers. net: the ValueNet.
        samples: n of best of n and of reranked samples; also of the sampled ways, where each response counts.
        k, weight: of reranked tokens, see `rerank_tokens`.
    """
    if net.outputs != 1:
        raise ValueError(f"the report compares one reward, and the value net has {net.outputs} outputs: see ValueNet.mixed")
    model, dial = handle.model, handle.strength
    ask = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    try:
        handle.strength = 0.0
        plain = collect(model, tokenizer, prompts, reward, **ask)
        reranked = rerank_tokens(
            model, tokenizer, prompts, net, k=k, weight=weight, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        handle.strength = dial
        steered = collect(model, tokenizer, prompts, reward, **ask)
        handle.strength = 0.0
        last = plain.lengths.cumsum(0) - 1
        with torch.no_grad():
            values = net(plain.states[last].to(net.weight.device)).cpu()
        chosen = {
            "none": range(len(plain)), f"best of {samples}": best_of(plain.rewards, samples),
            f"best value of {samples}": best_of(values, samples),
        }  # fmt: skip
        found = [
            (way, [plain.prompts[i] for i in which], [plain.responses[i] for i in which])
            for way, which in chosen.items()
        ]
        found.insert(1, ("control", steered.prompts, steered.responses))
        found.append((f"tokens reranked, k = {k}", list(prompts), reranked))
        return [_measured(way, model, tokenizer, asked, said, reward, batch_size) for way, asked, said in found]
    finally:
        handle.strength = dial


def best_of(scores, samples):
    """The index of the best of each prompt's samples, which come one after another."""
    best = torch.as_tensor(scores).view(-1, samples).argmax(1)
    return (torch.arange(len(best)) * samples + best).tolist()


def rerank_tokens(model, tokenizer, prompts, net, *, k=8, weight=1.0, max_new_tokens=64, batch_size=16):
    """Greedy decoding by log p + weight · V(state after the token) among the k likeliest tokens. Returns the responses.

    Controlled decoding, FUDGE and DeAL (arXiv 2310.17022, 2104.05218, 2402.06147), with RE-Control's value as scorer.
    """
    found = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(prompts), batch_size):
            found += _reranked(model, tokenizer, prompts[start : start + batch_size], net, k, weight, max_new_tokens)
    return found


def _reranked(model, tokenizer, prompts, net, k, weight, max_new_tokens):
    from transformers import DynamicCache

    given = left_padded([prompt_ids(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id)
    (ids, mask), cache = (tensor.to(model.device) for tensor in given), DynamicCache()
    ends = torch.as_tensor(model.generation_config.eos_token_id or [], device=ids.device).reshape(-1)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True).logits[:, -1]
    rows, said = torch.arange(len(ids), device=ids.device), []
    place, over = place[:, -1:], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        likely, tokens = logits.float().log_softmax(-1).topk(k, -1)
        cache.batch_repeat_interleave(k)
        mask, place = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), place + 1
        with _states(model) as states:
            out = model(
                tokens.reshape(-1, 1), attention_mask=mask.repeat_interleave(k, 0), position_ids=place.repeat_interleave(k, 0),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        value = net(states[0].to(net.weight.device)).to(likely.device).view(-1, k)
        best = (likely + weight * value).argmax(1)
        chosen = rows * k + best
        cache.batch_select_indices(chosen)
        token = tokens[rows, best]
        said.append(torch.where(over, -1, token))
        over, logits = over | torch.isin(token, ends), out.logits[chosen, -1]
        if bool(over.all()):
            break
    return [
        tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in torch.stack(said, 1).tolist()
    ]


def _measured(way, model, tokenizer, prompts, responses, reward, batch_size):
    rewards = [float(r) for part in _parts(len(prompts), batch_size) for r in rewards_of(reward, prompts[part], responses[part])]
    likely = [log_p(model, tokenizer, prompts[part], responses[part]) for part in _parts(len(prompts), batch_size)]
    known = [value for part in likely for value in part if value is not None]
    return {
        "way": way, "reward": sum(rewards) / len(rewards), "diversity": distinct(responses),
        "log_p": sum(known) / len(known) if known else None, "responses": len(responses),
    }  # fmt: skip


def _parts(count, size):
    return [slice(start, start + size) for start in range(0, count, size)]


def distinct(responses, n=2):
    """The share of distinct n-grams of words, over all responses. 0 if there are none."""
    grams = [gram for text in responses for gram in zip(*(text.split()[k:] for k in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def log_p(model, tokenizer, prompts, responses):
    """The mean log-probability of a token of each response after its prompt. None for an empty response."""

    found, rows = [None] * len(prompts), []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        before, behind = prompt_ids(tokenizer, prompt), tokenizer(response, add_special_tokens=False)["input_ids"]
        if before and behind:
            rows.append((number, {"ids": before + list(behind), "prompt": len(before)}))
    if rows:
        batch = {name: t.to(model.device) for name, t in Padded(0)([row for _, row in rows]).items()}
        with evaluating(model):
            said, mask = token_logps(model, model, batch)
        for (number, _), value in zip(rows, (said.sum(1) / mask.sum(1)).tolist(), strict=True):
            found[number] = value
    return found


def table(rows):
    """The rows as lines of text."""
    lines = [("way", "reward", "diversity", "log p a token")]
    lines += [
        (r["way"], f"{r['reward']:.4g}", f"{r['diversity']:.3f}", "–" if r["log_p"] is None else f"{r['log_p']:.3f}")
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
