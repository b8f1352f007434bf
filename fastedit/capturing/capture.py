"""Count, mean and variance of hidden states over a data set, in one pass, without storing hidden states.

    captured = fastedit.capture(model, tokenizer, texts, groups=labels, layers=range(8, 16))
    captured[12].mean()          # (groups, width) float64; the groups in the order of captured.names

Forward hooks pass each site's output to `Moments` and keep nothing. The forward ends after the deepest layer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..edits.kinds import Edit
from ..edits.sites import check_site
from ..families import Input
from ..files.edit_file import replace
from ..files.sealed import Damaged, open_tensors, parse_json, read_regular, seal_tensors
from ..hints import Folder, Layers, Site, Texts
from ..patching.eval_mode import check_data, evaluating
from ..patching.layer_plan import choose, device_at, width_at
from ..patching.model_edits import Root, root_of
from ..texts.batches import Windows
from ..texts.picking import Pick, check_at, has_span
from ..texts.sinks import SINKS, check_sinks
from .moments import Moments
from .rows_on_disk import RowWriter
from .truncated_forward import forward_until

logger = logging.getLogger("fastedit")


class Captured(Mapping[int, Moments]):
    """{layer number: Moments}. names: the groups' labels, in the order of the Moments' rows. sequences: how many.

    left_out: {layer number: (attention sinks left out, of how many tokens)} of a mean over tokens.
    """

    def __init__(self, moments, names, site, at, sequences, left_out):
        self.moments, self.names, self.site, self.at, self.sequences = moments, names, site, at, sequences
        self.left_out = left_out

    def __getitem__(self, layer: int) -> Moments:
        return self.moments[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def plot(self, axes: Any = None) -> list[Any]:
        """Draw the norm of each group's mean and the spread around it, by layer. Returns [matplotlib axes], new ones for
        axes=None."""
        from ..plots.moments import draw

        return draw(self, axes)

    def __repr__(self):
        groups = "" if self.names == (None,) else f", groups {', '.join(map(str, self.names))}"
        left = max(self.left_out.values(), default=(0, 0))
        sinks = f", up to {left[0]:,} of {left[1]:,} tokens left out as attention sinks" if left[0] else ""
        return f"<captured {self.site!r} of layers {list(self)} at {self.at!r}: {self.sequences:,} sequences{groups}{sinks}>"


def capture(
    model: nn.Module, tokenizer: Any, data: Texts, *, layers: Layers = None, site: Site = "block",
    at: str = "last token", groups: Iterable[Any] | None = None, group_names: Sequence[Any] | None = None,
    batch_size: int = 16, max_length: int | None = None, resume: Folder | None = None, save_every: float = 60.0,
    rows: Folder | None = None, processes: Any = None, progress: bool | None = None, suffix: str | None = None,
    spans: Sequence[tuple[int, int]] | None = None, sinks: float | None = SINKS,
) -> Captured:  # fmt: skip
    """Moments of hidden states per layer and group, in one pass over the data.

    Sequences of similar lengths share a batch, padded on the right. The model runs without gradients, in eval mode, as
    far as the deepest layer asked for. It is left as it was.

    Args:
        model: any model that fastedit.patch takes. Edits on it count.
        tokenizer: for texts and messages. None for token ids and ready batches.
        data: any iterable, a list or a stream, of texts; chats, each a list of messages (the tokenizer's template is
            applied once; a chat that ends with a user turn is read up to where the answer begins); rows
            {"prompt", "response"}; lists of token ids; or ready batches (mappings with input_ids, attention_mask, and
            labels as "group").
        layers: numbers, as in an edit. None for all.
        site: where in a layer (edits/sites.py): "block", "mlp", "attn", "ffn_in", …
        at: which tokens are rows. "last token" or "first token" of each sequence, or "all tokens". Or a mean, with
            one row per sequence: "mean" of all its tokens, "last 4" (any number), "response" (of messages, their last turn),
            "suffix" or "span". Padding is never among them.
        suffix: with at="suffix", a text that is appended to every text. Its tokens are measured.
        spans: with at="span", (start, stop) for each text: of its characters, or of its tokens if it is token ids.
        sinks: tokens whose norm is above this many times the median of their text's norms are left out of means and of
            "all tokens", and counted in `left_out`. None keeps all tokens.
        groups: a label for each text. Each group has moments of its own.
        group_names: the labels that may occur, in order. Needed if labels come in a stream or in batches.
        batch_size: sequences per forward. max_length: cut texts to this many tokens. Without it, a text longer than the
            model takes is an error.
        resume: a folder. The sums are saved there every `save_every` seconds, at the end of a window. An interrupted
            pass continues from there and ends with the bits of an uninterrupted one.
        rows: a folder for the rows themselves, in memory-mapped shards, for `fastedit.capturing.rows_on_disk.Rows`.
        processes: an accelerate Accelerator or PartialState. Each process takes its share of the batches, and all
            return the merged moments.
        progress: show a bar. None: on a terminal.

    Returns:
        Captured, {layer number: Moments}.

    Raises:
        TypeError, ValueError: something that cannot be captured: a site or layer that does not exist, a text too long,
        a folder that holds another pass.
    """
    check_at(at), check_sinks(sinks), check_data(model, "a capture")
    chosen = _choose(model, layers, site)
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    windows = Windows(
        tokenizer, data, groups, names=group_names, batch_size=batch_size, max_length=max_length, limit=_limit(model),
        at=at, suffix=suffix, spans=spans,
    )  # fmt: skip
    moments = {
        layer.index: Moments(width_at(layer, site), len(windows.names), device=device_at(layer, site))
        for layer in chosen
    }
    job = {
        "layers": list(moments), "site": site, "at": at, "names": [str(name) for name in windows.names],
        "batch_size": batch_size, "max_length": max_length, "rank": rank, "processes": world, "sinks": sinks,
        "suffix": suffix, "spans": None if windows.spans is None else [list(map(int, span)) for span in windows.spans],
    }  # fmt: skip
    left_out = {layer: torch.zeros(2, dtype=torch.int64) for layer in moments}
    state = None if resume is None else _State(resume, job, save_every)
    writer = None if rows is None else RowWriter(rows, job, fresh=state is None or not state.path.exists())
    done = 0 if state is None else state.load(moments, left_out, windows)
    forward = _Forward(model, chosen, site, moments, left_out, at, sinks, writer)
    with evaluating(model), _bar(progress, windows) as advance:
        advance(done)
        for window in windows:
            for batch in window[rank::world]:
                forward(batch)
            if writer is not None:
                writer.flush(windows.position)
            if state is not None:
                state.save(moments, left_out, windows, now=writer is not None)  # no shard without the sums that go with it
            advance(windows.position)
    if not windows.position:
        raise ValueError("the data is empty: there is nothing to capture")
    if state is not None:
        state.save(moments, left_out, windows, now=True)
    if world > 1:
        for layer, found in moments.items():
            found.all_reduce()
            left_out[layer] = _summed(left_out[layer], found)
    sequences = int(next(iter(moments.values())).count.sum()) if at != "all tokens" else windows.position
    left = {layer: tuple(found.tolist()) for layer, found in left_out.items()}
    return Captured(moments, windows.names, site, at, sequences, left)


def _summed(counts, found):
    """The sums of all processes."""
    import torch.distributed as dist

    counts = counts.to(found.count.device)
    dist.all_reduce(counts)
    return counts


class _Forward:
    """One forward of a batch, as far as the deepest layer, each layer's rows into its Moments."""

    def __init__(self, model, chosen, site, moments, left_out, at, sinks, writer):
        self.model, self.chosen, self.site, self.moments, self.at, self.writer = model, chosen, site, moments, at, writer
        self.left_out, self.sinks = left_out, sinks
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
        """Position ids for a ready batch padded on the left.

        A model that numbers columns would otherwise take its tokens for later ones.

        Raises:
            ValueError: the batch has none, and it is not known whether the model numbers its tokens by itself.
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
            tokens = self._tokens(layer, batch)
            if has_span(self.at) and tokens is not batch.tokens:
                raise ValueError(f"layer {layer.name} is a decoder's, whose tokens are not the texts' own: no {self.at!r} there")
            self.picks[key] = Pick(tokens, batch.spans, batch, self.at, self.sinks, hidden.device)
        pick = self.picks[key]
        if hidden.shape[:2] != pick.tokens.shape:
            raise ValueError(
                f"layer {layer.name} returned hidden states {tuple(hidden.shape)} for tokens {tuple(pick.tokens.shape)}"
            )
        rows, group, left = pick.rows(hidden)
        if left is not None:
            self.left_out[layer.index] = self.left_out[layer.index].to(left.device) + left
        self.moments[layer.index].update(rows, group)
        if self.writer is not None:
            self.writer.add(layer.index, rows, group, batch.index)

    def _tokens(self, layer, batch):
        if not layer.name.startswith("decoder."):
            return batch.tokens
        mask = batch.inputs.get("decoder_attention_mask")
        given = batch.inputs.get("decoder_input_ids", batch.inputs.get("decoder_inputs_embeds"))
        return torch.ones(given.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


class _State:
    """The sums so far and where in the data they end, in one file that is replaced in one step."""

    def __init__(self, folder, job, every):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank, world = job["rank"], job["processes"]
        self.path = folder / (f"capture-{rank}-of-{world}.safetensors" if world > 1 else "capture.safetensors")
        self.job, self.every, self.saved = job, every, time.monotonic()

    def load(self, moments, left_out, windows):
        """How many items of the data are in the sums already."""
        if not self.path.exists():
            return 0
        note, tensors = self._read()
        if note["job"] != self.job:
            other = [f"{name} {value!r:.80}" for name, value in (dict.fromkeys(self.job) | note["job"]).items()
                     if value != self.job.get(name)]
            raise ValueError(f"{self.path} is of another pass ({', '.join(other)}); remove it, or resume elsewhere")
        states = {
            layer: {name: tensors.get(f"{layer}.{name}") for name in ("count", "mean", "m2", "left_out")}
            for layer in moments
        }
        if any(tensor is None for state in states.values() for tensor in state.values()):
            raise ValueError(f"{self.path} lacks sums of this pass; remove it, or resume elsewhere")
        if windows.skip(note["position"]) != note["position"] or windows.digest.hexdigest() != note["digest"]:
            raise ValueError(f"{self.path} is of other data than this; remove it, or resume elsewhere")
        for layer, found in moments.items():
            left_out[layer] = states[layer].pop("left_out")
            found.load_state_dict(states[layer])
        return note["position"]

    def _read(self):
        """(note, tensors). ValueError for a file that is not one of sums, or is damaged."""
        try:
            note, tensors, version = open_tensors(read_regular(self.path, 64 << 30), ("capture",))
            note = parse_json(note["capture"])
            sound = isinstance(note, dict) and isinstance(note.get("job"), dict) and isinstance(note.get("digest"), str)
            if not sound or isinstance(note.get("position"), bool) or not isinstance(note.get("position"), int):
                raise Damaged("is not what a capture writes")
        except Damaged as error:
            raise ValueError(f"{self.path} {error}; remove it, and start again") from None
        if version == 1:
            logger.warning("fastedit: %s is of format version 1, which has no checksum; its next save has one", self.path)
        return note, tensors

    def save(self, moments, left_out, windows, now=False):
        if not now and time.monotonic() - self.saved < self.every:
            return
        note = {"job": self.job, "position": windows.position, "digest": windows.digest.hexdigest()}
        tensors = {
            f"{layer}.{name}": tensor.cpu().contiguous()
            for layer, found in moments.items()
            for name, tensor in (found.state_dict() | {"left_out": left_out[layer]}).items()
        }
        replace(self.path, seal_tensors(tensors, {"capture": json.dumps(note)}))
        self.saved = time.monotonic()


def _choose(model, layers, site):
    """The layers, in the order in which they run."""
    check_site(site)
    root = root_of(model) or Root(model)
    found = choose(Edit((), site=site, layers=layers), root.layers)
    root.check((layer, site, width_at(layer, site), True, True) for layer in found)
    for layer in found:
        if isinstance(layer.place(site), Input) and root.stack(layer, site):
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
