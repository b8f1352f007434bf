"""RE-Control on the chat model: how much of a simple reward does a value net buy, beside a random net and best of n?

Fixed before the first run:
    reward     happy words less sad words of a reply (moods.json)
    value net  256 units, λ = 0.9, Adam at 1e-3, batches of 64, on eight replies to each of the first 20 prompts of
               fastedit/examples; another net and other replies for each seed
    control    30 steps of 0.5 times the strength that moves the next token by 0.2 nats, the mean over 256 of the states behind
               those replies' tokens
    controls   the same with a net that was not trained, at the same KL; asking for it in the system turn; the best of
               the four replies without an edit by the reward itself, and the best by the trained net
    tested     on the other 12 prompts, four replies each, 16 tokens, temperature 0.8, the same random numbers in every cell
    difference with less without, paired by prompt, its 95 % interval over prompts and seeds
    log p      of a token of one reply to each prompt, by the model without control
"""

import json

import torch

import fastedit as fe
from fastedit import examples, ops
from fastedit.methods import recontrol
from fastedit.methods.recontrol_report import best_of, log_p

from . import chat
from .onchat import TOKENS, Loaded, as_chats, average, gained, listed, rounded, table
from .rows import Rows

SEEDS, FITTED, LEARNT, SAMPLES, UNITS, STEPS, STEP_SIZE = (0, 1, 2), 20, 8, 4, 256, 30, 0.5
DOSE, STATES = 0.2, 256
KEYS, FIELDS = ("way", "seed"), ("strength", "rewards", "log_p", "replies", "example")
WAYS = {
    "none": "no edit", "control": "control, 0.2 nats", "random": "untrained net, 0.2 nats", "asked": "asked in the system turn",
    "best": "best of 4 by the reward", "value": "best of 4 by the value net",
}  # fmt: skip


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-valued.csv", KEYS, FIELDS), Loaded(given)
    for seed in SEEDS[: 1 if first else None]:
        if any(not rows.has(way=way, seed=seed) for way in WAYS):
            for way, values in measured(*loaded(), seed):
                if not rows.has(way=way, seed=seed):
                    rows.add({"way": way, "seed": seed} | values)


def reward(prompts, responses):
    found = [examples.tally(text, examples.moods()) for text in responses]
    return [float(n["happy"] - n["sad"]) for n in found]


def measured(model, tokenizer, seed):
    prompts = examples.lines(examples.PROMPTS)
    fitted, held = prompts[:FITTED], prompts[FITTED:]

    def collect(chats, samples, seed):
        return recontrol.collect(
            model, tokenizer, chats, reward, samples=samples, max_new_tokens=TOKENS, temperature=chat.TEMPERATURE, seed=seed
        )

    def told(said, strength=0.0, of=None):
        every = range(len(said)) if of is None else of
        each = torch.stack([said.rewards[n] for n in every]).view(len(held), -1).mean(1).tolist()
        read = every[::SAMPLES] if of is None else every
        costs = log_p(model, tokenizer, [said.prompts[n] for n in read], [said.responses[n] for n in read])
        costs = [value for value in costs if value is not None]
        return {
            "strength": float(strength), "rewards": json.dumps(rounded(each)), "log_p": sum(costs) / len(costs),
            "replies": len(every), "example": " ".join(said.responses[every[0]].split()),
        }  # fmt: skip

    plain = collect(as_chats(held), SAMPLES, 1000 + seed)
    yield "none", told(plain)
    yield "best", told(plain, of=best_of(plain.rewards, SAMPLES))
    yield "asked", told(collect(as_chats(held, chat.ASKING["mood"]), SAMPLES, 1000 + seed))
    torch.manual_seed(seed)
    nets = {way: fe.ValueNet(plain.width, UNITS) for way in ("control", "random")}
    learnt = collect(as_chats(fitted), LEARNT, seed)
    fit = recontrol.fit(nets["control"], learnt, lam=0.9, lr=1e-3, batch_size=64, seed=seed)
    spread = learnt.rewards.var(correction=0).item()
    print(f"rewards {learnt.rewards.mean():.3f}, variance {spread:.3f}; held-out error {fit.error:.3f}, epoch {fit.best}")
    ends = plain.states[plain.lengths.cumsum(0) - 1].float()
    with torch.no_grad():
        yield "value", told(plain, of=best_of(nets["control"](ends), SAMPLES))
    for way, net in nets.items():
        strength = strength_of(model, net.requires_grad_(False), learnt.states.float(), seed)
        with fe.patch(model, recontrol.Control(net, STEP_SIZE, STEPS, strength=strength)):
            said = collect(as_chats(held), SAMPLES, 1000 + seed)
        yield way, told(said, strength)


@torch.no_grad()
def strength_of(model, net, states, seed):
    """The strength at which control changes the next token by DOSE nats, in the mean over states (tokens, width)."""
    states = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:STATES]]
    head = model.get_output_embeddings()
    base = head(states).log_softmax(-1)

    def kl(strength):
        moved = head(ops.value_ascent(states, net, STEPS, STEP_SIZE * strength)).log_softmax(-1)
        return (base.exp() * (base - moved)).sum(-1).mean().item()

    low, high = 0.0, 1.0
    while kl(high) < DOSE:
        low, high = high, 2 * high
        if high > 2.0**30:
            raise ValueError(f"the net does not move the next token by {DOSE} nats at any strength")
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < DOSE else (low, middle)
    return high


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows, lines = Rows(path, KEYS, FIELDS).read(), []
    for way, name in WAYS.items():
        own = [row for row in rows if row["way"] == way]
        line = [name]
        if own:
            base = [one for row in own for one in rows if (one["way"], one["seed"]) == ("none", row["seed"])]
            rewards = listed(own, "rewards")
            line.append(f"{sum(rewards) / len(rewards):.2f}")
            line.append("" if way == "none" else gained(own, base, "rewards"))
            line.append(average(own, "log_p", 2))
            line.append(f"{sum(float(row['replies']) for row in own):.0f}")
        lines.append(line)
    return table(["", "reward", "difference", "log p a token", "replies"], lines)
