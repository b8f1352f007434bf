"""The demo's first half: a chat model steered along the direction between two lists of sentences.

What decides the figures:
    model      SmolLM2-135M-Instruct (fastedit.chat_model)
    sentences  40 happy and 40 sad ones, written for this project (fastedit/examples), measured at the mean of their tokens
    layers     a third of them: the earliest run that tells the quarter of the sentences held out apart as well as any
    dose       the strength at which the distribution of the next tokens moves by 0.2 nats, in the mean over the first
               16 tokens of continuations of the prompts
    replies    greedy, to 32 prompts that ask for neither mood, 28 tokens
    happier    a reply with more words of the happy list than of the sad one
    controls   at the same KL: a random direction of the same length in each layer, and the direction of the same sentences
               with their labels dealt out at random; seed 0
"""

import time
from dataclasses import asdict, dataclass, replace

import torch
import typer
from rich.table import Table

import fastedit

from .. import examples
from ..directions.sweep import random_like
from ..methods.replies import replies, wilson


@dataclass(frozen=True)
class ChatPlan:
    prompts: int = 32
    sentences: int = 40
    target_kl: float = 0.2
    calibrated_tokens: int = 16
    calibrated_prompts: int = 8
    new_tokens: int = 28
    batch: int = 16
    shown: int = 3
    seed: int = 0


QUICK = replace(
    ChatPlan(), prompts=2, sentences=8, target_kl=0.02, calibrated_tokens=2, calibrated_prompts=2, new_tokens=4, shown=1
)


@dataclass(frozen=True)
class Share:
    """How many of some replies are happier, out of how many."""

    happier: int
    sadder: int
    replies: int

    @property
    def interval(self):
        return wilson(self.happier, self.replies)


def run(console, progress, out, quick=False, model=None):
    """The facts for results.json; writes out/steering.png and out/happy. model: (model, tokenizer), for the tests."""
    plan, started = QUICK if quick else ChatPlan(), time.monotonic()
    bar = progress.add_task("chat model", total=3 + 5)
    try:
        model, tokenizer = fastedit.chat_model() if model is None else model
    except (ImportError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    progress.advance(bar)
    happy, sad = (examples.lines(path)[: plan.sentences] for path in (examples.HAPPY, examples.SAD))
    asked = examples.lines(examples.PROMPTS)[: plan.prompts]
    found = direction(model, tokenizer, happy, sad)
    layers = found.window(-(-len(found) // 3))
    sides = {"direction": found.at(*layers), "random": random_like(found.at(*layers), plan.seed)}
    sides["shuffled"] = direction(model, tokenizer, *shuffled(happy, sad, plan.seed)).at(*layers)
    progress.advance(bar)
    said, doses = answers(model, tokenizer, asked, sides, plan, lambda: progress.advance(bar))
    folder = save(model, sides["direction"], doses["direction"], out / "happy")
    progress.advance(bar)
    words = examples.moods()
    shares = {name: share(texts, words) for name, texts in said.items()}
    console.print(
        f"A chat model of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, steered in layers {layers[0]} to "
        f"{layers[-1]} along the direction from {len(sad)} sad sentences to {len(happy)} happy ones"
    )
    console.print(side_by_side(asked, said, plan.shown))
    console.print(share_table(shares))
    from ..plots.demo import draw_chat

    draw_chat({name: (s.happier / s.replies, s.interval) for name, s in shares.items()}, out / "steering.png")
    console.print(
        f"saved {folder}: fastedit generate smollm2 --chat --edit {folder} --strength 1 --prompt 'How was your weekend?'\n",
        markup=False,
    )
    return {
        "layers": list(layers), "strengths": doses, "target_kl": plan.target_kl,
        "replies": {name: asdict(s) | {"interval": s.interval} for name, s in shares.items()},
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def direction(model, tokenizer, positive, negative):
    return fastedit.contrast(
        model, tokenizer, positive, negative, at="mean", method="probe", probe="mass-mean", progress=False
    )


def shuffled(positive, negative, seed):
    """The same texts, distributed over two sides at random."""
    both = [*positive, *negative]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed)).tolist()
    return [both[n] for n in order[: len(positive)]], [both[n] for n in order[len(positive) :]]


def answers(model, tokenizer, asked, sides, plan, advance):
    """({name: replies}, {name of the direction: its dose}): "-dose", "none", "+dose", "random", "shuffled"."""
    chats = [[{"role": "user", "content": text}] for text in asked]
    options = {"max_new_tokens": plan.new_tokens, "batch_size": plan.batch}
    said, doses = {"-dose": None, "none": replies(model, tokenizer, chats, **options)}, {}
    advance()
    for name, vectors in sides.items():
        with fastedit.patch(model, fastedit.Steer(vectors, site="block")) as handle:
            dose = fastedit.calibrate(
                model, handle, chats[: plan.calibrated_prompts], target_kl=plan.target_kl, tokenizer=tokenizer,
                tolerance=0.05, new_tokens=plan.calibrated_tokens, seed=plan.seed,
            )  # fmt: skip
            doses[name] = dose.strength
            for sign, shown in ((1, "+dose"), (-1, "-dose")) if name == "direction" else ((1, name),):
                handle.strength = sign * dose.strength
                said[shown] = replies(model, tokenizer, chats, **options)
        advance()
    return said, doses


def save(model, vectors, dose, folder):
    """The directions, and the edit whose strength 1 is the dose."""
    (vectors * dose).save(folder)
    with fastedit.patch(model, fastedit.Steer(vectors * dose, site="block")) as handle:
        fastedit.store.save(handle, folder, base_model=model.config.name_or_path, training={"method": "mass-mean probe"})
    return folder


def share(texts, words):
    counted = [examples.tally(text, words) for text in texts]
    return Share(
        sum(n["happy"] > n["sad"] for n in counted), sum(n["sad"] > n["happy"] for n in counted), len(texts)
    )  # fmt: skip


def side_by_side(asked, said, count):
    table = Table(title=f"the first {count} prompts' replies", title_justify="left", show_lines=True)
    for column in ("prompt", "minus the dose", "no edit", "plus the dose"):
        table.add_column(column)
    for n in range(min(count, len(asked))):
        table.add_row(asked[n], *(" ".join(said[name][n].split()) for name in ("-dose", "none", "+dose")))
    return table


NAMES = {
    "-dose": "minus the dose", "none": "no edit", "+dose": "plus the dose", "random": "random direction, same KL",
    "shuffled": "shuffled labels, same KL",
}  # fmt: skip


def share_table(shares):
    table = Table(title="replies with more happy words than sad ones", title_justify="left")
    for column in ("", "happier", "95 % interval", "sadder"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in shares.items():
        low, high = found.interval
        table.add_row(
            NAMES[name], f"{found.happier} of {found.replies}", f"{100 * low:.0f}–{100 * high:.0f} %", str(found.sadder)
        )
    return table
