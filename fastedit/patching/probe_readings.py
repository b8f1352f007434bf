"""Probes at work: the stage that reads, and what a handle's probes read in the last forward."""

import threading

import torch

from .. import ops
from ..kernels import reference


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


class Readings(list[torch.Tensor]):
    """[(layers, batch, tokens, probes)], a tensor for each Probe. layers: the layer numbers of each."""

    def __init__(self, found=(), layers=()):
        super().__init__(found)
        self.layers = list(layers)

    def plot(self, number=0, *, tokens=None, sequence=0, probe=0, axes=None):
        """Draw what Probe `number` read of one sequence, layers upwards and tokens to the right. Returns matplotlib axes.

        tokens: their texts, as many as were read. probe: which of the Probe's vectors.

        Raises:
            IndexError: nothing was read yet, or there are fewer Probes. ValueError: another number of tokens.
        """
        from ..plots.probes import draw

        if not 0 <= number < len(self):
            raise IndexError(f"number is {number}, and there are readings of {len(self)} Probes: run a forward first")
        return draw(self[number], tokens=tokens, layers=self.layers[number], sequence=sequence, probe=probe, axes=axes)


def readings(members):
    """What the probes among a handle's edits, [[(layer, Masters)]], read: Readings [(layers, batch, tokens, probes)].

    The readings are those of this thread's last forward. If this thread ran none, those of the one other thread that
    did.
    """
    found, layers = [], []
    for chosen in members:
        if not chosen[0][1].is_probe:
            continue
        masters = [m for _, m in chosen]
        reads = [_here(m.reads) for m in masters]
        if not all(reads):
            return Readings()
        of_layers = [torch.cat(read, -2) if len(read) > 1 else read[0] for read in reads]
        if len({z.shape for z in of_layers}) > 1:
            shapes = ", ".join(sorted({str(tuple(z.shape)) for z in of_layers}))
            raise ValueError(f"the layers of a Probe read different tokens ({shapes}); give each stack a Probe of its own")
        found.append(torch.stack([z.to(of_layers[0].device) for z in of_layers]))
        layers.append([layer.index for layer, _ in chosen])
    return Readings(found, layers)


def _here(reads):
    thread = threading.get_ident()
    if thread not in reads and len(reads) > 1:
        raise RuntimeError("several threads ran forwards with this probe: ask for its readings in the thread that ran one")
    return reads[thread if thread in reads else next(iter(reads), None)][1] if reads else []
