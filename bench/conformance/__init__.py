"""Every model class that transformers registers, tiny and random, through `fastedit.verify`: right, refused or wrong.

    make conformance                          all classes that have no row in bench/results/conformance.csv yet
    python -m bench.conformance Bamba Lfm2    those whose names hold a word, said and not kept
    python -m bench.conformance --compile     torch.compile: a dozen classes by Inductor, the others traced and run eagerly, for
                                              time; rows of their own, in bench/results/conformance_compiled.csv

Two edits at once at `block` of every layer: one of all tokens, and one of the prompt's last and the generated tokens, which
depends on where the prompt ends; the first alone where the second is refused ("by token").

verdict: "right" where the forward is right and no mode is wrong; "refused" by an error that says why; "not built" where no
tiny model could be made of the class or its inputs are not known; "not run" after a crash or too long a time.
"""

import torch

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "vlm": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}  # fmt: skip
COMPILED = (
    "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM",
    "Qwen3_5ForCausalLM", "BambaForCausalLM", "OPTForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration",
    "ViTForImageClassification",
)  # fmt: skip
FIELDS = (
    "kind", "class", "verdict", "layers", "sites", "right", "refused", "left_out", "wrong", "difference", "note",
    "transformers", "torch", "backend",
)  # fmt: skip


def classes(kinds=KINDS):
    """[(kind, class name)], each class once, under the first kind that registers it."""
    from transformers.models.auto import modeling_auto

    found = {}
    for kind in kinds:
        for names in getattr(modeling_auto, KINDS[kind]).values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return [(kind, name) for name, kind in found.items()]


def backend_of(name):
    """What compiles a class."""
    return "inductor" if name in COMPILED else "eager"


def row_of(kind, name, backend=""):
    """A row that says nothing yet."""
    from transformers import __version__

    row = dict.fromkeys(FIELDS, "") | {"kind": kind, "class": name, "backend": backend}
    return row | {"transformers": __version__, "torch": torch.__version__.partition("+")[0]}


def measure(kind, name, backend=""):
    """The row of one class, {field: text}. backend: of torch.compile, for its mode alone; "" for all other modes."""
    import transformers

    from . import tiny

    row = row_of(kind, name, backend)
    try:
        model = tiny.build(getattr(transformers, name))
    except Exception as error:  # whatever a class does with a config that is tiny
        return row | {"verdict": "not built", "note": _short(error)}
    return row | checked(model, backend)


def checked(model, backend=""):
    """What a row says of a model."""
    import fastedit as fe
    from fastedit.families import find_layers

    layers, token = "", {"positions": "last 1 + generated"}
    try:
        found = find_layers(model)
        layers, sites = len(found), [s for s in ("attn", "mlp") if all(layer.at(s) is not None for layer in found)]
        both = [fe.ScaleBias(False, site="block"), fe.ScaleBias(False, site="block", **token)]
        outcome = fe.verify(model, both, modes=_modes(model, backend), new_tokens=2, backend=backend)
        refused = next((row.note for row in outcome.rows if row.mode == "patch"), "")
        whole = "compile" if backend else "forward"
        refused = refused or next((row.note for row in outcome.rows if row.mode == whole and row.verdict == "refused"), "")
        if refused:  # what must know which row is which token; an edit of all tokens may still be served
            outcome = fe.verify(model, both[:1], modes=_modes(model, backend), new_tokens=2, backend=backend)
    except Exception as error:  # an edit's refusal, or whatever a model's own code may raise
        built = {"verdict": "not built"} if layers else {"verdict": "refused"}
        return built | {"layers": layers, "note": _short(error)}
    said = {row.mode: row for row in outcome.rows}
    differences = [row.difference for row in outcome.rows if row.verdict == "right" and row.difference]
    by = {v: [m for m, row in said.items() if row.verdict == v] for v in ("right", "refused", "left out", "wrong")}
    whole = said.get(whole)
    if set(by["wrong"]) == {"layers"} and whole is not None and whole.verdict == "left out":  # a number that nothing bears out
        by["left out"], by["wrong"] = ["layers", *by["left out"]], []
    verdict = "wrong" if by["wrong"] else "refused" if whole is None or whole.verdict == "refused" else whole.verdict
    verdict = "not built" if verdict == "left out" else verdict
    refused = [f"by token: {refused}"] if refused else []
    by["refused"] += ["by token"] if refused else []
    notes = refused + [f"{m}: {said[m].note}" for v in ("wrong", "refused", "left out") for m in by[v] if m in said]
    return {
        "verdict": verdict, "layers": layers, "sites": " ".join(["block", *sites]), "right": "; ".join(by["right"]),
        "refused": "; ".join(by["refused"]), "left_out": "; ".join(by["left out"]), "wrong": "; ".join(by["wrong"]),
        "difference": f"{max(differences, default=0.0):.1e}", "note": _short(notes[0] if notes else ""),
    }  # fmt: skip


def _modes(model, backend):
    from fastedit.verifying.modes import named

    return ["compile"] if backend else [mode for mode in named(None, model) if mode != "compile"]


def _short(said):
    text = f"{type(said).__name__}: {said}" if isinstance(said, Exception) else said
    return " ".join(text.split())[:160]
