"""At work in a worker: a model runner is given tables, rows and places once its model is loaded.

Both of vLLM's runners are served through what they share: execute_model(scheduler_output), which says what is new and
what has ended, and the one method that lays out a step's tokens (`_prepare_inputs` of the first runner,
`prepare_inputs` of the second). After that the rows are filled.
"""

import functools
import logging

import numpy as np

from ..banks.tables import Tables
from . import layers
from .admission import NAME, PLAN
from .failures import Looks, mark
from .options import described
from .residency import Residency, Shelf
from .rows import Rows

logger = logging.getLogger("vllm.fastedit")


class Bank:
    """The resident edits of one worker, and what lets its layers see them."""

    def __init__(self, runner, options):
        config = runner.vllm_config
        sites = [(str(i), site, options["width"]) for i in range(options["depth"]) for site in options["sites"]]
        self.tables = Tables(sites, options["capacity"], options["rank"], runner.device, options["gates"])
        self.residency = Residency(self.tables, _Numbered(options))
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        tokens = max(config.scheduler_config.max_num_batched_tokens, captured, config.model_config.max_model_len)
        self.runner, self.looks, self.found = runner, Looks(runner), None
        self.rows = Rows(self.residency, config.scheduler_config.max_num_seqs, tokens, runner.device, self._failed)
        self.places = layers.attach(runner.get_model(), options["sites"], self.rows, self.tables)
        size = sum(table.nbytes for table in self.tables.buffers())
        logger.info("fastedit: %d places, tables of %.1f MB; %s", len(self.places), size / 1e6, described(options))

    def before(self, scheduler_output):
        """A step begins: which requests are new, which have ended."""
        layers.Serving.places = self.places
        self.looks.follow(scheduler_output)
        self.rows.forget(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            given = getattr(new.sampling_params, "extra_args", None)
            if given and given.get(NAME) is not None and given.get(PLAN) != []:
                self.looks.admit(new, given)
                self.rows.admit(new.req_id, given.get(PLAN), len(new.prompt_token_ids or ()))

    def after(self, state):
        """The step's forward is over: its rows are looked at if any was edited. state: the runner's, if it has one."""
        rows, self.found = self.rows, None
        if state is not None and rows.edited:
            self.found = self.looks.look(state.hidden_states, rows.req_ids, rows.counts.tolist())

    def output(self, output):
        """The step's output, with what failed in it."""
        found, self.found = self.found, None
        return output if found is None else mark(output, found)

    def _failed(self, req_id, error):
        logger.error("fastedit: the edit of request %s could not be put in place", req_id, exc_info=error)
        self.looks.fail(req_id, "could not be put in place in a worker; the server's log says why")

    def idle(self):
        layers.Serving.places = self.places
        self.rows.idle()


class _Numbered(Shelf):
    """The shelf, with the tables' names for layers."""

    def forms(self, key):
        return tuple({(str(index), site): one for (index, site), one in found.items()} for found in super().forms(key))


def watch(runner, options):
    """Give a model runner its bank when it has loaded its model. Changes this instance only."""
    load = runner.load_model

    @functools.wraps(load)
    def load_model(*args, **kwargs):
        loaded = load(*args, **kwargs)
        if not hasattr(runner, "fastedit"):
            runner.fastedit = Bank(runner, options)
            _follow(runner, runner.fastedit)
        return loaded

    runner.load_model = load_model


def _follow(runner, bank):
    execute, sample, dummy = runner.execute_model, runner.sample_tokens, runner._dummy_run

    @functools.wraps(execute)
    def execute_model(scheduler_output, *args, **kwargs):
        bank.before(scheduler_output)
        output = execute(scheduler_output, *args, **kwargs)
        bank.after(runner.execute_model_state)
        return output

    @functools.wraps(sample)
    def sample_tokens(*args, **kwargs):
        return bank.output(sample(*args, **kwargs))

    @functools.wraps(dummy)
    def dummy_run(*args, **kwargs):
        bank.idle()
        return dummy(*args, **kwargs)

    runner.execute_model, runner.sample_tokens, runner._dummy_run = execute_model, sample_tokens, dummy_run
    if hasattr(runner, "_prepare_inputs"):
        runner._prepare_inputs = _after_first(runner, bank, runner._prepare_inputs)
    else:
        runner.prepare_inputs = _after_second(bank, runner.prepare_inputs)


def _after_first(runner, bank, prepare):
    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output, counts, *args, **kwargs):
        prepared = prepare(scheduler_output, counts, *args, **kwargs)
        batch = runner.input_batch
        bank.rows.step(batch.req_ids[: batch.num_reqs], np.asarray(counts), batch.num_computed_tokens_cpu)
        return prepared

    return prepare_inputs


def _after_second(bank, prepare):
    @functools.wraps(prepare)
    def prepare_inputs(*args, **kwargs):
        batch = prepare(*args, **kwargs)
        bank.rows.step(list(batch.req_ids), batch.num_scheduled_tokens, batch.num_computed_tokens_np)
        return batch

    return prepare_inputs
