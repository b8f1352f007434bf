"""A request's edit, at the front end: names become what they mean now, or the request is refused.

    SamplingParams(extra_args={"fastedit": "anna", "fastedit_strength": 1.0})     vllm_xargs over HTTP

A list of names is a stack, applied in order; fastedit_strength is then one number for all or one each. What goes on to
the workers is a plan, [[digest, strength], …]: the names are not looked at again, so an edit that is replaced or removed
meanwhile stays what it was for the requests that were let in under it.
"""

import contextlib
import math
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from ..edit_file import JSON, EditFileError, write
from ..stacks import check_gates, check_positions, steepest
from .contents import read_contents

NAME, STRENGTH, PLAN = "fastedit", "fastedit_strength", "fastedit_plan"
_SOUND_NAME = re.compile(r"[A-Za-z0-9_][\w.@+-]*")
_KEPT_SECONDS = 24 * 3600


class Refused(ValueError):
    """A request that asks for an edit that cannot be had; the others are not touched."""


def wanted(extra_args):
    """[(name, strength), …] of a request's extra arguments; empty where it asks for none.

    Raises:
        Refused: what was expected, and what was found.
    """
    named, strength = extra_args.get(NAME), extra_args.get(STRENGTH, 1.0)
    unknown = [key for key in extra_args if key.startswith("fastedit") and key not in (NAME, STRENGTH)]
    if unknown:
        raise Refused(f"unknown argument {unknown[0]!r}; fastedit takes {NAME!r} and {STRENGTH!r}")
    if named is None:
        if STRENGTH in extra_args:
            raise Refused(f"{STRENGTH} is given without {NAME!r}, the name of the edit")
        return []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise Refused(f"{NAME} is {named!r:.80}, expected an edit's name, or a list of names")
    strengths = list(strength) if isinstance(strength, (list, tuple)) else [strength] * len(names)
    if len(strengths) != len(names):
        raise Refused(f"{STRENGTH} has {len(strengths)} numbers for {len(names)} edits, expected one, or one each")
    for number in strengths:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise Refused(f"{STRENGTH} is {number!r}, expected a finite number")
    return list(zip(names, map(float, strengths), strict=True))


class Library:
    """The folder of edits: what a name means now, checked against the model and the tables.

    Adding an edit is putting its folder there (handle.save does so in one step), removing it is taking it away.
    A name is looked up at each request, by one stat; a file is read when it is new or has changed.
    """

    def __init__(self, options):
        self.options, self.folder, self.staging = options, Path(options["edits"]), Path(options["staging"])
        self.known = {}  # name → (stamp, Contents)

    def plan(self, asked):
        """[[digest, strength], …] for [(name, strength), …]; edits at strength 0 are left out."""
        contents = [self.look(name) for name, _ in asked]
        named = [(name, one) for (name, _), one in zip(asked, contents, strict=True)]
        check_positions([(name, one.positions) for name, one in named], Refused)
        check_gates([(name, one.parts, one.gates) for name, one in named], Refused)
        kept = [(one, strength) for one, (_, strength) in zip(contents, asked, strict=True) if strength]
        self._check_rank([one for one, _ in kept], asked)
        for one, _ in kept:
            self._stage(one)
        return [[one.digest, strength] for one, strength in kept]

    def look(self, name):
        """The Contents that a name means now."""
        if not _SOUND_NAME.fullmatch(name):
            raise Refused(f"{name!r:.80} is not the name of an edit: letters, digits and _ . @ + - are")
        path = self.folder / name
        try:
            found = (path / JSON).stat()
        except OSError:
            self.known.pop(name, None)
            raise Refused(f"there is no edit {name!r} here") from None  # which there are is other tenants' business
        stamp = found.st_mtime_ns, found.st_ino, found.st_size
        known = self.known.get(name)
        if known is None or known[0] != stamp:
            known = self.known[name] = stamp, self._read(name, path)
        return known[1]

    def _read(self, name, path):
        try:
            contents = read_contents(path, self.options["width"], self.options["depth"])
        except EditFileError as error:
            raise Refused(f"edit {name!r} cannot be served: {error}") from None
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

    def _stage(self, contents):
        """A copy for the workers under the edit's digest: complete from the moment it is there, and young again."""
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
            raise Refused(f"the edit could not be kept for the workers in {self.staging} ({error}); see staging=") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def tidy(self):
        """Drop copies that no request has used for a day."""
        if not self.staging.is_dir():
            return
        for path in self.staging.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def salted(plan, salt):
    """The cache salt of a request under a plan: blocks computed under one edit are never reused under another."""
    said = ",".join(f"{digest}*{strength!r}" for digest, strength in plan)
    return f"fastedit:{said}" if salt is None else f"fastedit:{said}|{salt}"


def admit(request, library):
    """Give an EngineCoreRequest its plan and salt.

    library: None where the engine serves no edits: a request that asks for one is refused, not served without.
    """
    params = request.sampling_params
    given = getattr(params, "extra_args", None)
    if not given or not any(key.startswith("fastedit") for key in given):
        return
    asked = wanted(given)
    if not asked:
        return
    if library is None:
        raise Refused('this engine serves no edits: start it with additional_config={"fastedit": {"edits": folder}}')
    plan = library.plan(asked)
    if plan:
        params.extra_args = {**given, PLAN: plan}
        request.cache_salt = salted(plan, request.cache_salt)
