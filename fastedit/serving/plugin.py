"""The entry point `vllm.general_plugins`: what vLLM calls in each of its processes before anything else.

Three of vLLM's methods get a few lines around them. Where nobody configured edits those find that out and do nothing: a
model's layers are touched only in a worker whose configuration asks for edits.
"""

import functools
import importlib

_OURS = "_fastedit_around"


def register():
    """Called by vLLM, maybe several times in a process."""
    for where, owner, name, around in (
        ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", _configured),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_device", _watched),
        ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", _admitted),
    ):
        _put_around(getattr(importlib.import_module(where), owner), name, around)


def _put_around(owner, name, around):
    method = owner.__dict__[name]
    if not hasattr(method, _OURS):
        wrapped = functools.wraps(method)(around(method))
        setattr(wrapped, _OURS, True)
        setattr(owner, name, wrapped)


def _configured(create):
    """The front end makes vLLM's configuration: our options are made whole in it, before anything is hashed."""

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
    """The front end has a request whole: its edit is looked up, or it is refused as vLLM refuses others (HTTP 400)."""

    def process_inputs(self, *args, **kwargs):
        request = process(self, *args, **kwargs)
        given = getattr(request.sampling_params, "extra_args", None)
        if given and any(key.startswith("fastedit") for key in given):
            _admit(self, request)
        return request

    return process_inputs


def _admit(processor, request):
    from .admission import Library, Refused, admit

    if not hasattr(processor, "fastedit_library"):
        options = _options(processor.vllm_config)
        processor.fastedit_library = None if options is None else Library(options)
        if options is not None:
            processor.fastedit_library.tidy()
    try:
        admit(request, processor.fastedit_library)
    except Refused as error:
        raise _refusal()(str(error), parameter="fastedit") from None


@functools.cache
def _refusal():
    """vLLM's own error of a bad request, which its server answers with status 400; for Python a ValueError, too."""
    from vllm.exceptions import VLLMValidationError

    return type("EditRefused", (VLLMValidationError, ValueError), {})


def _options(vllm_config):
    additional = vllm_config.additional_config
    return additional.get("fastedit") if isinstance(additional, dict) else None
