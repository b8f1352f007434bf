"""`fastedit train --method recontrol`: a value net for the rewards of sampled responses, saved as a Control."""

import importlib
import random
import re
import sys
from pathlib import Path

import typer
from rich.console import Console

from .loading import SIZES, load_model
from .texts import as_chat, read_texts

DEFAULTS = {
    "reward": None, "samples": 4, "max_new_tokens": 64, "units": 4096, "lam": 0.0, "step_size": 0.5, "ascent_steps": 30,
    "lr": 1e-4, "epochs": 100, "batch_size": 512, "rows": None, "chat": False, "seed": 0,
    **{name: value for name, value in SIZES.items() if name not in ("accumulate", "checkpointing")},
}  # fmt: skip
GENERATED_TOGETHER = 16  # sequences per forward


def run(
    model, data, out, *, reward, samples, max_new_tokens, units, lam, step_size, ascent_steps, lr, epochs, batch_size, rows,
    chat, seed, device, dtype, device_map, quantize, resume,
):  # fmt: skip
    console = Console()
    trained = reward.partition(":")[2] if reward and reward.startswith("edit:") else None
    score = None if trained else find_reward(reward)
    prompts = read_texts(data)
    if any(isinstance(prompt, dict) for prompt in prompts):
        raise typer.BadParameter(f"{data} holds rows with responses, expected prompts alone")
    prompts = as_chat(prompts) if chat else prompts
    random.Random(seed).shuffle(prompts)
    prompts = prompts[:rows]
    if len(prompts) < 2:
        raise typer.BadParameter(f"{data} has {len(prompts)} prompt to use, expected 2 or more: some are held out")
    held_out = prompts[: max(1, min(32, len(prompts) // 10))]
    loaded, tokenizer = load_model(model, device, dtype, device_map, quantize)
    import torch

    import fastedit
    from fastedit.methods import recontrol, recontrol_report

    from .progress import bars

    if trained:
        score = _trained_reward(loaded, tokenizer, trained)
    states = Path(out) / "states"
    if not resume and states.is_dir():
        raise typer.BadParameter(
            f"{states} is there from an earlier run: --resume goes on from it; else remove it, or use another --out"
        )
    ask = {"max_new_tokens": max_new_tokens, "batch_size": GENERATED_TOGETHER}
    try:
        with bars(console) as progress:
            found = recontrol.collect(
                loaded, tokenizer, prompts[len(held_out) :], score, samples=samples, seed=seed,
                progress=_bar(progress, "collecting"), folder=states, **ask,
            )  # fmt: skip
            torch.manual_seed(seed)
            net = fastedit.ValueNet(found.width, units, device=next(loaded.parameters()).device)
            control = recontrol.Control(net, step_size, ascent_steps)  # what is wrong with a and n, before the training
            fitted = recontrol.fit(
                net, found, lam=lam, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
                progress=_bar(progress, "fitting"),
            )  # fmt: skip
            control = recontrol.Control(net, step_size, ascent_steps)
            with fastedit.patch(loaded, control) as handle:
                rows = recontrol_report.report(
                    handle, tokenizer, held_out, score, net, samples=4, max_new_tokens=max_new_tokens, seed=seed + 1,
                    batch_size=GENERATED_TOGETHER,
                )  # fmt: skip
                earned = [row["reward"] for row in rows[:2]]
                summary = {
                    "task": "control", "method": "recontrol", "reward": reward, "prompts": len(prompts) - len(held_out),
                    "samples": samples, "max_new_tokens": max_new_tokens, "lam": lam, "lr": lr, "epochs": fitted.best,
                    "batch_size": batch_size, "seed": seed, "error": fitted.error, "held_out": len(held_out),
                    "reward_before": earned[0], "reward_after": earned[1], "report": rows,
                }  # fmt: skip
                fastedit.store.save(handle, out, base_model=model, training=summary)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    start = fitted.epochs[0]["error"]
    console.print(
        f"{len(found):,} responses of {len(found.states):,} tokens, mean reward {found.rewards.mean():.4g}; held-out error "
        f"of the values {start:.4g} before, {fitted.error:.4g} after {fitted.best} epochs",
        highlight=False,
    )
    console.print(
        f"mean reward on {len(held_out)} held-out prompts: {earned[0]:.4g} without, [bold]{earned[1]:.4g}[/] with"
    )
    console.print(recontrol_report.table(rows), markup=False, highlight=False)
    console.print(f"saved {out}; try it with: fastedit generate {model} --edit {out} --prompt '…'", markup=False)


def find_reward(name, flag="--reward"):
    """A function (prompts, responses) → numbers: "word:dog" counts a word, "module:function" is the user's own."""
    if not name:
        raise typer.BadParameter(
            "recontrol needs --reward: word:WORD, edit:FOLDER, or module:function of (prompts, responses)"
        )
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise typer.BadParameter(f"{flag} is {name!r}, expected word:WORD or module:function")
    if module == "word":
        return counting(attribute)
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: modules beside the user
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{flag} {name!r} could not be imported: {error}") from None
    if not callable(found):
        raise typer.BadParameter(f"{flag} {name!r} is {type(found).__name__}, expected a function")
    return found


def counting(word):
    """How often a word stands in each response, whatever its case."""
    pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    return lambda prompts, responses: [float(len(pattern.findall(text))) for text in responses]


def _trained_reward(model, tokenizer, folder):
    """The reward that `fastedit train --task reward` saved for this model."""
    import fastedit
    from fastedit.training import RewardModel

    try:
        reward = RewardModel(model)
        fastedit.load(model, folder)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    return reward.scorer(tokenizer)


def _bar(progress, name):
    task = progress.add_task(name, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)
