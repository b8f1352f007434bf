"""Many tenants trained in one batch: masters with a leading tenant dimension, and which sequence is whose.

    handle = fastedit.patch(model, fastedit.RED(), tenants=8)
    with handle.assign([0, 3, 1, None]):          # one per sequence
        model(**batch).loss.backward()

The kernels take the tenant of each row as its slot, forward and backward, so a step costs what one tenant's does.
"""

import torch

from ...arguments import MOST_SLOTS
from .in_force import Entered, Owner, check_batch, spread


class Tenancy(Owner):
    """How many tenants a handle has, and the assignments in force. All of its masters share one Tenancy."""

    what = "assignment of tenants"

    def __init__(self, count):
        super().__init__()
        self.count = count

    def slot(self, hidden):
        """int32, one per row of hidden (batch, …, width), shared by the layers of a forward."""
        found = self.now()
        if found is None:
            raise RuntimeError(
                f"this handle holds {self.count} tenants: run the model, and the backward of one that is checkpointed by "
                "hand, inside `with handle.assign([...])`, one tenant per sequence (None = untouched)"
            )
        return found.slot(hidden)


class EnteredTenants(Entered):
    """rows: int32, one per sequence. slots: what was spread of it over the rows of a forward."""

    def __init__(self, tenants):
        super().__init__()
        self.slots = {}
        with torch.inference_mode(False):
            self.rows = torch.tensor(tenants, dtype=torch.int32)

    def slot(self, hidden):
        check_batch(hidden, len(self.rows), "tenants")
        if torch.compiler.is_compiling():
            return spread(self.rows, hidden)
        key = hidden.shape[:-1], hidden.device
        found = self.slots.get(key)
        if found is None:
            with torch.inference_mode(False):  # inference tensors could not be saved for a backward
                found = self.slots[key] = spread(self.rows, hidden)
        return found


class Assignment:
    """A context in which sequence i of a batch belongs to tenants[i]."""

    def __init__(self, tenancy, tenants):
        self.tenancy, self.tenants, self._entered = tenancy, _checked(tenants, tenancy.count), []

    def __enter__(self):
        entered = EnteredTenants(self.tenants)
        self.tenancy.push(entered)
        self._entered.append(entered)
        return entered

    def __exit__(self, *exception):
        self.tenancy.pop(self._entered.pop())


class Slotted(tuple):
    """(scale, bias, read, offset, write) with a leading tenant dimension, and the Owner that has the rows' slots.

    first: whether a forward reaches it before all others. There a compiled graph checks whose forward it is.
    """

    def __new__(cls, tensors, tenancy, first=False):
        new = super().__new__(cls, tensors)
        new.tenancy, new.first = tenancy, first
        return new


def slot_of(tensors, hidden):
    """The rows' slots for hidden (…, width), or None if the parameters are one edit's."""
    if type(tensors) is not Slotted:
        return None
    slot = tensors.tenancy.slot(hidden)
    return tensors.tenancy.guarded(slot) if tensors.first else slot


def check_count(tenants):
    whole = isinstance(tenants, int) and not isinstance(tenants, bool)
    if tenants is not None and not (whole and 1 <= tenants < MOST_SLOTS):
        raise ValueError(f"tenants is {tenants!r:.60}, expected a whole number of tenants below 2^31, or None for one edit")
    return tenants


def check_tenant(tenant, count):
    if isinstance(tenant, bool) or not isinstance(tenant, int) or not 0 <= tenant < count:
        raise ValueError(f"there is no tenant {tenant!r}: this handle holds tenants 0 to {count - 1}")
    return tenant


def _checked(tenants, count):
    if isinstance(tenants, (str, int)) or tenants is None:
        raise TypeError(f"assign() was given {tenants!r}, expected a list with one tenant per sequence")
    tenants = tenants.tolist() if hasattr(tenants, "tolist") else list(tenants)
    if not tenants:
        raise ValueError("assign() was given no tenants, expected one per sequence")
    return tuple(-1 if tenant in (None, -1) else check_tenant(tenant, count) for tenant in tenants)
