"""RE-Control on two TinyStories Llamas, with a reward that neither model nor value net was chosen for.

Fixed before anything was generated:
    reward     the probability that a classifier of SST-2 gives a response of being positive; the classifier is MiniLM
               with RED, trained by sst2.py (rate 2e-2, seed 0)
    value net  256 units, fitted with λ = 0.9 and Adam at 1e-3, batches of 64, as on docs/recontrol.md, on two responses
               to each opening (eight words) of the 500 even stories; another net and other responses for each seed
    strengths  30 steps of 0.5 times the strength that gives a dose of 0.05, 0.1 or 0.2 nats at the token behind the
               openings of 128 even stories (fe.calibrate)
    tested     on odd stories, the openings of 100 of them for each of five seeds, two responses to each
    control    at every token the direction in which an untrained net of the same kind would move the state, as far as
               the trained one moves it
    difference with less without, paired by opening, over the 500; its 95 % interval is 1.96 standard errors. Seeds differ
               by more than their openings do, each having a net of its own: Student's interval over the seeds' means
               stands beside it
"""

import contextlib
import math

import torch

import fastedit as fe
from fastedit import ops
from fastedit.methods import recontrol
from fastedit.recipes import predict

from . import sst2, stories
from .rows import Rows
from .statistics import mean_and_error, over_seeds, pooled

DOSES = (0.05, 0.1, 0.2)
SEEDS = (0, 1, 2, 3, 4)
PROMPTS, RESPONSES = 100, 2
UNITS, STEPS, STEP_SIZE = 256, 30, 0.5
TOKENS = {"stories260K": 64, "babyllama-char105": 160}
KEYS = ("model", "direction", "dose", "seed")
FIELDS = ("strength", "prompts", "responses", "reward", "difference", "difference_se", *stories.SCORES, "example")


def table_of(out):
    return Rows(out / "effects-recontrol.csv", KEYS, FIELDS)


def run(data, out, seeds=SEEDS, prompts=PROMPTS):
    rows = table_of(out)
    for model in TOKENS:
        for seed in seeds:
            measure(data, rows, model, seed, prompts)


def positive(classifier, tokenizer):
    """The reward."""

    def reward(prompts, responses):
        return predict(classifier, responses, tokenizer).softmax(-1)[:, 1].tolist()

    return reward


def measure(data, rows, name, seed, count):
    """The rows of a model and a seed that are not there; the value net is fitted anew, to the same bits."""
    cells = [("none", 0.0)] + [(direction, dose) for direction in ("control", "random") for dose in DOSES]
    keys = [{"model": name, "direction": direction, "dose": dose, "seed": seed} for direction, dose in cells]
    missing = [key for key in keys if not rows.has(**key)]
    if not missing:
        return
    (model, tokenizer), (fitted, held_out) = stories.load(data, name), stories.read(data)
    reward, english = positive(*sst2.classifier(data)), stories.English(data, name)
    options = {"max_new_tokens": TOKENS[name], "temperature": 0.8, "batch_size": 125}
    learnt_from = [stories.opening(story, name) for story in fitted]
    net = value_net(recontrol.collect(model, tokenizer, learnt_from, reward, samples=2, seed=seed, **options), seed)
    strengths = strengths_of(model, tokenizer, net, learnt_from[:128])
    given = [stories.opening(story, name) for story in held_out[seed * count : (seed + 1) * count]]

    def respond(direction, dose):
        with moved(model, direction, net, strengths[dose], seed):
            return recontrol.collect(model, tokenizer, given, reward, samples=RESPONSES, seed=1000 + seed, **options)

    without = respond("none", 0.0)
    for key in missing:
        said = without if key["direction"] == "none" else respond(key["direction"], key["dose"])
        gains = (said.rewards - without.rewards).view(count, RESPONSES).mean(1).tolist()
        difference, error = mean_and_error(gains)
        rows.add(key | {
            "strength": strengths[key["dose"]], "prompts": count, "responses": len(said),
            "reward": said.rewards.mean().item(), "difference": difference, "difference_se": error,
        } | english.scores(said.responses) | {"example": " ".join(said.responses[0].split())[:100]})  # fmt: skip


def value_net(trajectories, seed):
    torch.manual_seed(seed)
    net = fe.ValueNet(trajectories.width, UNITS)
    found = recontrol.fit(net, trajectories, lam=0.9, lr=1e-3, batch_size=64, seed=seed)
    spread = trajectories.rewards.var(correction=0).item()
    print(f"rewards {trajectories.rewards.mean():.3f} ± {math.sqrt(spread):.3f}; the net's held-out error is "
          f"{found.error:.4f}, at epoch {found.best}")  # fmt: skip
    return net.requires_grad_(False)


def strengths_of(model, tokenizer, net, prompts):
    """dose → strength."""
    strengths = {0.0: 0.0}
    with fe.patch(model, recontrol.Control(net, STEP_SIZE, STEPS)) as handle:
        for dose in DOSES:
            given = fe.calibrate(model, handle, prompts, target_kl=dose, tokenizer=tokenizer, largest=2.0**20)
            strengths[dose] = given.strength
    return strengths


@contextlib.contextmanager
def moved(model, direction, net, strength, seed):
    """The model under control, under the random direction of the same length, or ("none") as it is."""
    if direction == "control":
        with fe.patch(model, recontrol.Control(net, STEP_SIZE, STEPS, strength=strength)):
            yield
    elif direction == "random":
        hook = model.model.norm.register_forward_hook(sideways(net, STEP_SIZE * strength, seed))
        try:
            yield
        finally:
            hook.remove()
    else:
        yield


def sideways(net, step_size, seed):
    """A forward hook: the last token's state goes as far as `net` moves it, where an untrained net would move it."""
    torch.manual_seed(500 + seed)
    untrained = fe.ValueNet(net.width, UNITS).requires_grad_(False)

    def hook(module, args, hidden):
        last = hidden[:, -1:]
        far = (ops.value_ascent(last, net, STEPS, step_size) - last).norm(dim=-1, keepdim=True)
        other = ops.value_ascent(last, untrained, STEPS, STEP_SIZE) - last
        return torch.cat([hidden[:, :-1], last + other * (far / other.norm(dim=-1, keepdim=True))], 1)

    return hook


def markdown(path):
    """A line a model, direction and dose, seeds together."""
    rows = Rows(path, KEYS, FIELDS).read()
    lines = [
        "| model | direction | dose (KL) | reward | difference, 95 % over prompts | 95 % over seeds | least and most of a seed "
        "| bits a character | like real stories |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, direction, dose in dict.fromkeys((row["model"], row["direction"], row["dose"]) for row in rows):
        own = [row for row in rows if (row["model"], row["direction"], row["dose"]) == (model, direction, dose)]
        dose = dose if direction != "none" else "–"
        lines.append(f"| {model} | {direction} | {dose} | " + " | ".join(line(own)) + " |")
    return "\n".join(lines)


def line(rows):
    column = {name: [float(row[name]) for row in rows] for name in FIELDS if name != "example"}
    difference, error = pooled(column["difference"], column["difference_se"])
    yield f"{sum(column['reward']) / len(rows):.3f}"
    if rows[0]["direction"] == "none":
        yield from ("", "", "")
    else:
        yield f"{difference:+.3f} ({difference - 1.96 * error:+.3f} to {difference + 1.96 * error:+.3f})"
        half = over_seeds(column["difference"])
        yield f"{difference - half:+.3f} to {difference + half:+.3f}"
        yield f"{min(column['difference']):+.3f} to {max(column['difference']):+.3f}"
    yield f"{sum(column['bits_per_character']) / len(rows):.2f}"
    yield f"{100 * sum(column['inside']) / len(rows):.0f} %"
