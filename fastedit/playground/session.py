"""What a person does in the playground, without a page: chat, dial, color, create, export.

One model serves every visitor, and each visitor has their own dials. Each step of a reply sets them, runs, and releases
the model's lock. So replies of several visitors take turns token by token.
"""

import ctypes
import inspect
import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastedit

from ..capturing.truncated_forward import residual_stream
from ..directions.directions import is_saved
from ..edits.kinds import Steer
from ..methods import cast

PROBES = ("What do you think of Mondays?", "Tell me about your day.", "Describe a walk in the park.")


@dataclass
class Step:
    """A reply so far. kl: KL(unedited ‖ edited) of the edited reply's last token, in nats; None once it has ended."""

    plain: str
    edited: str
    kl: float | None
    finished: bool


@dataclass
class LoadedEdit:
    """One edit on the model. directions: those it was made of or measures, if any; all that can color tokens."""

    handle: object
    about: str
    directions: object = None
    statistics: dict = field(default_factory=dict)

    @property
    def dialed(self):
        """Whether it changes anything: a probe has no dial."""
        return not all(edit.is_probe for edit in self.handle.edits)

    @property
    def decides(self):
        """Whether it is decided on the prompt's forward, which a reply under way has behind it."""
        return any(leaf.decide != "token" for edit in self.handle.edits if edit.gate for leaf in edit.gate.leaves())


class Session:
    """A model, its tokenizer and the edits that are on it.

    Args:
        model: a causal language model, in eval mode from now on.
        tokenizer: its tokenizer. If it has a chat template, messages go through it.
        folder: a folder of edits written by `handle.save`. Each gets a dial.

    Raises:
        ValueError: the folder is not a folder. EditFileError: an edit in it cannot be read.
    """

    def __init__(self, model, tokenizer, folder=None):
        self.model, self.tokenizer, self.lock = model.eval(), tokenizer, threading.RLock()
        self.edits = {}
        names = inspect.signature(model.forward).parameters
        self._cache_name = next((n for n in ("cache", "past_key_values") if n in names), None)
        if self._cache_name is None:
            raise ValueError(f"{type(model).__name__}.forward takes no cache, which replies token by token need")
        if folder is not None:
            folder = Path(folder)
            if not folder.is_dir():
                raise ValueError(f"{folder} is no folder of edits")
            for path in sorted(p for p in folder.iterdir() if (p / "edit.json").is_file()):
                handle = fastedit.load(model, path)
                self._add(path.name, handle, f"folder {path.name}", _directions(handle, path))

    # --- edits ------------------------------------------------------------------------------------------------

    def _add(self, name, handle, about, directions=None, statistics=None):
        handle.strength = 0.0
        self.edits[name] = LoadedEdit(handle, about, directions, statistics or {})

    def check_name(self, name):
        """The name, stripped. ValueError if it is empty, taken or not a file name."""
        name = (name or "").strip()
        if not name or name in self.edits or any(c in name for c in "/\\\0") or name.startswith("."):
            raise ValueError(f"the name {name!r} is empty, taken, or holds a slash: give another one")
        return name

    def create(
        self, name, positive, negative, at="mean", kl=0.3, *, method="mean", layers=None, positions=None, like=(), unlike=(),
    ):  # fmt: skip
        """A steering edit from two lists of sentences; its dial's 1 moves the next token by `kl` nats on average.

        Args:
            at, method: as in `fastedit.contrast`.
            layers: numbers. None: the third that separate the lists best, without the first and the last.
            positions: as in `fastedit.Steer`. The dial's 1 is measured with the edit on every token.
            like, unlike: lists of prompts, four or more of each, or neither. With them the edit acts on prompts that
                are like the first ones, a condition that `fastedit.methods.cast.fit` finds.

        Returns the LoadedEdit.

        Raises:
            ValueError: a name, list, layer or position that does not fit. The model is then as it was.
        """
        positive, negative = _sentences("positive", positive), _sentences("negative", negative)
        like, unlike = (_sentences(which, text, 4) if text else [] for which, text in (("like", like), ("unlike", unlike)))
        if bool(like) != bool(unlike):
            raise ValueError("prompts that it acts on and prompts that it leaves alone go together: give both or neither")
        with self.lock:
            name = self.check_name(name)
            self._dial({})
            directions = fastedit.contrast(self.model, self.tokenizer, positive, negative, at=at, method=method)
            layers = best_layers(directions) if layers is None else sorted(set(layers))
            outside = [layer for layer in layers if layer not in directions]
            if outside or not layers:
                raise ValueError(f"layers are {layers}, expected numbers from 0 to {max(directions)}")
            edit = fastedit.Steer(directions, layers=layers)
            prompts = [self._prompt([{"role": "user", "content": text}]) for text in PROBES]
            strength = fastedit.calibrate(self.model, edit, prompts, target_kl=kl, tolerance=0.05).strength
            about = f"{len(positive)} + {len(negative)} sentences, layers {_ranges(layers)}; 1 is {kl:g} nats"
            edit = fastedit.Steer(directions, layers=layers, strength=strength, positions=positions)
            if positions not in (None, "all"):
                about += f"; on {positions}"
            if like:
                chats = [[{"role": "user", "content": text}] for text in (*like, *unlike)]
                texts = chats if getattr(self.tokenizer, "chat_template", None) else [*like, *unlike]
                found = cast.fit(
                    self.model, self.tokenizer, texts[: len(like)], texts[len(like) :], layers=range(layers[0] + 1), vector="mean"
                )
                edit = edit.when(found.gate())
                about += f"; on prompts like {len(like)} of yours (F1 {found.f1:.2f} on {found.held_out} left out)"
            statistics = {"layers": layers, "strength": strength}
            self._add(name, fastedit.patch(self.model, edit), about, directions, statistics)
        return self.edits[name]

    def remove(self, name):
        with self.lock:
            self.edits[name].handle.remove()
            del self.edits[name]

    def _dial(self, dials):
        """Every edit at its dial, the others at 0. Called with the lock held."""
        for name, held in self.edits.items():
            strength = float(dials.get(name, 0.0))
            if held.handle.strength != strength:
                held.handle.strength = strength

    # --- chat -------------------------------------------------------------------------------------------------

    def _prompt(self, messages):
        """Token ids of the messages, ready for a reply."""
        if getattr(self.tokenizer, "chat_template", None):
            found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
            return list(found["input_ids"] if hasattr(found, "keys") else found)
        return self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"]

    def reply(self, plain_messages, edited_messages, dials, *, max_new_tokens=128, temperature=0.0, seed=0):
        """Yields a Step per token: the unedited model's reply and the edited one's, written side by side.

        Args:
            plain_messages, edited_messages: the two conversations, each as the model itself saw it.
            dials: a function that returns {edit's name: strength}, asked before every token.
            temperature: 0 is greedy. Both replies use the same random numbers.
        """
        try:
            yield from self._steps(plain_messages, edited_messages, dials, max_new_tokens, temperature, seed)
        finally:
            _give_back()

    @torch.no_grad()
    def _steps(self, plain_messages, edited_messages, dials, max_new_tokens, temperature, seed):
        device = next(self.model.parameters()).device
        ends = _ends(self.model, self.tokenizer)
        generator = torch.Generator().manual_seed(seed)
        plain, edited, shadow = (_Stream(self._prompt(m), device) for m in (plain_messages, edited_messages, edited_messages))
        deciding = None
        for left in range(max_new_tokens - 1, -1, -1):
            with self.lock:
                now = {name for name, held in self.edits.items() if held.decides}
                if deciding is not None and now - deciding:  # it decides on the prompt: that is read once more
                    for stream in (plain, edited, shadow):
                        stream.again()
                deciding = now
                self._dial({})
                plain.advance(self.model, self._cache_name, self.edits)
                shadow.advance(self.model, self._cache_name, self.edits)
                self._dial(dials())
                edited.advance(self.model, self._cache_name, self.edits)
            uniform = torch.rand((), generator=generator).item()
            kl = None
            if not edited.finished:
                p, q = shadow.logits.double().log_softmax(-1), edited.logits.double().log_softmax(-1)
                kl = (p.exp() * (p - q)).sum().item()
            plain.take(temperature, uniform, ends)
            edited.take(temperature, uniform, ends)
            shadow.follow(edited)
            finished = (plain.finished and edited.finished) or not left
            yield Step(self._text(plain), self._text(edited), kl, finished)
            if finished:
                return

    def _text(self, stream):
        return self.tokenizer.decode(stream.written, skip_special_tokens=True)

    # --- looking ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def color(self, text, name, dials=None):
        """(tokens, layers, values): the cosine of each token's hidden state with a direction, at each of its layers.

        values: float tensor (layers, tokens).

        Raises:
            KeyError: an edit that is not there. ValueError: one that was not made of directions; an empty text.
        """
        directions = self.edits[name].directions
        if directions is None:
            raise ValueError(f"{name!r} has no direction in the residual stream, so it cannot color tokens")
        ids, pieces = self._pieces(text)
        layers = list(directions)
        with self.lock:
            self._dial(dials or {})
            found = residual_stream(self.model, [layer + 1 for layer in layers], {"input_ids": ids})
        rows = [
            torch.cosine_similarity(hidden[0].float().cpu(), directions[layer], dim=-1)
            for layer, hidden in zip(layers, found, strict=True)
        ]
        return pieces, layers, torch.stack(rows)

    def _pieces(self, text):
        """(token ids (1, tokens), the text of each token with the space before it)."""
        given = self.tokenizer(text, return_offsets_mapping=self.tokenizer.is_fast)
        ids, last, pieces = given["input_ids"], 0, []
        if not text.strip() or not ids:
            raise ValueError("the text is empty")
        for token, (start, stop) in zip(ids, given.get("offset_mapping") or [(0, 0)] * len(ids), strict=True):
            pieces.append(text[last:stop] if stop > start else self.tokenizer.decode(token))
            last = max(last, stop)
        return torch.tensor([ids], device=next(self.model.parameters()).device), pieces

    # --- export -----------------------------------------------------------------------------------------------

    def export(self, name, dial, folder):
        """Writes the edit below `folder`: [path]. The dial becomes its strength.

        An edit made here that acts on every token is written as a GGUF control vector, too.
        """
        held, folder = self.edits[name], Path(folder)
        with self.lock:
            self._dial({name: dial})
            held.handle.save(folder / name)
        paths = [folder / name]
        everywhere = all(edit.gate is None and edit.positions in (None, "all") for edit in held.handle.edits)
        if "layers" in held.statistics and everywhere:
            layers = held.statistics["layers"]
            scaled = fastedit.Directions({layer: held.directions[layer] for layer in layers}) * (
                dial * held.statistics["strength"]
            )
            if 0 in scaled.layers:
                scaled = fastedit.Directions({layer: vector for layer, vector in scaled.items() if layer})
            scaled.save_gguf(folder / f"{name}.gguf")
            paths.append(folder / f"{name}.gguf")
        return paths

    def lines(self, name, dial):
        """{what: text}: the Python lines and the vLLM request that use the edit as `export` wrote it."""
        request = {
            "model": "MODEL", "messages": [{"role": "user", "content": "Hello"}],
            "vllm_xargs": {"fastedit": name, "fastedit_strength": 1.0},
        }  # fmt: skip
        return {
            "Python": f"import fastedit as fe\n\nhandle = fe.load(model, {name!r})  # at strength {dial:g}, as exported",
            "vLLM request": json.dumps(request, indent=2),
        }


def _give_back():
    """To the system what was freed. glibc keeps it for the thread that took it, and each token is another thread's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _Stream:
    """One reply as it is written."""

    def __init__(self, prompt, device):
        self.prompt, self.device, self.written, self.finished = prompt, device, [], False
        self.cache = self.logits = None
        self.next = torch.tensor([prompt], device=device)

    def again(self):
        """The next forward reads everything once more."""
        self.cache, self.next = None, torch.tensor([self.prompt + self.written], device=self.device)

    def advance(self, model, cache_name, edits):
        """One forward, from the tokens that the cache does not hold yet to the next token's logits."""
        if self.finished:
            return
        first = next(iter(edits.values()), None)  # the prompt's length is the model's, not one handle's
        if first is not None:
            first.handle.prompt(len(self.prompt))
        mask = torch.ones(1, len(self.prompt) + len(self.written), dtype=torch.long, device=self.device)
        given = {} if self.cache is None else {cache_name: self.cache}
        try:
            out = model(input_ids=self.next, attention_mask=mask, use_cache=True, **given)
        finally:
            if first is not None:
                first.handle.prompt(None)
        self.cache = getattr(out, cache_name, None) or out["past_key_values"]
        self.logits = out.logits[0, -1].float().cpu()

    def take(self, temperature, uniform, ends):
        if self.finished:
            return
        if temperature > 0:
            shares = (self.logits.double() / temperature).softmax(-1).cumsum(-1)
            token = int(torch.searchsorted(shares, uniform * shares[-1]).clamp(max=len(shares) - 1))
        else:
            token = int(self.logits.argmax())
        self._put(token, ends)

    def _put(self, token, ends):
        self.finished = token in ends
        if not self.finished:
            self.written.append(token)
        self.next = torch.tensor([[token]], device=self.device)

    def follow(self, other):
        """Take the token that another stream took."""
        if not self.finished:
            self._put(int(other.next[0, -1]), {int(other.next[0, -1])} if other.finished else ())


def best_layers(directions):
    """A third of the layers: those that separate the two lists best, without the first and the last layer."""
    layers = list(directions)[1:-1] or list(directions)
    apart = {layer: directions.statistics[layer].get("separation") or 0.0 for layer in layers}
    return sorted(sorted(layers, key=lambda layer: -apart[layer])[: max(1, len(layers) // 3)])


def _ends(model, tokenizer):
    found = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, (list, tuple)) else {found}


def _sentences(which, text, least=2):
    found = [line.strip() for line in (text.splitlines() if isinstance(text, str) else text) if line.strip()]
    if len(found) < least:
        needed = {2: "two", 4: "four"}[least]
        raise ValueError(f"the {which} list has {len(found)} sentences: give at least {needed}, one per line")
    return found


def _ranges(layers):
    """[3, 4, 5, 8] as "3 to 5, 8"."""
    runs = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)


def _directions(handle, folder):
    """What colors tokens for a loaded edit: directions saved beside it, else its own vector on the residual stream, or None."""
    if is_saved(folder):
        saved = fastedit.Directions.load(folder)
        return saved if saved.about.get("site", "block") == "block" else None
    if len(handle.edits) != 1 or handle.edits[0].site != "block":
        return None
    found = {}
    for name, tensor in handle.named_tensors().items():
        *place, what = name.split(".")
        if what == ("read" if handle.edits[0].is_probe else "bias"):
            number = next(int(part) for part in place[1:] if part.isdigit())
            found[number] = tensor.cpu().reshape(-1, tensor.shape[-1])[0]
    steers = isinstance(handle.edits[0], Steer) or handle.edits[0].is_probe
    return fastedit.Directions(found) if found and steers else None
