"""`fastedit playground`: the page of fastedit.playground on this machine."""

import importlib.util
from pathlib import Path

import typer
from rich.console import Console

from .loading import load_model


def run(model, edits, host, port, **loading):
    missing = [package for package in ("gradio", "matplotlib") if importlib.util.find_spec(package) is None]
    if missing:
        raise typer.BadParameter(f"the playground needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if edits is not None and not edits.is_dir():
        raise typer.BadParameter(f"there is no folder {edits}", param_hint="--edits")
    loaded, tokenizer = load_model(model, **loading)
    from ..playground.page import serve
    from ..playground.session import Session

    try:
        session = Session(loaded, tokenizer, edits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    Console().print(f"http://{host}:{port}  (Ctrl-C ends it)", highlight=False)
    try:
        serve(session, Path(model).name, host, port)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--port") from None
