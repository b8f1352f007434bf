"""Many tenants trained in one batch: masters with a leading tenant dimension, and which sequence is whose.

    handle = fastedit.patch(model, fastedit.RED(), tenants=8)
    with handle.assign([0, 3, 1, None]):          # one a sequence
        model(**batch).loss.backward()

The kernels take the tenant of each row as its slot, forward and backward, so a step costs what one tenant's does.
"""

import torch


class Tenancy:
    """How many tenants a handle has, and the assignment in force; one object for all of its masters."""

    def __init__(self, count):
        self.count, self.current = count, None

    def slot(self, hidden):
        """int32, one a row of hidden (batch, …, width): shared by the layers of a forward."""
        if self.current is None:
            raise RuntimeError(
                f"this handle holds {self.count} tenants: run the model, and the backward of a checkpointed one, inside "
                "`with handle.assign([...])`, one tenant a sequence (None = untouched)"
            )
        return self.current.slot(hidden)


class Assignment:
    """A context: inside it, sequence i of a batch belongs to tenants[i]."""

    def __init__(self, tenancy, tenants):
        self.tenancy, self.tenants = tenancy, _checked(tenants, tenancy.count)
        self.rows, self.slots, self._before = None, {}, []

    def slot(self, hidden):
        if torch.compiler.is_compiling():
            return self._spread(hidden)
        key = hidden.shape[:-1], hidden.device
        found = self.slots.get(key)
        if found is None:
            with torch.inference_mode(False):  # inference tensors could not be saved for a backward
                found = self.slots[key] = self._spread(hidden)
        return found

    def _spread(self, hidden):
        return spread(self.rows, hidden, "tenants")

    def __enter__(self):
        with torch.inference_mode(False):
            self.rows = torch.tensor(self.tenants, dtype=torch.int32)
        self._before.append(self.tenancy.current)
        self.tenancy.current = self
        return self

    def __exit__(self, *exception):
        self.tenancy.current = self._before.pop()


class Slotted(tuple):
    """(scale, bias, read, offset, write) with a leading tenant dimension, and the Tenancy that has the rows' slots."""

    def __new__(cls, tensors, tenancy):
        new = super().__new__(cls, tensors)
        new.tenancy = tenancy
        return new


def spread(each, hidden, what):
    """One value a row of hidden (batch, …, width), from one a sequence: beams and samples share their sequence's."""
    batch, given = hidden.shape[0], each.shape[0]
    if batch % given:
        raise ValueError(
            f"assign() was given {given} {what}, but the batch has {batch} sequences: expected one of the {what} a "
            "sequence (or beams, a whole number for each)"
        )
    each = each.to(hidden.device).repeat_interleave(batch // given, output_size=batch)
    return each.view(-1, *[1] * (hidden.dim() - 2)).expand(hidden.shape[:-1]).contiguous()


def slot_of(tensors, hidden):
    """The rows' slots for hidden (…, width), or None where the parameters are one edit's."""
    return tensors.tenancy.slot(hidden) if type(tensors) is Slotted else None


def check_count(tenants):
    if tenants is not None and (isinstance(tenants, bool) or not isinstance(tenants, int) or tenants < 1):
        raise ValueError(f"tenants is {tenants!r}, expected a whole number of tenants, or None for one edit")
    return tenants


def check_tenant(tenant, count):
    if isinstance(tenant, bool) or not isinstance(tenant, int) or not 0 <= tenant < count:
        raise ValueError(f"there is no tenant {tenant!r}: this handle holds tenants 0 to {count - 1}")
    return tenant


def _checked(tenants, count):
    if isinstance(tenants, (str, int)) or tenants is None:
        raise TypeError(f"assign() was given {tenants!r}, expected a list with one tenant a sequence")
    tenants = tenants.tolist() if hasattr(tenants, "tolist") else list(tenants)
    if not tenants:
        raise ValueError("assign() was given no tenants, expected one a sequence")
    return tuple(-1 if tenant in (None, -1) else check_tenant(tenant, count) for tenant in tenants)
