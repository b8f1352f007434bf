"""A request's edit, at the front end: names become their present edits, or the request is refused.

    SamplingParams(extra_args={"fastedit": "anna", "fastedit_strength": 1.0})     vllm_xargs over HTTP

A list of names is a stack, applied in order. fastedit_strength is then one number for all or one each. The workers get
a plan, [[digest, strength], …]. They never look at names again. So if an edit is replaced or removed, requests that
were accepted before keep the old one.

What a request says is checked before anything is looked up: how many names, what kind of numbers. The strengths are
then bounded by what they would make of typical rows (`Contents.rates`).
"""

import contextlib
import difflib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from pathlib import Path

from ..arguments import FP32_MAX
from ..edits.stack import check_gates, check_positions, steepest
from ..files.edit_file import JSON, EditFileError, write
from .contents import read_contents

NAME, STRENGTH, PLAN = "fastedit", "fastedit_strength", "fastedit_plan"
MAX_NAMES, MAX_CHANGE = 16, 1000.0  # the options' defaults
_SOUND_NAME = re.compile(r"[A-Za-z0-9_][\w.@+-]{0,254}")
_COPY = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{16}")  # what _stage makes
_COPIED = re.compile(r"edit\.json|edit\.safetensors|edit-[0-9a-f]{64}\.safetensors|\.edit-[0-9a-f]{16}\.tmp")
_KEPT_SECONDS = 24 * 3600

logger = logging.getLogger("vllm.fastedit")


class Refused(ValueError):
    """A request asks for an edit that cannot be served. Other requests are not affected."""


def meant(extra_args):
    """Keys that are ours or look like a misspelling: `fastedi`, `FastEdit`, `fast_edit`, `fastedit-strenght`."""
    return [key for key in extra_args or () if isinstance(key, str) and len(key) < 64 and _ours(key)]


def _ours(key):
    plain = re.sub(r"[^a-z0-9]", "", key.lower())
    return plain.startswith("fastedi") or difflib.SequenceMatcher(None, plain, NAME).ratio() >= 0.85


def wanted(extra_args, most=MAX_NAMES):
    """[(name, strength), …] of a request's extra arguments. Empty if it asks for none. most: names at once.

    Raises:
        Refused: what was expected, and what was found.
    """
    named, strength = extra_args.get(NAME), extra_args.get(STRENGTH, 1.0)
    unknown = [key for key in meant(extra_args) if key not in (NAME, STRENGTH)]
    if unknown:
        raise Refused(f"unknown argument {unknown[0]!r}; fastedit takes {NAME!r} and {STRENGTH!r}")
    for key, given in ((NAME, named), (STRENGTH, strength)):
        if isinstance(given, (list, tuple)) and len(given) > most:
            raise Refused(f"{key} is a list of {len(given)}, expected at most {most}")
    if named is None:
        if STRENGTH in extra_args:
            raise Refused(f"{STRENGTH} is given without {NAME!r}, the name of the edit")
        return []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise Refused(f"{NAME} is {named!r:.80}, expected an edit's name, or a list of names")
    strengths = list(strength) if isinstance(strength, (list, tuple)) else [strength] * len(names)
    if len(strengths) != len(names):
        raise Refused(f"{STRENGTH} has {len(strengths)} numbers for {len(names)} edits, expected one, or one each")
    for number in strengths:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= FP32_MAX:
            raise Refused(f"{STRENGTH} is {number!r:.40}, expected a finite number, which float32 holds")
    return list(zip(names, map(float, strengths), strict=True))


class Library:
    """The folder of edits: what a name means now, checked against the model and the tables.

    To add an edit, put its folder there (handle.save does so in one step). To remove it, take the folder away. A name
    is looked up at each request, by one stat. A file is read when it is new or has changed.
    """

    def __init__(self, options):
        self.options, self.folder, self.staging = options, Path(options["edits"]), Path(options["staging"])
        self.max_names, self.max_change = options.get("max_names", MAX_NAMES), options.get("max_change", MAX_CHANGE)
        self.known = {}  # name → (stamp, Contents, or why there are none)
        self.key, self.lock = secrets.token_bytes(32), threading.Lock()

    def prepare(self, extra_args):
        """Read and stage what a request names, so that `plan` only has to look it up. For a thread beside the event
        loop."""
        with contextlib.suppress(Refused):  # said by `plan`, which is asked next
            for name in dict.fromkeys(name for name, _ in wanted(extra_args, self.max_names)):
                self._stage(self.look(name))

    def plan(self, asked):
        """[[digest, strength], …] for [(name, strength), …]. Edits at strength 0 are left out."""
        contents = [self.look(name) for name, _ in asked]
        named = [(name, one) for (name, _), one in zip(asked, contents, strict=True)]
        check_positions([(name, one.positions) for name, one in named], Refused)
        check_gates([(name, one.parts, one.gates) for name, one in named], Refused)
        kept = [(one, strength) for one, (_, strength) in zip(contents, asked, strict=True) if strength]
        self._check_rank([one for one, _ in kept], asked)
        self._check_change(kept, asked)
        for one, _ in kept:
            self._stage(one)
        return [[one.digest, strength] for one, strength in kept]

    def look(self, name):
        """The Contents that a name means now."""
        if not _SOUND_NAME.fullmatch(name):
            raise Refused(f"{name!r:.80} is not a valid name of an edit: use letters, digits and _ . @ + -")
        path = self.folder / name
        try:
            found = (path / JSON).stat()
        except OSError:
            self.known.pop(name, None)
            raise Refused(f"there is no edit {name!r} here") from None  # which there are is other tenants' business
        stamp = found.st_mtime_ns, found.st_ino, found.st_size
        known = self.known.get(name)
        if known is None or known[0] != stamp:
            with self.lock:  # several requests at once for a new edit: one reads it
                known = self.known.get(name)
                if known is None or known[0] != stamp:
                    known = self.known[name] = stamp, self._found(name, path)
        if isinstance(known[1], Refused):
            raise Refused(str(known[1]))
        return known[1]

    def _found(self, name, path):
        try:
            return self._read(name, path)
        except Refused as error:
            return error

    def _read(self, name, path):
        try:
            contents = read_contents(path, self.options["width"], self.options["depth"])
        except EditFileError as error:  # without where the folder lies here
            said = str(error).replace(f"{path}{os.sep}", "").replace(str(path), "the edit")
            raise Refused(f"edit {name!r} cannot be served: {said}") from None
        extra = contents.sites - set(self.options["sites"])
        if extra:
            raise Refused(
                f"edit {name!r} acts at site {sorted(extra)[0]!r}, and this server was started for "
                f"{', '.join(self.options['sites'])}: start it with sites that hold it"
            )
        if contents.gates and not self.options["gates"]:
            raise Refused(f"edit {name!r} is behind a gate, and this server was started without: start it with gates")
        return contents

    def _check_rank(self, contents, asked):
        rank, _ = steepest([one.ranks for one in contents])
        if rank > self.options["rank"]:
            raise Refused(
                f"{' + '.join(name for name, _ in asked)} has rank {rank}, and this server was started for "
                f"rank {self.options['rank']} (ranks of a stack add up): start it with a larger one"
            )

    def _check_change(self, kept, asked):
        places = {}
        for one, strength in kept:
            for place, rates in one.rates.items():
                for rate in rates:
                    places[place] = places.get(place, 1.0) * (1 + abs(strength) * rate)
        place = max(places, key=places.get, default=None)
        if place is not None and not places[place] - 1 <= self.max_change:
            said = " + ".join(f"{name} at strength {strength:g}" for name, strength in asked)
            raise Refused(
                f"{said} would change typical rows at site {place[1]!r} of layer {place[0]} by {places[place] - 1:.3g} times "
                f"their own size, and this server lets at most {self.max_change:g}: lower the strength (option max_change)"
            )

    def _stage(self, contents):
        """A copy for the workers under the edit's digest. It is complete from the moment it appears, and its age starts
        again."""
        target = self.staging / contents.digest
        with contextlib.suppress(OSError):  # another user's cannot be touched, but read
            os.utime(target)
        if target.is_dir():
            return
        part = self.staging / f".{secrets.token_hex(8)}"
        try:
            write(part, contents.header, contents.tensors)
            with contextlib.suppress(OSError):  # another front end was first
                os.rename(part, target)
            if not target.is_dir():
                raise FileNotFoundError(f"no {target.name}")
        except OSError as error:
            logger.error("fastedit: an edit could not be kept for the workers in %s: %s; see staging=", self.staging, error)
            raise Refused("the edit could not be kept for the workers; the server's log says why") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def tidy(self):
        """Delete copies that no request has used for a day. Anything that this class did not make stays."""
        with contextlib.suppress(OSError):
            for path in self.staging.iterdir():
                with contextlib.suppress(OSError):
                    made = _COPY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
                    if made and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                        for file in path.iterdir():
                            if _COPIED.fullmatch(file.name):
                                file.unlink()
                        path.rmdir()  # which fails where anything else is in it

    def salted(self, plan, salt):
        """The cache salt of a request under a plan: blocks computed under one edit are never reused under another.

        It is keyed with random bytes of this process. No client can write one, so no client can read an edit's blocks
        or plant its own. The client's salt is part of it.
        """
        said = json.dumps([plan, salt]).encode()
        return "fastedit:" + hmac.new(self.key, said, hashlib.sha256).hexdigest()


def admit(request, library):
    """Give an EngineCoreRequest its plan and salt.

    library: None if the engine serves no edits. A request that asks for one is then refused, not served without it.
    """
    params = request.sampling_params
    given = getattr(params, "extra_args", None)
    if not meant(given):
        return
    asked = wanted(given, MAX_NAMES if library is None else library.max_names)
    if not asked:
        return
    if library is None:
        raise Refused('this engine serves no edits: start it with additional_config={"fastedit": {"edits": folder}}')
    plan = library.plan(asked)
    params.extra_args = {**given, PLAN: plan}
    if plan:
        request.cache_salt = library.salted(plan, request.cache_salt)
