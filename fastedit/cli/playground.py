"""`fastedit playground`: the page of fastedit.playground on this machine."""

from pathlib import Path

import typer

from .loading import load_model, need


def run(model, edits, host, port, **loading):
    need("fastedit playground", "gradio", "matplotlib")
    if edits is not None and not edits.is_dir():
        raise typer.BadParameter(f"there is no folder {edits}", param_hint="--edits")
    loaded, tokenizer = load_model(model, **loading)
    from ..playground.page import serve
    from ..playground.session import Session

    try:
        session = Session(loaded, tokenizer, edits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        serve(session, Path(model).name, host, port)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--port") from None
