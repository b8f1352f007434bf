"""Rotation in a plane: h' = h + (h Vᵀ)(Rot(angle) − I)ᵀ V. The basis V and the angle are what is kept and trained.

Masters: plane = V (2, width), rows orthonormal; angle (1,), radians. Leading dimensions (layers, tenants) may come
    first.
"""

import torch

from .form import Form


def turn(angle):
    """(Rot(angle) − I)ᵀ (…, 2, 2) for angles (…, 1)."""
    cos, sin = angle.cos() - 1, angle.sin()
    return torch.stack([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], -2)


def turned(masters):
    """The normal form's five tensors."""
    plane = masters["plane"]
    return None, None, plane, None, turn(masters["angle"]) @ plane


def turned_back(masters, grads):
    """The transpose of `turned`: gradients of plane and angle from those of read and write."""
    _, _, d_read, _, d_write = grads
    plane, angle = masters["plane"], masters["angle"]
    if d_write is None:
        return {"plane": d_read}
    d_plane = turn(angle).mT @ d_write
    cos, sin = angle.cos(), angle.sin()
    slope = torch.stack([torch.cat([-sin, cos], -1), torch.cat([-cos, -sin], -1)], -2)
    d_angle = (d_write @ plane.mT * slope).sum((-2, -1))[..., None]
    return {"plane": d_plane if d_read is None else d_plane + d_read, "angle": d_angle}


def turned_form(masters):
    return Form(*turned(masters))
