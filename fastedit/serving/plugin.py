"""The entry point `vllm.general_plugins`: what vLLM calls in each of its processes before anything else.

A few of vLLM's methods get a few lines around them. If nobody configured edits, those lines do nothing. A model's
layers are touched only in a worker whose configuration asks for edits.
"""

import asyncio
import functools
import importlib

_OURS = "_fastedit_around"


def register():
    """Called by vLLM, possibly several times in a process."""
    protocol = "vllm.entrypoints.openai.{}.protocol"
    for where, owner, name, around in (
        ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", _configured),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_device", _watched),
        ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", _admitted),
        ("vllm.v1.engine.async_llm", "AsyncLLM", "add_request", _prepared),
        ("vllm.v1.engine.async_llm", "AsyncLLM", "generate", _raised),
        ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output", _ended),
        (protocol.format("completion"), "CompletionRequest", "to_beam_search_params", _without_beams),
        (protocol.format("chat_completion"), "ChatCompletionRequest", "to_beam_search_params", _without_beams),
        (protocol.format("completion"), "CompletionRequest", "to_sampling_params", _in_its_place),
        (protocol.format("chat_completion"), "ChatCompletionRequest", "to_sampling_params", _in_its_place),
        (protocol.format("responses"), "ResponsesRequest", "to_sampling_params", _in_its_place),
    ):
        _put_around(getattr(importlib.import_module(where), owner), name, around)


def _put_around(owner, name, around):
    method = owner.__dict__[name]
    if not hasattr(method, _OURS):
        wrapped = functools.wraps(method)(around(method))
        setattr(wrapped, _OURS, True)
        setattr(owner, name, wrapped)


def _configured(create):
    """The front end makes vLLM's configuration: our options are completed in it, before anything is hashed."""

    def create_engine_config(self, *args, **kwargs):
        config = create(self, *args, **kwargs)
        from . import options

        given = options.asked(config.additional_config)
        if given is not None:
            config.additional_config = {**config.additional_config, options.KEY: options.resolve(given, config)}
        return config

    return create_engine_config


def _watched(init_device):
    """A worker has its device, and with it the model runner that will load the model."""

    def wrapped(self):
        init_device(self)
        given = _options(self.vllm_config)
        if given is not None:
            from .runner import watch

            watch(self.worker.model_runner, given)

    return wrapped


def _admitted(process):
    """The front end has a whole request: its edit is looked up, or the request is refused as vLLM refuses others (HTTP
    400)."""

    def process_inputs(self, *args, **kwargs):
        request = process(self, *args, **kwargs)
        given = getattr(request.sampling_params, "extra_args", None)
        if given and _meant(given):
            _admit(self, request)
        return request

    return process_inputs


def _meant(extra_args):
    from .admission import meant

    return meant(extra_args)


def _library(processor):
    from .admission import Library

    if not hasattr(processor, "fastedit_library"):
        options = _options(processor.vllm_config)
        library = None if options is None else Library(options)
        if library is not None:
            library.tidy()
        processor.fastedit_library = library
    return processor.fastedit_library


def _admit(processor, request):
    from .admission import Refused, admit

    try:
        admit(request, _library(processor))
    except Refused as error:
        raise _refusal()(str(error), parameter="fastedit") from None


def _prepared(add):
    """The server's event loop waits for no file: a new edit is read in a thread before it is looked up."""

    async def add_request(self, request_id, prompt, params, *args, **kwargs):
        given = getattr(params, "extra_args", None)
        if given and _meant(given) and _options(self.vllm_config) is not None:
            await asyncio.to_thread(_library(self.input_processor).prepare, given)
        return await add(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _raised(generate):
    """A request that our edit ended is an error for its client, by the edit's name. vLLM itself says "Internal server
    error"."""

    async def generated(self, *args, **kwargs):
        async for output in generate(self, *args, **kwargs):
            for one in getattr(output, "outputs", ()):
                if one.finish_reason == "error" and str(one.stop_reason).startswith("fastedit: "):
                    raise _refusal()(one.stop_reason.removeprefix("fastedit: "), parameter="fastedit")
            yield output

    return generated


def _without_beams(make):
    """vLLM's beam search makes requests of its own, without a request's vllm_xargs."""

    def to_beam_search_params(self, *args, **kwargs):
        for key in _meant(self.vllm_xargs) + _meant(self.model_extra):
            raise _refusal()(f"{key}: beam search drops what a request says in vllm_xargs, so no edit is served with it")
        return make(self, *args, **kwargs)

    return to_beam_search_params


def _in_its_place(make):
    """vLLM ignores unknown keys: an edit beside vllm_xargs would be answered unedited."""

    def to_sampling_params(self, *args, **kwargs):
        for key in _meant(self.model_extra):
            raise _refusal()(f"{key} stands beside the request's own keys, where vLLM does not read it: put it into vllm_xargs")
        return make(self, *args, **kwargs)

    return to_sampling_params


def _ended(update):
    from .failures import around_update

    return around_update(update)


@functools.cache
def _refusal():
    """vLLM's own error for a bad request, which its server answers with status 400. For Python it is also a
    ValueError."""
    from vllm.exceptions import VLLMValidationError

    return type("EditRefused", (VLLMValidationError, ValueError), {})


def _options(vllm_config):
    additional = vllm_config.additional_config
    return additional.get("fastedit") if isinstance(additional, dict) else None
