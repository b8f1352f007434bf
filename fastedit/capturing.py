"""Count, mean and variance of hidden states over a data set, in one pass, without storing hidden states.

    captured = fastedit.capture(model, tokenizer, texts, groups=labels, layers=range(8, 16))
    captured[12].mean()          # (groups, width) float64; the groups in the order of captured.names

Forward hooks hand each site's output to `Moments` and keep nothing; behind the deepest layer the forward ends.
"""

import contextlib
import functools
import inspect
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from .batches import Windows
from .captured_rows import RowWriter
from .edit_file import replace
from .edits import Edit
from .evaluating import evaluating
from .families import Input, find_layers
from .moments import Moments
from .planning import choose, device_at, width_at
from .root import root_of
from .sites import check_site
from .truncated import forward_until

AT = ("last token", "first token", "all tokens", "mean")


class Captured(Mapping):
    """{layer number: Moments}. names: the groups' labels, in the order of the Moments' rows; sequences: how many."""

    def __init__(self, moments, names, site, at, sequences):
        self.moments, self.names, self.site, self.at, self.sequences = moments, names, site, at, sequences

    def __getitem__(self, layer):
        return self.moments[layer]

    def __iter__(self):
        return iter(self.moments)

    def __len__(self):
        return len(self.moments)

    def __repr__(self):
        groups = "" if self.names == (None,) else f", groups {', '.join(map(str, self.names))}"
        return f"<captured {self.site!r} of layers {list(self)} at {self.at!r}: {self.sequences:,} sequences{groups}>"


def capture(
    model, tokenizer, data, *, layers=None, site="block", at="last token", groups=None, group_names=None,
    batch_size=16, max_length=None, resume=None, save_every=60.0, rows=None, processes=None, progress=None,
):  # fmt: skip
    """Moments of hidden states per layer and group, in one pass over the data.

    Sequences of like lengths share a batch, padded on the right. The model runs without gradients, in eval mode, as far
    as the deepest layer asked for; it is left as it was.

    Args:
        model: any model that fastedit.patch takes; edits that are on it count.
        tokenizer: for texts; None for token ids and ready batches.
        data: texts, lists of token ids, or ready batches (mappings with input_ids, attention_mask, and labels as
            "group"), in any iterable: a list, or a stream of any length.
        layers: numbers, as of an edit; None for all.
        site: where in a layer (sites.py): "block", "mlp", "attn", "ffn_in", …
        at: which tokens are rows: "last token" or "first token" of each sequence, "all tokens", or "mean", one row a
            sequence, its tokens' mean. Padding is never among them.
        groups: a label for each text; each group has moments of its own.
        group_names: the labels that may come, in order; needed where labels come in a stream or in batches.
        batch_size: sequences a forward. max_length: cut texts to so many tokens; longer than the model takes is an
            error otherwise.
        resume: a folder. The sums go there every `save_every` seconds, at a window's end; a pass that was interrupted
            goes on from there and ends with the bits of one that was not.
        rows: a folder for the rows themselves, in memory-mapped shards, for `fastedit.captured_rows.Rows`.
        processes: an accelerate Accelerator or PartialState; each process takes its share of the batches, and all
            return the merged moments.
        progress: show a bar; None: on a terminal.

    Returns:
        Captured, {layer number: Moments}.

    Raises:
        TypeError, ValueError: what cannot be captured: a site or layer that is not there, a text too long, a folder
        that holds another pass.
    """
    chosen = _choose(model, layers, site, at)
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    windows = Windows(
        tokenizer, data, groups, names=group_names, batch_size=batch_size, max_length=max_length, limit=_limit(model)
    )
    moments = {
        layer.index: Moments(width_at(layer, site), len(windows.names), device=device_at(layer, site))
        for layer in chosen
    }
    job = {
        "layers": list(moments), "site": site, "at": at, "names": [str(name) for name in windows.names],
        "batch_size": batch_size, "max_length": max_length, "rank": rank, "processes": world,
    }  # fmt: skip
    state = None if resume is None else _State(resume, job, save_every)
    writer = None if rows is None else RowWriter(rows, job, fresh=state is None or not state.path.exists())
    done = 0 if state is None else state.load(moments, windows)
    forward = _Forward(model, chosen, site, moments, at, writer)
    with evaluating(model), _bar(progress, windows) as advance:
        advance(done)
        for window in windows:
            for batch in window[rank::world]:
                forward(batch)
            if writer is not None:
                writer.flush(windows.position)
            if state is not None:
                state.save(moments, windows, now=writer is not None)  # no shard without the sums that go with it
            advance(windows.position)
    if not windows.position:
        raise ValueError("the data is empty: there is nothing to capture")
    if state is not None:
        state.save(moments, windows, now=True)
    if world > 1:
        for found in moments.values():
            found.all_reduce()
    sequences = int(next(iter(moments.values())).count.sum()) if at != "all tokens" else windows.position
    return Captured(moments, windows.names, site, at, sequences)


class _Forward:
    """One forward of a batch, as far as the deepest layer, each layer's rows into its Moments."""

    def __init__(self, model, chosen, site, moments, at, writer):
        self.model, self.chosen, self.site, self.moments, self.at, self.writer = model, chosen, site, moments, at, writer
        accepted = inspect.signature(model.forward).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self.takes = lambda name: free or name in accepted
        self.decodes = chosen[-1].name.startswith("decoder.")
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, batch):
        if self.decodes and not {"decoder_input_ids", "decoder_inputs_embeds"} & batch.inputs.keys():
            raise ValueError(
                f"layer {self.chosen[-1].name} needs ready batches with decoder_input_ids; layers='encoder' captures "
                "the encoder of texts"
            )
        batch.inputs = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.inputs.items()
            if name != "attention_mask" or self.takes(name)
        }
        if self.takes("use_cache"):
            batch.inputs["use_cache"] = False
        self._number_padded(batch.inputs)
        self.picks = {}
        places = [(layer, self.site, functools.partial(self._take, layer, batch)) for layer in self.chosen]
        forward_until(self.model, places, batch.inputs)

    def _number_padded(self, inputs):
        """Position ids for a ready batch padded on the left, which a model that numbers columns would take for later tokens.

        Raises:
            ValueError: it has none, and whether the model numbers its tokens by itself is not known.
        """
        mask = inputs.get("attention_mask")
        if mask is None or "position_ids" in inputs or not self.takes("position_ids") or bool(mask[:, 0].all()):
            return
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.model.modules()):
            return  # RoBERTa's: by the padding token
        if not hasattr(self.model, "prepare_inputs_for_generation"):
            raise ValueError(
                "a ready batch is padded on the left and has no position_ids: give them, counted from each sequence's first "
                "token ((attention_mask.cumsum(1) - 1).clamp(min=0)), or pad on the right"
            )
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)

    def _take(self, layer, batch, hidden):
        key = (layer.name.partition(".")[0], hidden.device)
        if key not in self.picks:
            self.picks[key] = _Pick(self._tokens(layer, batch), batch.group, self.at, hidden.device)
        pick = self.picks[key]
        if hidden.shape[:2] != pick.tokens.shape:
            raise ValueError(
                f"layer {layer.name} returned hidden states {tuple(hidden.shape)} for tokens {tuple(pick.tokens.shape)}"
            )
        rows = pick.rows(hidden)
        self.moments[layer.index].update(rows, pick.group)
        if self.writer is not None:
            self.writer.add(layer.index, rows, pick.group, batch.index)

    def _tokens(self, layer, batch):
        if not layer.name.startswith("decoder."):
            return batch.tokens
        mask = batch.inputs.get("decoder_attention_mask")
        given = batch.inputs.get("decoder_input_ids", batch.inputs.get("decoder_inputs_embeds"))
        return torch.ones(given.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


class _Pick:
    """Which rows of a batch's hidden states (sequences, columns, width) are captured, for the layers on one device."""

    def __init__(self, tokens, group, at, device):
        self.at, self.tokens = at, tokens
        sequences, columns = tokens.shape
        if at == "all tokens":
            group = torch.where(tokens, group[:, None].to(tokens.device), -1).int()
        elif at != "mean":
            number = torch.arange(columns, device=tokens.device)
            at_end = at == "last token"
            column = torch.where(tokens, number, -1).amax(1) if at_end else torch.where(tokens, number, columns).amin(1)
            self.index = (torch.arange(sequences, device=device), column.to(device))
        self.group = group.to(device)

    def rows(self, hidden):
        if self.at == "all tokens":
            return hidden
        if self.at != "mean":
            return hidden[self.index]
        tokens = self.tokens.to(hidden.device)  # one sequence after another: no second copy of the batch
        means = [h[real].mean(0, dtype=torch.float64) for h, real in zip(hidden, tokens, strict=True)]
        return torch.stack(means).to(torch.promote_types(hidden.dtype, torch.float32))


class _State:
    """The sums so far and where in the data they end, in one file, replaced in one step."""

    def __init__(self, folder, job, every):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank, world = job["rank"], job["processes"]
        self.path = folder / (f"capture-{rank}-of-{world}.safetensors" if world > 1 else "capture.safetensors")
        self.job, self.every, self.saved = job, every, time.monotonic()

    def load(self, moments, windows):
        """How many items of the data are in the sums already."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            note = json.loads(file.metadata()["capture"])
            if note["job"] != self.job:
                other = [f"{name} {value!r}" for name, value in note["job"].items() if value != self.job.get(name)]
                raise ValueError(f"{self.path} is of another pass ({', '.join(other)}); remove it, or resume elsewhere")
            if windows.skip(note["position"]) != note["position"] or windows.digest.hexdigest() != note["digest"]:
                raise ValueError(f"{self.path} is of other data than this; remove it, or resume elsewhere")
            for layer, found in moments.items():
                found.load_state_dict({name: file.get_tensor(f"{layer}.{name}") for name in ("count", "mean", "m2")})
        return note["position"]

    def save(self, moments, windows, now=False):
        if not now and time.monotonic() - self.saved < self.every:
            return
        note = {"job": self.job, "position": windows.position, "digest": windows.digest.hexdigest()}
        tensors = {
            f"{layer}.{name}": tensor.cpu().contiguous()
            for layer, found in moments.items()
            for name, tensor in found.state_dict().items()
        }
        replace(self.path, to_bytes(tensors, {"capture": json.dumps(note)}))
        self.saved = time.monotonic()


def _choose(model, layers, site, at):
    """The layers, in the order in which they run."""
    check_site(site)
    if at not in AT:
        raise ValueError(f"at is {at!r}, expected one of {', '.join(map(repr, AT))}")
    root = root_of(model)
    found = choose(Edit((), site=site, layers=layers), find_layers(model) if root is None else root.layers)
    for layer in found:
        if isinstance(layer.place(site), Input) and root is not None and root.stack(layer, site):
            raise ValueError(
                f"site {site!r} of layer {layer.name} is edited where it enters its module, and a capture sees what comes "
                "before that; remove that edit, or capture another site"
            )
    return sorted(found, key=lambda layer: layer.index)


def _limit(model):
    config = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if found and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        found -= config.pad_token_id + 1  # their positions start behind the padding token's number
    return found


@contextlib.contextmanager
def _bar(progress, windows):
    """A function that takes how many items are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (console.is_terminal if progress is None else progress):
        yield lambda position: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("capturing", total=windows.total)
        yield lambda position: bars.update(task, completed=position)
