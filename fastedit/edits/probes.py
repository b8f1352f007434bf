"""Probes: read-outs z = h @ vectorsᵀ + offset that come with the forward. No hidden states are kept.

    handle = fastedit.patch(model, fastedit.Probe(vectors))
    model(ids)
    handle.readings[0]        (layers, batch, tokens, probes)
"""

import threading

import torch

from .. import ops
from ..kernels import reference
from .kinds import Edit
from .per_layer import PerLayer


class Probe(Edit):
    """z = h @ vectorsᵀ + offset, fp32. h is read at the probe's place in the stack of edits and stays unchanged.

    vectors: values (width,) or (probes, width), up to 64. offset: values (probes,), or None for 0.
    site, layers: as for every edit. The layers of one Probe belong to one stack (an encoder's or a decoder's).
    """

    is_probe = True
    allowed_names = ("read", "offset")

    def __init__(self, vectors, offset=None, *, site=None, layers=None):
        vectors = PerLayer("vectors", vectors, (1, 2)).map(lambda t: t.reshape(-1, t.shape[-1]))
        self.given, ranks = {"read": vectors}, {len(t) for t in vectors.all()}
        if offset is not None:
            self.given["offset"] = PerLayer("offset", offset, (1,))
            ranks |= {t.shape[-1] for t in self.given["offset"].all()}
        if len(ranks) != 1:
            raise ValueError(f"vectors and offset are of {sorted(ranks)} probes, expected one number throughout")
        layers = vectors.layers if layers is None else layers
        super().__init__(self.given, rank=ranks.pop(), site=site, layers=layers)

    def values(self, spot, width):
        return {name: value.at(spot) for name, value in self.given.items()}

    def when(self, gate):
        raise TypeError("a Probe changes nothing, so there is nothing for a gate to decide; gate the edits")


class Reading:
    """A stage that reads the hidden states and passes them on unchanged."""

    on_x, on_sum, positions, looks = True, False, None, None

    def __init__(self, masters, stack):
        self.masters, self.stack, self.form = [masters], stack, masters
        masters.reads = {}  # by thread: (the call of `generate` that was read in, or None; [z])

    def apply(self, hidden):
        masters = self.form
        _, _, read, offset, _ = masters.tensors()
        with torch.no_grad():
            z = _project(hidden, read, offset)
        plan = self.stack.known_plan("a probe")
        if torch.compiler.is_compiling():  # which knows no threads
            masters.reads = {None: (None, [z])}
            return hidden
        thread = threading.get_ident()
        before, read = masters.reads.get(thread, (None, None))
        if plan.generation is not None and before is plan.generation:
            read.append(z)
        else:
            masters.reads.pop(None, None)
            masters.reads[thread] = plan.generation, [z]
        return hidden

    def arguments(self, hidden):
        self.apply(hidden)


def _project(rows, read, offset):
    if torch.compiler.is_compiling():
        with torch.autocast(rows.device.type, enabled=False):
            z = reference.project(rows.reshape(-1, rows.shape[-1]), read, offset)
        return z.view(*rows.shape[:-1], len(read))
    return ops.project(rows, read, offset)


def readings(members):
    """What the probes among a handle's edits, [[(layer, Masters)]], read: [(layers, batch, tokens, probes)].

    The readings are those of this thread's last forward. If this thread ran none, those of the one other thread that
    did.
    """
    found = []
    for masters in ([m for _, m in chosen] for chosen in members if chosen[0][1].is_probe):
        reads = [_here(m.reads) for m in masters]
        if not all(reads):
            return []
        of_layers = [torch.cat(read, -2) if len(read) > 1 else read[0] for read in reads]
        if len({z.shape for z in of_layers}) > 1:
            shapes = ", ".join(sorted({str(tuple(z.shape)) for z in of_layers}))
            raise ValueError(f"the layers of a Probe read different tokens ({shapes}); give each stack a Probe of its own")
        found.append(torch.stack([z.to(of_layers[0].device) for z in of_layers]))
    return found


def _here(reads):
    thread = threading.get_ident()
    if thread not in reads and len(reads) > 1:
        raise RuntimeError("several threads ran forwards with this probe: ask for its readings in the thread that ran one")
    return reads[thread if thread in reads else next(iter(reads), None)][1] if reads else []
