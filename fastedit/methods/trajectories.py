"""What RE-Control learns from: the state behind each generated token, and a reward for each response.

    trajectories = collect(model, tokenizer, prompts, reward)
    collect(model, tokenizer, prompts, reward, folder="states", part=(rank, processes))     # each process its share
    trajectories = Trajectories.load("states")

States are those of `final`, what the LM head reads, at the position that predicts each generated token (arXiv
2406.05954). They are stored one after another without padding. `lengths` says how many each response has.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..edits.kinds import Edit
from ..families import find_layers
from ..files.edit_file import EditFileError, replace
from ..files.sealed import VERSION, open_json, open_tensors, parse_json, read_regular, seal_json, seal_tensors
from ..patching.eval_mode import evaluating
from ..patching.layer_plan import choose
from ..patching.model_edits import root_of
from ..patching.site_kinds import watch
from ..texts.chat import prompt_ids
from .replies import left_padded, plain

_FORMAT = "fastedit trajectories 1"
_PLAN = "collection.json"  # of a folder of shards: what was asked for, and how many shards there are to be
logger = logging.getLogger("fastedit")


@dataclass(repr=False)
class Trajectories:
    """n responses. states: (sum of lengths, width), in the model's dtype. lengths: (n,) int64. rewards: (n,) fp32, or
    (n, outputs) of a reward that gives several numbers.

    prompts, responses: their texts; a prompt may be a list of messages. [] if unknown.

    Raises:
        TypeError, ValueError: shapes that do not fit together, a response without a state, a reward that is not finite.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    prompts: list = field(default_factory=list)
    responses: list = field(default_factory=list)

    def __repr__(self):
        return f"Trajectories({len(self)} responses, {len(self.states)} states of width {self.width})"

    def __post_init__(self):
        if self.states.dim() != 2 or not self.states.is_floating_point():
            raise TypeError(f"states is {self.states.dtype} {tuple(self.states.shape)}, expected floating (steps, width)")
        if self.lengths.dim() != 1 or self.lengths.dtype is not torch.int64 or (
            self.rewards.dim() not in (1, 2) or self.rewards.shape[:1] != self.lengths.shape
        ):
            raise ValueError(
                f"lengths is {self.lengths.dtype} {tuple(self.lengths.shape)} and rewards {tuple(self.rewards.shape)}, "
                "expected int64 (responses,) and one reward each, or (responses, outputs)"
            )
        if not len(self.lengths) or int(self.lengths.min()) < 1 or int(self.lengths.sum()) != len(self.states):
            raise ValueError(f"lengths sum to {int(self.lengths.sum())}, each from 1 on, for {len(self.states)} states")
        if not self.rewards.isfinite().all():
            raise ValueError(f"reward {int((~self.rewards.isfinite()).nonzero()[0])} is not a finite number")

    def __len__(self):
        return len(self.lengths)

    @property
    def width(self):
        return self.states.shape[1]

    def save(self, path):
        """Write one safetensors file, in one step that survives a crash."""
        tensors = {name: getattr(self, name).contiguous() for name in ("states", "lengths", "rewards")}
        texts = {"prompts": json.dumps(self.prompts), "responses": json.dumps(self.responses)}
        replace(Path(path), seal_tensors(tensors, {"format": _FORMAT, **texts}))

    @classmethod
    def load(cls, path):
        """What `save` wrote, or all shards of a folder of `collect`. EditFileError for any other file, or a missing
        shard."""
        if Path(path).is_dir():
            return cls._of_shards(Path(path))
        try:
            note, tensors, version = open_tensors(read_regular(path, 64 << 30), ("format", "prompts", "responses"))
            if note["format"] != _FORMAT:
                raise ValueError(f"its format is {note['format']!r:.60}, expected {_FORMAT!r}")
            loaded = cls(
                *(tensors[name] for name in ("states", "lengths", "rewards")),
                *(parse_json(note[name]) for name in ("prompts", "responses")),
            )  # fmt: skip
        except OSError as error:
            raise EditFileError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise EditFileError(f"{path} holds no trajectories: {error}") from error
        if version == 1:
            logger.warning("fastedit: %s is of format version 1, which has no checksum; save it again for one", path)
        return loaded

    @classmethod
    def _of_shards(cls, folder):
        count = _plan(folder)["shards"]
        missing = [n for n in range(count) if not shard(folder, n).is_file()]
        if missing:
            first = shard(folder, missing[0]).name
            raise EditFileError(f"{folder} lacks {len(missing)} of {count} shards, {first} first: collect again")
        return cls.joined([cls.load(shard(folder, n)) for n in range(count)])

    @classmethod
    def joined(cls, parts):
        """Several trajectories as one."""
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in ("states", "lengths", "rewards"))
        texts = ([*itertools.chain(*(getattr(part, name) for part in parts))] for name in ("prompts", "responses"))
        return cls(*tensors, *texts)


def collect(
    model, tokenizer, prompts, reward, *, samples=1, max_new_tokens=64, temperature=1.0, top_p=1.0, batch_size=16, seed=0,
    dtype=None, progress=None, folder=None, part=(0, 1), **options,
):  # fmt: skip
    """Generate responses and keep, for every generated token, the state that predicted it.

    The model generates in eval mode, with the edits on it, and is left as it was. The same seed, prompts and batch size
    give the same trajectories, whether in one run, resumed or by several processes. The global random state is left as
    it was.

    Args:
        model, tokenizer: a causal language model and its tokenizer, which needs a padding token.
        prompts: texts, or lists of messages, which go through the tokenizer's chat template.
        reward: any function (prompts, responses) → one number each, or lists of as many numbers each. It is called with a
            batch of texts. For messages it gets the last one's text, or themselves if it has the attribute `takes_messages`.
        samples: responses per prompt. temperature: 0 for the likeliest token.
        dtype: of the kept states. By default the model's own.
        progress: called as progress(done, total), in responses, after each batch.
        folder: each finished batch is written there as a shard. Shards that are there are not made again. The result is
            what the folder holds, if that is complete; else None, because other processes are not done.
        part: (number, of how many): one of several processes, each with the same folder, and its share of the batches.
        options: further arguments of `generate`, such as top_k.

    Raises:
        TypeError, ValueError: no prompts, a reward that is not one finite number per response, decoding other than
        token by token (beams, assistants), or a model without `final`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(model, tokenizer, prompts, reward, samples, part)
    if folder is None and part != (0, 1):
        raise ValueError("part needs a folder: several processes write their shards there")
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "num_return_sequences": samples}
    else:
        options |= {"do_sample": False}
    options["max_new_tokens"] = max_new_tokens
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    found, total = [], len(prompts) * samples
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    if folder is not None:
        given = repr((samples, dtype, sorted(options.items())))
        asked = {"prompts": prompts, "batch_size": batch_size, "seed": seed, "options": given}
        _begin(Path(folder), asked, len(batches))
    with torch.random.fork_rng(devices), evaluating(model):
        for number, batch in enumerate(batches):
            done = folder is not None and shard(folder, number).is_file()
            if number % part[1] == part[0] and not done:
                torch.manual_seed(seed * 1_000_003 + number)  # a batch does not depend on those before it
                made = Trajectories(*_of_batch(model, tokenizer, batch, samples, reward, dtype, options))
                found.append(made) if folder is None else made.save(shard(folder, number))
            if progress is not None:
                progress(min(total, (number + 1) * batch_size * samples), total)
    if folder is None:
        return Trajectories.joined(found)
    return Trajectories.load(folder) if all(shard(folder, n).is_file() for n in range(len(batches))) else None


def shard(folder, number):
    """The path of a folder's shard."""
    return Path(folder) / f"states-{number:05d}.safetensors"


def _begin(folder, asked, shards):
    """Write a folder's plan, or check that it is this one."""
    plan = {"format": _FORMAT, "shards": shards, "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest()}
    if (folder / _PLAN).is_file():
        if _plan(folder) != plan:
            raise EditFileError(f"{folder} holds states collected for other prompts or settings: use another folder, or empty it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / _PLAN, seal_json({"version": VERSION, **plan}))


def _plan(folder):
    try:
        plan, version = open_json(read_regular(folder / _PLAN, 1 << 20), ("format", "shards", "asked"))
        if plan["format"] != _FORMAT or not isinstance(plan["shards"], int):
            raise ValueError(f"its format is {plan['format']!r}")
        if version == 1:
            logger.warning("fastedit: %s is of format version 1, which has no checksum", folder / _PLAN)
        return plan
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EditFileError(f"{folder} holds no shards of trajectories: {error}") from error


def _check(model, tokenizer, prompts, reward, samples, part):
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ValueError(f"part is {part!r}, expected (number, of how many), such as (0, 4)")
    if not prompts or not all(isinstance(prompt, (str, list, tuple)) for prompt in prompts):
        raise ValueError("prompts is empty or holds something else than texts and lists of messages")
    if not callable(reward):
        raise TypeError(f"reward is {reward!r}, expected a function (prompts, responses) → numbers")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples is {samples!r}, expected a whole number from 1 on")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, expected a causal language model")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad_token_id: set one, such as tokenizer.pad_token = tokenizer.eos_token")


def _of_batch(model, tokenizer, prompts, samples, reward, dtype, options):
    """(states, lengths, rewards, prompts, responses) of a few prompts."""
    samples = samples if options["do_sample"] else 1
    given = [prompt_ids(tokenizer, prompt, f"prompt {prompt!r:.60}") for prompt in prompts]
    ids, mask = (tensor.to(model.device) for tensor in left_padded(given, tokenizer.pad_token_id))
    with _states(model) as states:
        output = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **options)
    new = output[:, ids.shape[1] :]
    if len(states) != new.shape[1] or any(len(state) != len(new) for state in states):
        raise ValueError(
            f"{len(states)} forwards gave {new.shape[1]} tokens: trajectories need one token per forward for each sequence "
            "(no beams, assistants, prompt lookup or chunked prefill)"
        )
    lengths = _lengths(model, new, options)
    states = torch.stack(states, 1)  # (responses, steps, width)
    valid = torch.arange(new.shape[1], device=states.device) < lengths[:, None].to(states.device)
    states = states[valid].to("cpu", states.dtype if dtype is None else dtype)
    responses = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(new, lengths.tolist(), strict=True)]
    asked = [prompt for prompt in prompts for _ in range(samples)]
    return states, lengths, torch.tensor(rewards_of(reward, asked, responses), dtype=torch.float32), asked, responses


def rewards_of(reward, prompts, responses):
    """[number] of a reward function, checked; what it is given of messages is in `collect`."""
    as_they_are = getattr(reward, "takes_messages", False)
    found = reward(prompts if as_they_are else [plain(prompt) for prompt in prompts], responses)
    found = found.tolist() if isinstance(found, torch.Tensor) else list(found)
    rows = [r if isinstance(r, (list, tuple)) else [r] for r in found]
    numbers = all(isinstance(n, (int, float)) and math.isfinite(n) for row in rows for n in row)
    kinds = {len(r) if isinstance(r, (list, tuple)) else None for r in found}
    if len(found) != len(responses) or not numbers or len(kinds) != 1 or 0 in kinds:
        raise ValueError(
            f"reward gave {found!r:.80} for {len(responses)} responses, expected one finite number for each"
            " (or a list of them, as long for each)"
        )
    return found


def _lengths(model, new, options):
    """How many tokens of each row were generated: up to and including the first that ends a sequence."""
    config = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    steps = torch.full((len(new),), new.shape[1], dtype=torch.int64)
    if ends is None:
        return steps
    ends = torch.as_tensor(ends, device=new.device).reshape(-1)
    ended = torch.isin(new, ends).cpu()
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, steps)


@contextlib.contextmanager
def _states(model):
    """A list that receives, at each forward, the state of each row's last column (rows, width)."""
    root = root_of(model)
    layers = find_layers(model) if root is None else root.layers
    layer = choose(Edit((), site="final"), layers)[0]
    found = []
    hook = watch(layer, "final", lambda hidden: found.append(hidden[:, -1].detach().clone()))
    try:
        yield found
    finally:
        hook.remove()
