"""What the engine was told by `additional_config={"fastedit": {...}}` or the environment, completed once at the start.

    edits     folder of saved edits, one folder each; a request names one by its folder's name
    sites     where edits may act: some of mlp, attn, block. By default what the edits in the folder need
    rank      the largest rank of their low-rank parts. Default likewise
    gates     whether they may be behind gates (dot or cosine, by token). Default likewise
    capacity  slots: how many edits are in the tables at once. At least max_num_seqs, which is the default
    max_names how many names a request may list
    max_change  how much a request's edits may change typical rows (of root mean square 1), as a multiple of their
    length staging   where the front end keeps copies for the workers, which may read an edit after its removal

All of it is part of vLLM's configuration, whose hash names the compile cache, together with this plugin's version.
"""

import json
import logging
import os
import sys
from pathlib import Path

from .. import __version__
from ..arguments import MAX_RANK
from .admission import MAX_CHANGE, MAX_NAMES
from .contents import SITES, EditFileError, read_contents

KEY = "fastedit"
_KNOWN = {"edits", "sites", "rank", "gates", "capacity", "max_names", "max_change", "staging"}

logger = logging.getLogger("vllm.fastedit")


def asked(additional_config):
    """The options as given, or None if nobody asked for edits: {"fastedit": {…}}, else FASTEDIT_EDITS."""
    given = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if given is None and os.environ.get("FASTEDIT_EDITS"):
        given = {"edits": os.environ["FASTEDIT_EDITS"]}
    return given


def resolve(given, vllm_config):
    """Every option, checked, with the model's width and depth and our version.

    Raises:
        ValueError: an unknown option or one that makes no sense, by name.
    """
    if not isinstance(given, dict) or not isinstance(given.get("edits"), (str, Path)):
        raise ValueError(f'additional_config["{KEY}"] is {given!r}, expected {{"edits": "folder of saved edits", …}}')
    unknown = sorted(set(given) - _KNOWN - {"version", "width", "depth"})
    if unknown:
        raise ValueError(f"fastedit has no option {unknown[0]!r}; its options are {', '.join(sorted(_KNOWN))}")
    _refuse(vllm_config)
    folder = Path(given["edits"]).absolute()
    if not folder.is_dir():
        raise ValueError(f"there is no folder of edits {folder}: make it, even if it is still empty")
    text = vllm_config.model_config.hf_text_config
    width, depth = vllm_config.model_config.get_hidden_size(), text.num_hidden_layers
    sites, rank, gates = (given.get(key) for key in ("sites", "rank", "gates"))
    if sites is None or rank is None or gates is None:
        needed = _needed(folder, width, depth)
        sites, rank, gates = (n if own is None else own for own, n in zip((sites, rank, gates), needed, strict=True))
    if not isinstance(gates, bool):
        raise ValueError(f"fastedit: gates is {gates!r}, expected whether edits may be behind gates, true or false")
    sequences = vllm_config.scheduler_config.max_num_seqs
    capacity = _whole("capacity", given.get("capacity", sequences), 1)
    return {
        "version": __version__, "edits": str(folder), "sites": _sites(sites), "rank": _whole("rank", rank, 0, MAX_RANK),
        "gates": gates, "capacity": max(capacity, sequences),
        "max_names": _whole("max_names", given.get("max_names", MAX_NAMES), 1),
        "max_change": _change(given.get("max_change", MAX_CHANGE)), "staging": str(given.get("staging", folder / ".served")),
        "width": width, "depth": depth,
    }  # fmt: skip


def _refuse(vllm_config):
    """Refuse engines that run a layer on other rows than the step's, or in another order."""
    parallel = vllm_config.parallel_config
    wrong = {
        "dual batch overlap (--enable-dbo)": getattr(parallel, "num_ubatches", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-sharing-fast-prefill": getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False),
    }
    for name, on in wrong.items():
        if on:
            raise ValueError(f"fastedit does not serve edits under {name}: a layer then sees only some of the step's tokens")


def _needed(folder, width, depth):
    """(sites, rank, gates) of the edits in the folder now. All sites if it is empty."""
    sites, rank, gates = set(), 0, False
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            contents = read_contents(path, width, depth)
        except EditFileError as error:  # one edit in the folder must not keep others from being served
            logger.warning("fastedit: left out of what this server is made for: %s", error)
            continue
        sites |= contents.sites
        rank, gates = max(rank, contents.rank), gates or bool(contents.gates)
    return sorted(sites, key=SITES.index) or list(SITES), rank, gates


def _sites(sites):
    if not isinstance(sites, (list, tuple)) or not sites or not set(sites) <= set(SITES):
        raise ValueError(f"fastedit: sites is {sites!r}, expected some of {', '.join(SITES)}")
    return sorted(set(sites), key=SITES.index)


def _whole(name, number, least, most=None):
    wrong = isinstance(number, bool) or not isinstance(number, int) or number < least or (most and number > most)
    if wrong:
        up = "on" if most is None else f"to {most}"
        raise ValueError(f"fastedit: {name} is {number!r}, expected a whole number from {least} {up}")
    return number


def _change(number):
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= sys.float_info.max:
        raise ValueError(f"fastedit: max_change is {number!r:.60}, expected a positive number")
    return float(number)


def described(resolved):
    """One line for the log."""
    return json.dumps({key: resolved[key] for key in ("edits", "sites", "rank", "gates", "capacity", "max_names", "max_change")})
