"""What `fastedit.capture` measured, by layer: how long each group's mean is, and how far rows scatter around it."""

from . import style


def draw(captured, axes=None):
    """Two pictures: the norm of each group's mean, and the root of the summed variance, both by layer.

    Returns [matplotlib axes].
    """
    layers = list(captured)
    means, spreads = style.axes_or_new(axes, 5.5, 3.8, 2)
    for group, name in enumerate(captured.names):
        color = style.CYCLE[group % len(style.CYCLE)]
        label = "all" if name is None else str(name)
        means.plot(layers, [float(captured[k].mean()[group].norm()) for k in layers], marker="o", color=color, label=label)
        spread = [float(captured[k].variance()[group].clamp(min=0).sum().sqrt()) for k in layers]
        spreads.plot(layers, spread, marker="o", color=color, label=label)
    for one, what in ((means, "norm of the mean"), (spreads, "spread around the mean")):
        style.layer_ticks(one, layers)
        style.finish(one, title=f"{what}, {captured.site} at {captured.at}", x="layer", y="of hidden states")
    if captured.names != (None,):
        means.legend(frameon=False, fontsize=style.SMALL)
    return [means, spreads]
