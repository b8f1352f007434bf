"""A thread that stands still within a call of a model."""

import functools
import threading

import torch

import fastedit as fe
from tools.readers import WIDTH
from tools.soak import IDS

VECTOR = torch.linspace(-1, 1, WIDTH)
STEER = fe.Steer(VECTOR, site="mlp")


class Within:
    """A thread that stands still within layer 1 of a call of a model, until it is let go.

    call: given a function that does the standing still, if it does so elsewhere.
    """

    def __init__(self, llama, call=None, elsewhere=False):
        self.reached, self.go, self.found = threading.Event(), threading.Event(), []
        stop, call = torch.compiler.disable(self.stop), (lambda: llama(IDS)) if call is None else call
        if elsewhere:
            call = functools.partial(call, stop)
        self.hook = torch.nn.Identity() if elsewhere else llama.model.layers[1].self_attn
        self.hook = self.hook.register_forward_hook(stop)
        self.thread = threading.Thread(target=self.run, args=(call,), name="a reader")

    def stop(self, *_):
        self.reached.set()
        assert self.go.wait(300)

    @torch.no_grad()
    def run(self, call):
        try:
            self.found.append(call())
        except BaseException as error:
            self.found.append(error)
            self.reached.set()

    def __enter__(self):
        self.thread.start()
        assert self.reached.wait(300) and not self.found, self.found
        return self

    def __exit__(self, *_):
        self.go.set()
        self.thread.join()
        self.hook.remove()


class Around(torch.nn.Module):
    def __init__(self, inner, first=lambda: None):
        super().__init__()
        self.inner, self.first = inner, first

    def forward(self, ids):
        self.first()
        return self.inner(ids)
