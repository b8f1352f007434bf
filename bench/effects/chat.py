"""A real chat model steered at equal KL, beside its controls; a condition found and judged on prompts held out.

Fixed before anything was generated:
    model      SmolLM2-135M-Instruct (fastedit.chat_model), fp32
    studies    mood: 40 happy and 40 sad sentences (fastedit/examples); style: 24 sentences of old and 24 of today's English
               (texts/); both measured at the mean of their tokens without attention sinks
    direction  the mass-mean probe's; layers: a third, as Directions.window chooses them
    doses      mean KL of 0.1, 0.2 and 0.4 nats a token, over the first 16 tokens of continuations of the first 8 prompts
    controls   a random direction as long in each layer, and the direction of the same sentences with their labels dealt out at
               random, both at the same KL; asking for it in the system turn, at whatever KL that has; no edit
    prompts    the 32 of fastedit/examples, which ask for neither; 24 tokens a reply, temperature 0.8, top p 1
    seeds      0, 1, 2: of the sampling, number for number the same in every cell, of the random direction and of the labels
    hit        a reply with more words of the one list than of the other (moods.json; old_words.json, of which one is enough)
    nats       what a reply costs the model without the edit, nats a token, in the mean over replies
    condition  24 prompts on sport and 24 others (texts/); cast.fit on three quarters, AUROC and F1 on the others; seeds 0, 1, 2
"""

import json
from pathlib import Path

import torch

import fastedit as fe
from fastedit import examples
from fastedit.directions.sweep import random_like
from fastedit.methods import cast
from fastedit.methods.replies import left_padded, wilson
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import prompt_ids

from .rows import Rows
from .statistics import auroc

TEXTS = Path(__file__).parent / "texts"
DOSES, SEEDS, CONTROLS = (0.1, 0.2, 0.4), (0, 1, 2), ("direction", "random", "shuffled")
TOKENS, BATCH, TEMPERATURE = 24, 16, 0.8
ASKING = {
    "mood": "You are a cheerful assistant. Answer in a happy mood.",
    "style": "Answer in old English, as in the time of Shakespeare, with thou and thee.",
}
KEYS = ("study", "condition", "dose", "seed")
FIELDS = ("strength", "replies", "hits", "opposite", "nats", "example")
GATE_KEYS, GATE_FIELDS = ("study", "seed"), ("layer", "threshold", "when", "held_out", "auroc", "f1", "fitted_f1")


def tables_of(out):
    return Rows(out / "effects-chat.csv", KEYS, FIELDS), Rows(out / "effects-chat-gates.csv", GATE_KEYS, GATE_FIELDS)


def sides_of(study):
    """(positive, negative sentences, {which: words})."""
    if study == "mood":
        return examples.lines(examples.HAPPY), examples.lines(examples.SAD), examples.moods()
    words = {name: frozenset(some) for name, some in json.loads((TEXTS / "old_words.json").read_text()).items()}
    return examples.lines(TEXTS / "old.txt"), examples.lines(TEXTS / "new.txt"), words


def plan():
    """Every cell, (study, condition, dose, seed), in the order in which they are measured: mood's first seed first."""
    cells = []
    for seed in SEEDS:
        for study in ASKING:
            cells += [(study, "none", 0.0, seed), (study, "asked", 0.0, seed)]
            cells += [(study, condition, dose, seed) for dose in (0.2, 0.1, 0.4) for condition in CONTROLS]
    return cells


def run(out, model=None, prompts=None):
    """Measure the cells that the CSVs lack. model: (model, tokenizer) and prompts, for the tests."""
    rows, gates = tables_of(out)
    loaded = []

    def get():
        if not loaded:
            loaded.extend(fe.chat_model() if model is None else model)
        return loaded

    for seed in SEEDS:
        if not gates.has(study="sport", seed=seed):
            gates.add({"study": "sport", "seed": seed} | condition(*get(), seed))
    found = {}
    for study, name, dose, seed in plan():
        key = {"study": study, "condition": name, "dose": dose, "seed": seed}
        if rows.has(**key):
            continue
        if study not in found:
            found[study] = directions_of(*get(), *sides_of(study)[:2])
        rows.add(key | measured(*get(), found[study], key, prompts or examples.lines(examples.PROMPTS)))


def directions_of(model, tokenizer, positive, negative):
    return fe.contrast(model, tokenizer, positive, negative, at="mean", method="probe", probe="mass-mean", progress=False)


def vectors_of(model, tokenizer, found, key):
    """What is added in a cell, at the layers that the true direction chooses."""
    layers = found.window(-(-len(found) // 3))
    own = found.at(*layers)
    if key["condition"] == "random":
        return random_like(own, key["seed"])
    if key["condition"] == "shuffled":
        both = [*sides_of(key["study"])[0], *sides_of(key["study"])[1]]
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(key["seed"])).tolist()
        half = len(both) // 2
        dealt = [both[n] for n in order[:half]], [both[n] for n in order[half:]]
        return directions_of(model, tokenizer, *dealt).at(*layers)
    return own


def measured(model, tokenizer, found, key, prompts):
    system = [{"role": "system", "content": ASKING[key["study"]]}] if key["condition"] == "asked" else []
    chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    strength = 0.0
    if key["condition"] in CONTROLS:
        edit = fe.Steer(vectors_of(model, tokenizer, found, key), site="block")
        with fe.patch(model, edit) as handle:
            strength = fe.calibrate(
                model, handle, chats[:8], target_kl=key["dose"], tokenizer=tokenizer, tolerance=0.05, new_tokens=16
            ).strength
            said = sampled(model, tokenizer, chats, key["seed"])
    else:
        said = sampled(model, tokenizer, chats, key["seed"])
    ours, theirs = sides_of(key["study"])[2]
    counted = [examples.tally(text, sides_of(key["study"])[2]) for text in said]
    return {
        "strength": strength, "replies": len(said), "hits": sum(n[ours] > n[theirs] for n in counted),
        "opposite": sum(n[theirs] > n[ours] for n in counted), "nats": nats(model, tokenizer, chats, said),
        "example": " ".join(said[0].split()),
    }  # fmt: skip


@torch.no_grad()
def sampled(model, tokenizer, chats, seed, tokens=None, **options):
    """A reply to each chat; the same random numbers in every cell. tokens: TOKENS; options: further ones of `generate`."""
    ids, said = [prompt_ids(tokenizer, chat) for chat in chats], []
    pad = tokenizer.pad_token_id
    with torch.random.fork_rng(), evaluating(model):
        for start in range(0, len(ids), BATCH):
            given, mask = left_padded(ids[start : start + BATCH], pad)
            torch.manual_seed(1000 * seed + start)
            made = model.generate(
                input_ids=given, attention_mask=mask, max_new_tokens=tokens or TOKENS, do_sample=True, temperature=TEMPERATURE,
                top_k=0, top_p=1.0, pad_token_id=pad, **options,
            )  # fmt: skip
            said += tokenizer.batch_decode(made[:, given.shape[1] :], skip_special_tokens=True)
    return said


@torch.no_grad()
def nats(model, tokenizer, chats, said):
    """Nats a token of the replies under the model as it is, the mean over those that are not empty."""
    costs = []
    with evaluating(model):
        for chat, text in zip(chats, said, strict=True):
            before, behind = prompt_ids(tokenizer, chat), tokenizer(text, add_special_tokens=False)["input_ids"]
            if behind:
                logits = model(input_ids=torch.tensor([before + behind])).logits[0, len(before) - 1 : -1]
                costs.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(behind)).item())
    return sum(costs) / max(1, len(costs))


def condition(model, tokenizer, seed):
    """The gate that opens on sport: its place, and how well it tells the prompts held out apart."""
    sets = [[[{"role": "user", "content": text}] for text in examples.lines(TEXTS / name)] for name in ("sport.txt", "other.txt")]
    found = cast.fit(model, tokenizer, *sets, seed=seed, progress=False)
    order = torch.randperm(len(sets[0]), generator=torch.Generator().manual_seed(seed))[: found.held_out // 2].tolist()
    with_rows = [mean_states(model, tokenizer, [some[n] for n in order], found.layer) for some in sets]
    high, low = (cast.similarity(states, found.vector) for states in with_rows)
    high, low = (high, low) if found.when == "above" else (-high, -low)
    return {
        "layer": found.layer, "threshold": found.threshold, "when": found.when, "held_out": found.held_out,
        "auroc": auroc(high, low), "f1": found.f1, "fitted_f1": found.fitted_f1,
    }  # fmt: skip


def mean_states(model, tokenizer, chats, layer):
    """(prompts, width): each one's mean without sinks."""
    each = [fe.capture(model, tokenizer, [chat], layers=[layer], at="mean", progress=False)[layer].mean()[0] for chat in chats]
    return torch.stack(each).cpu()


# --- the page ---------------------------------------------------------------------------------------------------------

NAMES = {
    "none": "no edit", "asked": "asked in the system turn", "direction": "direction", "random": "random direction",
    "shuffled": "shuffled labels",
}  # fmt: skip


def markdown(path):
    """A line for each study and condition, a column for each dose; cells not run are said."""
    rows = {tuple(row[name] for name in KEYS): row for row in Rows(path, KEYS, FIELDS).read()}
    lines = ["| | | " + " | ".join(f"{dose:g} nats" for dose in DOSES) + " | nats a token |", "|---" * (len(DOSES) + 3) + "|"]
    for study in ASKING:
        for name in NAMES:
            doses = DOSES if name in CONTROLS else (0.0,)
            cells = [[rows[k] for s in SEEDS if (k := (study, name, f"{dose:.6g}", str(s))) in rows] for dose in doses]
            shown = [_shown(some) for some in cells] + ["" for _ in DOSES[len(cells) :]]
            costs = " → ".join(f"{sum(float(r['nats']) for r in some) / len(some):.2f}" for some in cells if some)
            lines.append(f"| {study} | {NAMES[name]} | " + " | ".join(shown) + f" | {costs} |")
    return "\n".join(lines)


def _shown(some):
    if not some:
        return "not run"
    hits, of = (sum(int(row[name]) for row in some) for name in ("hits", "replies"))
    low, high = wilson(hits, of)
    seeds = "" if len(some) == len(SEEDS) else f", {len(some)} seed{'s' if len(some) > 1 else ''}"
    return f"{100 * hits / of:.0f} % ({100 * low:.0f}–{100 * high:.0f}; {of} replies{seeds})"


def gates_markdown(path):
    lines = ["| seed | layer | side | AUROC, held out | F1, held out | F1, fitted | prompts held out |", "|---" * 7 + "|"]
    for row in Rows(path, GATE_KEYS, GATE_FIELDS).read():
        lines.append(
            f"| {row['seed']} | {row['layer']} | {row['when']} | {float(row['auroc']):.2f} | {float(row['f1']):.2f} | "
            f"{float(row['fitted_f1']):.2f} | {row['held_out']} |"
        )
    return "\n".join(lines)
