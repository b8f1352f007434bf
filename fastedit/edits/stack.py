"""A stack of named edits on one sequence, for banks and serving: applied in order, run as one normal form.

    with bank.assign([fastedit.Stack("tone", "facts"), "tone", None]): ...

A combination is folded when it is first used and then has a slot of its own. So a row is still one slot, and each place
one pass (docs/design.md, 2).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import as_number
from .form import at_strength, fold_all


class Stack:
    """Names of one sequence's edits, in the order in which they apply. A name may occur more than once.

    This is a type of its own because a list of names beside another is a packed sequence's tokens, and because a name
    may hold any character.

    Raises:
        TypeError, ValueError: no names, or something that is not a name.
    """

    __slots__ = ("names", "strengths")

    def __init__(self, *names: str) -> None:
        if len(names) == 1 and isinstance(names[0], (list, tuple)):
            raise TypeError(f"Stack takes the names themselves: Stack({', '.join(map(repr, names[0]))})")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"a Stack was given {name!r:.60}, expected the names of edits, strings")
        if not names:
            raise ValueError("Stack() was given no names; a sequence that is not edited is None")
        self.names, self.strengths = names, (1.0,) * len(names)

    def at(self, strengths: Sequence[float]) -> Stack:
        """The same stack with a strength for each part: strengths[i] of names[i].

        Raises:
            ValueError: not one finite number per part.
        """
        if len(strengths) != len(self.names):
            raise ValueError(f"{len(strengths)} strengths for the {len(self.names)} parts of {self!r}: one number, or one each")
        other = Stack(*self.names)
        other.strengths = tuple(map(finite, strengths))
        return other

    def __eq__(self, other):
        return type(other) is Stack and (self.names, self.strengths) == (other.names, other.strengths)

    def __hash__(self):
        return hash((self.names, self.strengths))

    def __repr__(self):
        return f"Stack({', '.join(map(repr, self.names))})"


def finite(strength):
    """A strength as a float.

    Raises:
        TypeError, ValueError: not a number, NaN or infinite.
    """
    if isinstance(strength, (list, tuple, str)):
        raise TypeError(f"a strength is {strength!r:.60}, expected a number; a list of them is for a Stack, one per part")
    return as_number("a strength", strength)


def stacked(parts, strengths):
    """{place: Form} of edits applied in order, each at its strength.

    parts: {place: [Form, …]} per edit, the forms at a place in the order in which they apply.
    """
    by_place = {}
    for forms_by_place, strength in zip(parts, strengths, strict=True):
        for place, forms in forms_by_place.items():
            by_place.setdefault(place, []).extend(at_strength(form, strength) for form in forms)
    return {place: fold_all(forms) if len(forms) > 1 else forms[0] for place, forms in by_place.items()}


def steepest(ranks):
    """(rank, place) where a stack needs the largest rank, because ranks add up. (0, None) for none.

    ranks: {place: rank} per edit.
    """
    total = {}
    for by_place in ranks:
        for place, rank in by_place.items():
            total[place] = total.get(place, 0) + rank
    return max(((rank, place) for place, rank in total.items() if rank), default=(0, None), key=lambda found: found[0])


def check_gates(named, error=ValueError):
    """Check that a gated edit is alone at its places: its gate decides on what the edit itself is given.

    named: [(name, places, those of them with a gate)].
    """
    for i, (name, places, _) in enumerate(named):
        for j, (gated, _, there) in enumerate(named):
            shared = () if i == j else sorted({*places} & {*there}, key=str)
            if shared:
                raise error(
                    f"a stack cannot hold {name} beside {gated}, whose edit at site {shared[0][1]!r} of layer {shared[0][0]} "
                    "is behind a gate: at each place a gated edit is alone"
                )


def check_positions(named, error=ValueError):
    """Check that the edits of a stack act on the same tokens: they are one slot, and its rows have one coefficient.

    named: [(name, positions)].
    """
    if len({positions for _, positions in named}) > 1:
        said = ", ".join(f"{name} on {positions or 'all'}" for name, positions in named)
        raise error(f"a stack acts on the same tokens, but these do not: {said}")
