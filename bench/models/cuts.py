"""Which jobs a run measures: a job is some cells of the table on one size, measured by one process at a time."""

from dataclasses import dataclass, replace

from .registry import KINDS, TRAINED_KINDS, TRAINING, WORKS
from .sizes import SIZES
from .works import WORKS as WORK


@dataclass(frozen=True)
class Job:
    """cells: (kind, work) pairs. seconds: about what the timing of one may take. compiled: whether the compiled
    variants take part."""

    size: str
    cells: tuple
    seconds: float = 6.0
    compiled: bool = True

    def __str__(self):
        works = {}
        for kind, work in self.cells:
            works.setdefault(kind, []).append(work)
        return f"{self.size}: " + "; ".join(f"{kind}: {', '.join(named)}" for kind, named in works.items())


def _every(kinds, works):
    return tuple((kind, work) for kind in kinds for work in works)


# Made for some ten minutes on two idle cores: RED at three widths; the other kinds where the host still decides; the
# compiled variants, which compile anew in each process, in one cell of the smallest model.
DEFAULT = (
    Job("64x5", _every(("red",), ("prefill 256", "training step")), 2.0, compiled=False),
    Job(
        "256x8",
        _every(("red",), ("decode", "decode 16", "prefill 256", "generate 32", "training step"))
        + _every(("steer", "ablate"), ("decode",))
        + _every(("lowrank4",), ("decode", "prefill 256", "training step")),
        2.0,
        compiled=False,
    ),
    Job("512x8", _every(("red",), ("decode", "prefill 256", "training step")), 4.0, compiled=False),
    Job("bert 512x6", (("red", "prefill 256"),), 2.0, compiled=False),
    Job("64x5", _every(("red",), ("decode",)), 2.0),
)


def full():
    """A job for each size and kind."""
    for size, shape in SIZES.items():
        for kind in KINDS:
            works = (w for w in WORKS if shape.family in WORK[w].families)
            yield Job(size, _every((kind,), (w for w in works if w not in TRAINING or kind in TRAINED_KINDS)))


def chosen(everything=False, sizes=None, kinds=None, works=None):
    """The jobs of the default cut, or of everything, that the filters leave.

    Filters that leave nothing of the default cut choose from everything.
    """
    jobs = list(_filtered(full() if everything else DEFAULT, sizes, kinds, works))
    return jobs or list(_filtered(full(), sizes, kinds, works))


def _filtered(cut, sizes, kinds, works):
    for job in cut:
        cells = tuple((k, w) for k, w in job.cells if (not kinds or k in kinds) and (not works or w in works))
        if cells and (not sizes or job.size in sizes):
            yield replace(job, cells=cells)
