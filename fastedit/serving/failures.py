"""A request that fails in a worker ends alone, with an error that names its edit, and leaves nothing behind for others.

Two things can fail: an edit makes hidden states NaN or infinite, or it cannot be put into the tables.

1. Once per step, the worker looks at the rows of edited requests (`Looks`) and writes the result on the step's output.
2. The scheduler (`around_update`) drops the blocks of a failed request from the prefix cache and ends the request.
3. The worker makes those blocks finite before any other request gets them (`clean`). If a block holds NaN at a masked
   place, attention still gives NaN, because 0 · NaN is NaN.
"""

import copy
import functools
import logging
import threading

import torch

from .admission import NAME, STRENGTH

logger = logging.getLogger("vllm.fastedit")
FAILED = "fastedit_failed"  # on a ModelRunnerOutput: {request id: message}
SAID = "fastedit: "  # how the messages begin, in a finished output's stop_reason


def named(extra_args):
    """A request's edit as its client named it."""
    strength = extra_args.get(STRENGTH, 1.0)
    return f"edit {extra_args.get(NAME)!r:.200} at strength {strength!r:.200}"


class Look:
    """Which rows of a step are finite. On a GPU it is copied after the step, and read when the step's tokens are."""

    def __init__(self, hidden, req_ids, counts):
        self.req_ids, self.counts = req_ids, counts
        largest = hidden.abs().amax(-1)  # NaN stays NaN here
        finite = largest.isfinite()
        self.event = None
        if finite.is_cuda:
            finite, device = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True), finite
            self.event = torch.cuda.current_stream(device.device).record_event()
        self.finite = finite

    @property
    def known(self):
        return self.event is None or self.event.query()

    def bad(self):
        """The requests with a row that is not finite. Waits for the step."""
        if self.event is not None:
            self.event.synchronize()
        if bool(self.finite.all()):
            return []
        parts = self.finite[: sum(self.counts)].split(self.counts)
        return [req_id for req_id, rows in zip(self.req_ids, parts, strict=True) if not bool(rows.all())]


class Looks:
    """What a worker knows about its edited requests: their names, their blocks, the last look at each.

    failed: {request id: message} of those that fail in this step.
    """

    def __init__(self, runner):
        self.runner = runner
        self.names, self.blocks, self.last = {}, {}, {}
        self.failed, self.lock = {}, threading.Lock()  # a GPU's output is read in a thread of its own

    def admit(self, new, extra_args):
        self.names[new.req_id] = named(extra_args)
        self.blocks[new.req_id] = {block for group in new.block_ids for block in group}

    def fail(self, req_id, message):
        with self.lock:
            self.failed[req_id] = f"{SAID}{self.names.get(req_id, 'its edit')} {message}"

    def follow(self, scheduler_output):
        """Clean up after requests that have left, and note the blocks that the others were given."""
        gone = set(scheduler_output.finished_req_ids)
        left = gone | set(getattr(scheduler_output, "preempted_req_ids", None) or ())
        left &= self.blocks.keys()
        dirty = {block for req_id in left if self._dirty(req_id) for block in self.blocks[req_id]}
        if dirty:
            clean(self.runner, dirty)
        for req_id in left:
            self.blocks[req_id] = set()
        for req_id in gone:
            for known in (self.names, self.blocks, self.last):
                known.pop(req_id, None)
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None and req_id in self.blocks:
                self.blocks[req_id] |= {block for group in new for block in group}

    def _dirty(self, req_id):
        """Whether its blocks may hold non-finite values: a look saw some, or there was no look, or it is not read
        yet."""
        look = self.last.get(req_id)
        return look is None or not look.known or req_id in look.bad()

    def look(self, hidden, req_ids, counts):
        """After a forward with edited rows. Returns the function that says what failed once the step is over."""
        look = None
        if isinstance(hidden, torch.Tensor):
            look = Look(hidden[: sum(counts)], req_ids, counts)
            for req_id in req_ids:
                if req_id in self.names:
                    self.last[req_id] = look
        with self.lock:
            failed, self.failed = self.failed, {}
        names = {req_id: self.names[req_id] for req_id in req_ids if req_id in self.names}

        def found():
            if look is not None:
                for req_id in look.bad():
                    if req_id in names:
                        failed.setdefault(
                            req_id, f"{SAID}{names[req_id]} made hidden states that are NaN or infinite; lower the strength"
                        )
            return failed

        return found


def mark(output, found):
    """A step's output, marked with what failed in it. An output that is read later is marked when it is read."""
    if hasattr(output, "get_output"):
        return _later()(output, found)
    failed = found()
    if failed and output is not None:
        output = copy.copy(output)  # vLLM has an empty one that all steps share
        setattr(output, FAILED, failed)
    return output


@functools.cache
def _later():
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class Marked(AsyncModelRunnerOutput):
        def __init__(self, output, found):
            self.output, self.found = output, found

        def get_output(self):
            return mark(self.output.get_output(), self.found)

    return Marked


def clean(runner, blocks):
    """Make the contents of these blocks finite, in every cache of this worker. Finite values, which others may share,
    stay."""
    number = runner.kv_cache_config.num_blocks
    for cache in _tensors(runner.kv_caches):
        where = [dim for dim in range(min(2, cache.dim())) if cache.shape[dim] == number]
        if len(where) != 1 or cache.dtype == torch.uint8:  # laid out otherwise, or quantized as bytes: all of it
            _finite(cache, runner)
            continue
        index = torch.tensor(sorted(blocks), device=cache.device)
        part = cache.index_select(where[0], index)
        if not bool(part.isfinite().all()):
            cache.index_copy_(where[0], index, part.nan_to_num_(0.0, 0.0, 0.0))


def _finite(cache, runner):
    if cache.dtype == torch.uint8:
        said = str(runner.cache_config.cache_dtype)
        kind = torch.float8_e5m2 if "e5m2" in said else torch.float8_e4m3fn
        bad = ~cache.view(kind).float().isfinite()
        cache.masked_fill_(bad, 0)
    elif cache.is_floating_point():
        cache.nan_to_num_(0.0, 0.0, 0.0)


def _tensors(caches):
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            yield cache
        elif isinstance(cache, (list, tuple)):
            yield from _tensors(cache)


# --- in the scheduler's process -----------------------------------------------------------------------------------


def around_update(update):
    """Scheduler.update_from_output, which also ends the requests that the workers reported as failed."""

    def update_from_output(self, scheduler_output, output):
        failed = getattr(output, FAILED, None)
        if not failed:
            return update(self, scheduler_output, output)
        ended = _end(self, failed)
        outputs = update(self, scheduler_output, output)
        return _with_errors(outputs, ended)

    return update_from_output


def _end(scheduler, failed):
    """[(Request, message)] of what was ended: the failed, and those that were given their blocks from the prefix
    cache."""
    from vllm.v1.request import RequestStatus

    messages, blocks, salts = dict(failed), set(), set()
    for req_id in failed:
        request = scheduler.requests.get(req_id)
        if request is None or request.is_finished():
            continue
        blocks |= _blocks(scheduler, req_id)
        salts.add(request.cache_salt)
    for request in scheduler.running:  # under the same edit, on blocks that were not made under it
        if request.cache_salt in salts and request.request_id not in messages and blocks & _blocks(scheduler, request.request_id):
            messages[request.request_id] = next(iter(failed.values()))
            blocks |= _blocks(scheduler, request.request_id)
    scheduler.kv_cache_manager.evict_blocks(blocks)
    ended = scheduler.finish_requests(set(messages), RequestStatus.FINISHED_ERROR)
    for request in ended:
        logger.warning("request %s ended: %s", request.request_id, messages[request.request_id])
    return [(request, messages[request.request_id]) for request in ended]


def _blocks(scheduler, req_id):
    return {block for group in scheduler.kv_cache_manager.get_block_ids(req_id) for block in group}


def _with_errors(outputs, ended):
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request, message in ended:
        there = outputs.get(request.client_index)
        if there is None:
            there = outputs[request.client_index] = EngineCoreOutputs()
        there.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason(),
                stop_reason=message, events=request.take_events(), trace_headers=request.trace_headers,
            )
        )
    return outputs
