"""`fastedit train --task sft|preference`: an edit on a causal model, from rows of text or chat messages."""

import random
from pathlib import Path

from rich.console import Console

from ..texts.data_files import read_rows
from .loading import SIZES, load_model, trainer_options
from .train import edits_of

_OWN = {
    "rank": 4, "layers": None, "positions": None, "site": None, "evaluate": None, "lr": None, "epochs": 3, "batch_size": 8,
    "rows": None, "prompt_tokens": 1024, "response_tokens": 512, "chat": False, "seed": 0,
}  # fmt: skip
RATES = {"red": 2e-2, "red+": 5e-3, "vector": 2e-2}  # of SFT; of the others 2e-3


def defaults(task):
    more = {"loss": "dpo", "beta": 0.1, "store": False} if task == "preference" else {"prompt": None, "response": None}
    return _OWN | more | SIZES


def run(model, data, out, method, task, *, rank, layers, positions, site, evaluate, lr, epochs, batch_size, rows, prompt_tokens,
        response_tokens, chat, seed, device, dtype, device_map, quantize, accumulate, checkpointing, resume, **own):  # fmt: skip
    if own.get("loss") == "orpo" and own["store"]:
        raise ValueError("--store keeps the reference's log-probabilities, and orpo has no reference")
    train, held = split(data, evaluate, rows, seed)
    if chat:
        train, held = ([as_chat(row) for row in part] for part in (train, held))
    edits = edits_of(method, rank=rank, seed=seed, layers=layers, positions=positions, site=site)
    loaded, tokenizer = load_model(model, device, dtype, device_map, quantize)
    from .. import patch, training
    from ..patching import edit_folder as store
    from .progress import TrainingBar, bars

    console, handle = Console(), patch(loaded, edits, freeze=True)
    console.print(
        f"{method} on {model}: {handle.num_parameters():,} parameters; {len(train):,} rows, {len(held):,} held out"
    )
    lr = RATES.get(method, 2e-3) if lr is None else lr
    given = {
        "evaluate": held, "lr": lr, "epochs": epochs, "batch_size": batch_size, "seed": seed, "prompt": prompt_tokens,
        "response": response_tokens, "output_dir": Path(out) / "checkpoints", "resume": resume or None,
        **trainer_options(device=device, accumulate=accumulate, checkpointing=checkpointing),
    }  # fmt: skip
    with bars(console) as progress:
        given["callbacks"] = [TrainingBar(progress, task)]
        if task == "sft":
            columns = (
                (own["prompt"] or "prompt", own["response"] or "response") if own["prompt"] or own["response"] else None
            )
            measure = _sft_loss(tokenizer, held, columns, prompt_tokens, response_tokens, batch_size)
            before = measure(loaded)
            training.sft(handle, tokenizer, train, columns=columns, **given)
        else:
            measure = _margin(tokenizer, held, prompt_tokens, response_tokens, batch_size)
            before = measure(loaded)
            stored = Path(out) / "reference.safetensors" if own["store"] else None
            training.prefer(handle, tokenizer, train, loss=own["loss"], beta=own["beta"], stored=stored, **given)
        after = measure(loaded)
    name = "loss" if task == "sft" else "margin"
    summary = {
        "task": task, "method": method, "rows": len(train), "held_out": len(held), "epochs": epochs, "lr": lr, "seed": seed,
        "batch_size": batch_size, "accumulate": accumulate,
        "chat": not _is_plain(train[0], own.get("prompt")), f"{name}_before": before, f"{name}_after": after,
        **({"loss": own["loss"], "beta": own["beta"]} if task == "preference" else {}),
    }  # fmt: skip
    store.save(handle, out, base_model=model, training=summary)
    tokenizer.save_pretrained(out)
    what = "−log p of a response token" if task == "sft" else "log p(chosen) − log p(rejected)"
    console.print(f"held-out {what}: {before:.4f} before, [bold]{after:.4f}[/] after")
    console.print(f"saved {out}; try it with: fastedit predict {out} --model {model} 'a prompt'", markup=False)


def split(data, evaluate, rows, seed, read=read_rows):
    """(rows to train on, rows held out): a tenth, or those of another file."""
    found = read(data)
    random.Random(seed).shuffle(found)
    found = found[:rows]
    if evaluate is not None:
        return found, read(evaluate)
    if len(found) < 2:
        raise ValueError(f"{data} has {len(found)} row, too few to hold some out; see --eval")
    held = max(1, len(found) // 10)
    return found[held:], found[:held]


def as_chat(row):
    """A row whose prompt is a string, as one user turn."""
    return (
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} if isinstance(row.get("prompt"), str) else row
    )


def _is_plain(row, column):
    """Whether the prompt is a string that is taken as it is."""
    return isinstance(row.get(column or "prompt"), str)


def _sft_loss(tokenizer, held, columns, prompt, response, batch_size):
    from ..training.responses import encode

    features = encode(tokenizer, held, columns, prompt, response)

    def measure(model):
        from ..training.batches import Padded, token_logps

        total = count = 0
        for said, mask in _each(model, features, batch_size, Padded(0), lambda batch: token_logps(model, model, batch)):
            total, count = total - float(said.sum()), count + int(mask.sum())
        return total / count

    return measure


def _margin(tokenizer, held, prompt, response, batch_size):
    from ..training.responses import encode_pairs

    features = encode_pairs(tokenizer, held, prompt, response)

    def measure(model):
        from ..training.batches import Padded, response_logps

        found = []
        for (chosen, rejected), _ in _each(
            model, features, batch_size, Padded(0), lambda b: response_logps(model, model, b)
        ):
            found += (chosen - rejected).tolist()
        return sum(found) / len(found)

    return measure


def _each(model, features, batch_size, collate, work):
    import torch

    from ..patching.eval_mode import evaluating

    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(features), batch_size):
            yield work({name: t.to(device) for name, t in collate(features[start : start + batch_size]).items()})
