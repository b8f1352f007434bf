"""`fastedit playground`: the page of fastedit.playground on this machine."""

import socket
from pathlib import Path

import typer

from .loading import load_model, need


def run(model, edits, host, port, **loading):
    need("fastedit playground", "gradio", "matplotlib")
    if edits is not None and not edits.is_dir():
        raise typer.BadParameter(f"there is no folder {edits}", param_hint="--edits")
    _check_free(host, port)
    loaded, tokenizer = load_model(model, **loading)
    from ..playground.page import serve
    from ..playground.session import Session

    try:
        session = Session(loaded, tokenizer, edits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    serve(session, Path(model).name, host, port)


def _check_free(host, port):
    """Before the model is loaded; Gradio takes a slow start for a port that is taken, too."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{host}:{port} cannot be served ({error.strerror or error})"
        raise typer.BadParameter(f"{where}: give another --port or --host") from None
