"""Directions: one vector per layer, with arithmetic, files, and statistics of how well they separate classes.

    directions = fastedit.contrast(model, tokenizer, positive, negative)
    fastedit.patch(model, fastedit.Steer(directions, layers=range(8, 16), strength=2.0))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..edits.kinds import orthonormal_rows
from ..edits.per_layer import as_values
from ..files.edit_file import replace
from ..files.sealed import Damaged, open_tensors, parse_json, read_regular, seal_tensors
from ..hints import Array, Folder
from . import gguf_file

FILE = "directions.safetensors"
_KEYS = ("format", "about", "statistics")  # of its metadata, beside version and checksum
_OLD_JSON, _OLD_TENSORS = "directions.json", re.compile(r"directions-[0-9a-f]{16}\.safetensors")  # version 1: two files
_LIMIT = 4 << 30

logger = logging.getLogger("fastedit")


class DirectionsFileError(ValueError):
    """Directions on disk are not what they should be. The message says what was expected, what was found and what to
    do."""


class Directions(Mapping[int, torch.Tensor]):
    """{layer number: fp32 vector (width,)}, which `Steer`, `Ablate` and the other edits take as it is.

    Arithmetic gives new Directions, without the statistics: a + b, a − b (a layer that one side lacks counts as zero
    there), −a, 2 * a, a / 2, `normalised`, `project_out`.

    Attributes:
        statistics: {layer: {name: number}}, as `fastedit.contrast` describes them.
        about: what they are and of which model, JSON-able.

    Raises:
        TypeError, ValueError: no layers, layers that are not numbers from 0 on, or vectors that are not finite, not
        floating or not of one width.
    """

    def __init__(
        self, vectors: Mapping[int, Array], statistics: Mapping[int, Mapping[str, Any]] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(vectors, Mapping) or not vectors:
            raise ValueError(f"vectors is {vectors!r:.60}, expected a mapping from layer number to vector")
        for layer in vectors:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise TypeError(f"vectors has the key {layer!r}, expected layer numbers from 0 on")
        self._vectors = {layer: as_values(f"layer {layer}", vectors[layer]) for layer in sorted(vectors)}
        shapes = sorted({tuple(vector.shape) for vector in self._vectors.values()})
        if len(shapes) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"vectors have shapes {shapes}, expected one shape (width,) throughout")
        self.statistics, self.about = dict(statistics or {}), dict(about or {})

    @property
    def width(self) -> int:
        """Of each vector."""
        return next(iter(self._vectors.values())).shape[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers' numbers, in ascending order."""
        return tuple(self._vectors)

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._vectors[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __eq__(self, other):
        if not isinstance(other, Directions):
            return NotImplemented
        return self.layers == other.layers and all(torch.equal(self[layer], other[layer]) for layer in self)

    __hash__ = None

    # --- arithmetic -----------------------------------------------------------------------------------------

    def __add__(self, other: Directions) -> Directions:
        if not isinstance(other, Directions):
            return NotImplemented
        self._same_width(other)
        zero = torch.zeros(self.width)
        layers = {*self, *other}
        return self._derived({layer: self.get(layer, zero) + other.get(layer, zero) for layer in layers})

    def __sub__(self, other: Directions) -> Directions:
        return self + -other if isinstance(other, Directions) else NotImplemented

    def __neg__(self) -> Directions:
        return self._map(torch.neg)

    def __mul__(self, factor: float) -> Directions:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"the factor is {factor}, expected a finite number")
        return self._map(lambda vector: vector * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Directions:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self * (1 / factor)

    def normalised(self) -> Directions:
        """Every vector at length 1. ValueError for one that is zero."""
        for layer, vector in self.items():
            if not vector.any():
                raise ValueError(f"the vector of layer {layer} is zero: it has no direction; leave the layer out")
        return self._map(lambda vector: (vector.double() / vector.double().norm()).float())

    def project_out(self, *others: Directions) -> Directions:
        """The part of each vector orthogonal to the span of the others' vectors at its layer, in float64.

        Raises:
            ValueError: another lacks a layer, or has another width.
        """
        if not others:
            raise ValueError("project_out was given no directions, expected one or more to take away")
        for other in others:
            self._same_width(other)
            missing = [layer for layer in self if layer not in other]
            if missing:
                raise ValueError(f"there is nothing to project out at layers {missing}: the other has {other.layers}")
        left = {}
        for layer, vector in self.items():
            basis = orthonormal_rows(torch.stack([other[layer] for other in others])).double()
            left[layer] = (vector.double() - (vector.double() @ basis.T) @ basis).float()
        return self._derived(left)

    def at(self, *layers: int) -> Directions:
        """These layers alone, with their statistics. KeyError for one that is not there."""
        kept = {layer: self[layer] for layer in layers}
        return Directions(kept, {k: v for k, v in self.statistics.items() if k in kept}, self.about)

    def best(self, by: str = "accuracy") -> int:
        """The layer where the statistic `by` is largest. KeyError if no layer has it."""
        known = {layer: found[by] for layer, found in self.statistics.items() if found.get(by) is not None}
        if not known:
            raise KeyError(f"no layer has the statistic {by!r}")
        return max(known, key=known.get)

    def window(self, count: int) -> tuple[int, ...]:
        """(layer, …): `count` neighboring layers to steer at, the earliest of those that separate the classes best.

        Best is the mean held-out accuracy if probes give one, within one text held out. Else it is the mean separation,
        within 5 %. Late layers often separate as well and steer less, because few layers work on what they add.

        Raises:
            ValueError: fewer layers than `count`. KeyError: neither statistic is known for every layer.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(self):
            raise ValueError(f"count is {count!r}, expected a number of layers from 1 to {len(self)}")
        noted = [self.statistics.get(layer, {}) for layer in self]
        name = next((n for n in ("accuracy", "separation") if all(found.get(n) is not None for found in noted)), None)
        if name is None:
            raise KeyError("neither accuracy nor separation is known of every layer")
        values = [found[name] for found in noted]
        means = [sum(values[at : at + count]) / count for at in range(len(self) - count + 1)]
        slack = 1 / noted[0]["held_out"] if name == "accuracy" else 0.05 * max(means)
        at = next(at for at, mean in enumerate(means) if mean >= max(means) - slack - 1e-12)
        return self.layers[at : at + count]

    def relative(self, share: float) -> Directions:
        """Vectors as long as `share` × the residual's norm at their layer, given by the statistic "residual".

        Raises:
            ValueError: a share that is not finite, a layer without that statistic, a vector that is zero.
        """
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share):
            raise ValueError(f"share is {share!r}, expected a finite number")
        missing = [layer for layer in self if not self.statistics.get(layer, {}).get("residual")]
        if missing:
            raise ValueError(
                f"the residual's norm is not known at layers {missing}: fastedit.contrast notes it as statistic 'residual'"
            )
        unit = self.normalised()
        return self._derived({layer: unit[layer] * share * self.statistics[layer]["residual"] for layer in self})

    def _map(self, function):
        return self._derived({layer: function(vector) for layer, vector in self.items()})

    def _derived(self, vectors):
        return Directions(vectors, about={k: v for k, v in self.about.items() if k not in ("method", "statistics")})

    def _same_width(self, other):
        if not isinstance(other, Directions):
            raise TypeError(f"expected Directions, found {type(other).__name__}")
        if other.width != self.width:
            raise ValueError(f"directions of width {self.width} and of width {other.width} do not go together")

    def plot(self, axes: Any = None) -> list[Any]:
        """Draw accuracy, where probes give one, and separation by layer. Returns [matplotlib axes], new ones for axes=None.

        Raises:
            ValueError: directions without statistics.
        """
        from ..plots.directions import draw

        return draw(self, axes)

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, folder: Folder) -> Path:
        """Write directions.safetensors. A crash leaves the old file or the new one. Of two writers the last wins,
        whole.

        Returns the folder's Path.

        Raises:
            OSError: it could not be written. ValueError: statistics or `about` are not JSON-able.
        """
        folder = Path(folder)
        statistics = {str(layer): found for layer, found in self.statistics.items()}
        try:
            about, statistics = (json.dumps(said, allow_nan=False) for said in (self.about, statistics))
        except (TypeError, ValueError) as error:
            raise ValueError(f"statistics or about are not JSON-able: {error}") from None
        note = {"format": "fastedit directions", "about": about, "statistics": statistics}
        payload = seal_tensors({f"layers.{layer}": vector.contiguous() for layer, vector in self.items()}, note)
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / FILE, payload)
        for old in folder.iterdir():  # of version 1, whose place this takes
            if old.name == _OLD_JSON or _OLD_TENSORS.fullmatch(old.name):
                with contextlib.suppress(OSError):
                    old.unlink()
        return folder

    @classmethod
    def load(cls, folder: Folder) -> Directions:
        """What `save` wrote to a folder, checked. DirectionsFileError says what is wrong with it."""
        path = Path(folder) / FILE
        try:
            if not path.exists():
                return cls(*_version_1(Path(folder)))
            note, tensors, _ = open_tensors(read_regular(path, _LIMIT), _KEYS)
            if note["format"] != "fastedit directions":
                raise Damaged(f"is {note['format']!r:.60}, expected 'fastedit directions'")
            return cls(_vectors(tensors), *_said(*(parse_json(note[key]) for key in ("statistics", "about"))))
        except OSError as error:
            raise DirectionsFileError(f"{path} could not be read: {error.strerror or error}") from None
        except (ValueError, TypeError) as error:  # Damaged, and what vectors of the file are no directions
            if isinstance(error, DirectionsFileError):
                raise
            raise DirectionsFileError(f"{path} {error}; save it again") from None

    def save_gguf(self, path: Folder, *, model: str | None = None) -> Path:
        """Write a control vector for llama.cpp. A crash leaves the old file or the new one. Returns the Path.

        Args:
            path: of the file. model: llama.cpp's name of the architecture, for the file's model_hint. By default `about["type"]`.

        Raises:
            ValueError: there is a vector at layer 0, which llama.cpp cannot add, or the directions are of another site
            than the residual stream. ImportError: no `gguf` package.
        """
        if 0 in self:
            raise ValueError(
                "llama.cpp adds no vector to layer 0; leave it out: directions.at(*directions.layers[1:]).save_gguf(…)"
            )
        site = self.about.get("site", "block")
        if site != "block":
            raise ValueError(f"the directions are of site {site!r}; llama.cpp adds to the residual stream, 'block'")
        return gguf_file.write(path, dict(self), model or self.about.get("type") or "unknown")

    @classmethod
    def load_gguf(cls, path: Folder) -> Directions:
        """Directions from the file at path, a control vector of llama.cpp or repeng.

        Raises:
            DirectionsFileError: it is not a GGUF file or not a control vector, or it holds a tensor that is no vector.
            ImportError: no `gguf` package.
        """
        try:
            vectors, about = gguf_file.read(path)
        except Damaged as error:
            raise DirectionsFileError(str(error)) from None
        try:
            return cls(vectors, about=about)
        except (ValueError, TypeError) as error:
            raise DirectionsFileError(f"{path}: {error}") from None

    def __repr__(self):
        method = f" by {self.about['method']}" if "method" in self.about else ""
        return f"<directions{method}: layers {', '.join(map(str, self))}, width {self.width}>"


def _said(statistics, about):
    try:
        return {int(layer): dict(found) for layer, found in statistics.items()}, dict(about)
    except (ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"has statistics or about that are not what Directions.save writes: {error}") from None


def is_saved(folder):
    """Whether a folder holds what `Directions.save` wrote, in any version."""
    return any((Path(folder) / name).exists() for name in (FILE, _OLD_JSON))


def _vectors(tensors):
    found = {}
    for name, tensor in tensors.items():
        number = re.fullmatch(r"layers\.(\d{1,9})", name)
        if number is None:
            raise Damaged(f"holds the tensor {name!r:.80}, expected layers.<number>")
        found[int(number[1])] = tensor
    return found


def _version_1(folder):
    """(vectors, statistics, about) of directions.json and the tensors that it names."""
    path = folder / _OLD_JSON
    if not path.exists():
        raise DirectionsFileError(f"{folder} has no {FILE}; expected a folder written by Directions.save")
    try:
        note = parse_json(read_regular(path, 16 << 20))
        if note["format"] != "fastedit directions" or note["version"] != 1:
            raise DirectionsFileError(
                f"{path} is {note['format']!r:.60} version {note['version']!r:.40}, expected 'fastedit directions' 1"
            )
        name, digest = note["tensors"]["file"], note["tensors"]["sha256"]
        said = _said(note["statistics"], note["about"])
        if not _OLD_TENSORS.fullmatch(name):
            raise Damaged(f"names the tensors {name!r:.80}")
    except (Damaged, LookupError, TypeError) as error:
        raise DirectionsFileError(f"{path} is not what Directions.save writes: {error}") from None
    path = folder / name
    try:
        payload = read_regular(path, _LIMIT)
        if hashlib.sha256(payload).hexdigest() != digest:
            raise Damaged(f"does not have the checksum in {_OLD_JSON}: changed or damaged; save it again")
        vectors = _vectors(open_tensors(payload, ())[1])
    except Damaged as error:
        raise DirectionsFileError(f"{path} {error}") from None
    except OSError as error:
        raise DirectionsFileError(f"{path}, which {_OLD_JSON} names, could not be read: {error.strerror}") from None
    logger.warning(
        "fastedit: the directions in %s are of format version 1, whose %s has no checksum; save them again for one", folder,
        _OLD_JSON,
    )  # fmt: skip
    return vectors, *said
