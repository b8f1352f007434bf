"""edit_add: residual' = residual + E(x) (on_sum False) or E(residual + x) (on_sum True).

Streams: x and residual in, residual' out: the plain add's traffic. The sum is formed in fp32 and rounds once,
so an identity edit, slot −1 and coefficient 0 give exactly the plain add. Grid, what is kept and the
backward are edit's: edit.py for rank 0, rows.py above it and with a gate, backward.py.
"""

from .edit import edit_backward, run_edit


def edit_add(
    x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum=False, want_z=False, gate=None, rule=None
):  # fmt: skip
    """(residual' in the promoted dtype, z fp32 (rows, rank) or None)."""
    return run_edit(x, residual, (scale, bias, read, offset, write, slot, coefficient, gate, rule), on_sum, want_z)


edit_add_backward = edit_backward  # d_residual is grad itself (on x) or d_x (on the sum)
