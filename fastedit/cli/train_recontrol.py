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
    "reward": None, "samples": 4, "max_new_tokens": 64, "units": "4096", "lam": 0.0, "step_size": 0.5, "ascent_steps": 30,
    "target": None, "lr": 1e-4, "epochs": 100, "batch_size": 512, "rows": None, "chat": False, "seed": 0,
    **{name: value for name, value in SIZES.items() if name not in ("accumulate", "checkpointing")},
}  # fmt: skip
GENERATED_TOGETHER = 16  # sequences per forward


def run(
    model, data, out, *, reward, samples, max_new_tokens, units, lam, step_size, ascent_steps, target, lr, epochs, batch_size,
    rows, chat, seed, device, dtype, device_map, quantize, resume,
):  # fmt: skip
    console = Console()
    trained = reward.partition(":")[2] if reward and reward.startswith("edit:") else None
    score = None if trained else find_reward(reward)
    prompts, held_out = _prompts(data, rows, chat, seed)
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
                loaded, tokenizer, prompts, score, samples=samples, seed=seed,
                progress=_bar(progress, "collecting"), folder=states, **ask,
            )  # fmt: skip
            torch.manual_seed(seed)
            net = fastedit.ValueNet(found.width, _units(units), device=next(loaded.parameters()).device)
            recontrol.Control(net, step_size, ascent_steps, target=target)  # mistakes are said before the training
            fitted = recontrol.fit(
                net, found, lam=lam, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
                progress=_bar(progress, "fitting"),
            )  # fmt: skip
            control = recontrol.Control(net, step_size, ascent_steps, target=target)
            with fastedit.patch(loaded, control) as handle:
                report = recontrol_report.report(
                    handle, tokenizer, held_out, score, net, samples=4, max_new_tokens=max_new_tokens, seed=seed + 1,
                    batch_size=GENERATED_TOGETHER,
                )  # fmt: skip
                earned = [row["reward"] for row in report[:2]]
                summary = {
                    "task": "control", "method": "recontrol", "reward": reward, "prompts": len(prompts),
                    "samples": samples, "max_new_tokens": max_new_tokens, "lam": lam, "lr": lr, "epochs": fitted.best,
                    "batch_size": batch_size, "seed": seed, "error": fitted.error, "held_out": len(held_out),
                    "reward_before": earned[0], "reward_after": earned[1], "report": report,
                }  # fmt: skip
                fastedit.store.save(handle, out, base_model=model, training=summary)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    _tell(console, found, fitted, held_out, report)
    console.print(f"saved {out}; try it with: fastedit generate {model} --edit {out} --prompt '…'", markup=False)


def _tell(console, found, fitted, held_out, report):
    """What was sampled and fitted, and the rewards of held-out prompts without and with the control."""
    from fastedit.methods import recontrol_report

    start = fitted.epochs[0]["error"]
    console.print(
        f"{len(found):,} responses of {len(found.states):,} tokens, mean reward {found.rewards.mean():.4g}; held-out error "
        f"of the values {start:.4g} before, {fitted.error:.4g} after {fitted.best} epochs",
        highlight=False,
    )
    console.print(
        f"mean reward on {len(held_out)} held-out prompts: {report[0]['reward']:.4g} without, "
        f"[bold]{report[1]['reward']:.4g}[/] with"
    )
    console.print(recontrol_report.table(report), markup=False, highlight=False)


def _prompts(data, rows, chat, seed):
    """(prompts to sample responses of, prompts held out: a tenth, 32 at most)."""
    prompts = read_texts(data)
    if any(isinstance(prompt, dict) for prompt in prompts):
        raise typer.BadParameter(f"{data} holds rows with responses, expected prompts alone")
    prompts = as_chat(prompts) if chat else prompts
    random.Random(seed).shuffle(prompts)
    prompts = prompts[:rows]
    if len(prompts) < 2:
        raise typer.BadParameter(f"{data} has {len(prompts)} prompt to use, expected 2 or more: some are held out")
    count = max(1, min(32, len(prompts) // 10))
    return prompts[count:], prompts[:count]


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


def _units(text):
    """4096 of "4096", (3072, 3072, 3072) of "3072,3072,3072"."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--units is {text!r}, expected a number, or up to three with commas") from None
    return found[0] if len(found) == 1 else found


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
