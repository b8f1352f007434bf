"""What tests on a GPU share: the backend under test, and forms moved there."""

import pytest

from fastedit import dispatch


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    reason = dispatch.why_not(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield request.param
    dispatch.select.cache_clear()


def on_gpu(form):
    return {n: None if p is None else p.cuda() for n, p in form.items()}
