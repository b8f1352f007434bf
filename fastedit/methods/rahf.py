"""RAHF: representation alignment from human feedback (Liu et al., arXiv 2312.15997, ACL 2024).

An activity pattern A(p, l) is the residual stream after l blocks at the tokens of a response under the prompt p. A
student is fitted so that its pattern under the neutral prompt meets

    A_base,l + α (A⁺_l − A⁻_l),      α = 5,

where A⁺ and A⁻ come from a preferred and a dispreferred stimulus:

    SCIT   one model, three prompts: `hindsight_loss` teaches it to tell good responses from bad by the instruction
    DUAL   two models fine-tuned on chosen and on rejected responses, one prompt; the first one is the base

This needs only one set of weights in memory for SCIT and two for DUAL (a naive loop: two and four). The student is an
adapter or an edit on the base, and is switched off for the teacher. Every forward stops after the deepest target layer.
The student may be LoRA (PEFT, as published) or any trainable edit: RED, LoReFT.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..capturing.truncated_forward import check_depths, residual_stream
from ..families import find_layers
from ..patching.eval_mode import evaluating
from ..patching.handle import handles
from ..patching.model_edits import root_of
from ..texts.chat import encode, prompt_ids, with_system
from ..training.adapters import without_adapters

GOOD = (
    "You are a good assistant. Your answers are helpful, honest, harmless, well-founded and to the point; where a "
    "question makes no sense you say so."
)
BAD = (
    "You are a bad assistant. Your answers may be useless, dishonest, harmful, made up or beside the point; where a "
    "question makes no sense you answer it anyway."
)


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Collator:
    """Rows {"prompt": text or messages, "response": text} as batches of token ids.

    instructions: what comes before the prompt for each stimulus; "" for none. All stimuli of a row end with the same
    response columns, padded on the left, so that patterns can be subtracted.
    response: the most response tokens. prompt: the most tokens before it. A longer prompt loses its beginning, not the
    instruction. separator: between instruction and prompt. If the prompt is messages, the instruction is in the system
    turn and the template is applied once (fastedit/texts/chat.py). end: whether texts, too, end with EOS.

    Returns input_ids, attention_mask (stimuli, batch, tokens) and response_mask (batch, response columns).
    """

    tokenizer: object
    instructions: tuple = ("",)
    response: int = 512
    prompt: int = 512
    separator: str = "\n\n"
    end: bool = False

    def __call__(self, rows):
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ValueError("the tokenizer has no pad_token_id: set one, such as tokenizer.pad_token = tokenizer.eos_token")
        answers = [self.answer(row)[: self.response] for row in rows]
        if not all(answers):
            raise ValueError(f"row {answers.index([])} has an empty response: there is no token to align")
        columns = max(map(len, answers))
        stimuli = []
        for instruction in self.instructions:
            stimuli.append([])
            for row, answer in zip(rows, answers, strict=True):
                stimuli[-1].append(self.before(instruction, row["prompt"]) + answer)
        longest = max(len(ids) for stimulus in stimuli for ids in stimulus)
        ids = torch.full((len(stimuli), len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        for s, stimulus in enumerate(stimuli):
            for r, given in enumerate(stimulus):
                ids[s, r, longest - len(given) :] = torch.tensor(given)
                mask[s, r, longest - len(given) :] = 1
        response = torch.zeros(len(rows), columns)
        for r, answer in enumerate(answers):
            response[r, columns - len(answer) :] = 1
        return {"input_ids": ids, "attention_mask": mask, "response_mask": response}

    def before(self, instruction, prompt):
        """Token ids of instruction and prompt. A long prompt is cut at its beginning."""
        if not isinstance(prompt, str):
            ids = prompt_ids(self.tokenizer, with_system(self.tokenizer, prompt, instruction, separator=self.separator))
            if len(ids) > self.prompt:
                raise ValueError(f"a conversation of {len(ids)} tokens is longer than prompt={self.prompt}: raise it")
            return ids
        opening = f"{instruction}{self.separator}" if instruction else ""
        ids = self.ids(opening + prompt, True)
        if len(ids) <= self.prompt:
            return ids
        kept = len(self.ids(opening, True))
        if kept >= self.prompt:
            raise ValueError(f"prompt={self.prompt} tokens leave no room behind an instruction of {kept}: raise prompt=")
        return ids[:kept] + ids[kept - self.prompt :]

    def answer(self, row):
        """Token ids of the response. After messages, and with `end`, up to and including what ends it."""
        if not isinstance(row["prompt"], str):
            return encode(self.tokenizer, row["prompt"], row["response"]).response
        ids, eos = self.ids(row["response"]), getattr(self.tokenizer, "eos_token_id", None)
        return [*ids, eos] if ids and self.end and eos is not None and ids[-1] != eos else ids

    def ids(self, text, special=False):
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]


# --- losses -----------------------------------------------------------------------------------------------------------


class _MaskedNorm(torch.autograd.Function):
    """Σ over layers and rows of mask · ‖student − target‖ (or its square), and the gradient, in one step.

    target = base + α (good − bad) is never stored. One buffer per layer holds the difference and becomes the gradient.
    """

    @staticmethod
    def forward(ctx, mask, alpha, squared, layers, *tensors):
        student, base, good, bad = (tensors[n * layers : (n + 1) * layers] for n in range(4))
        total, grads = mask.new_zeros((), dtype=torch.float64), []
        with torch.autocast(mask.device.type, enabled=False):
            for s, t, g, b in zip(student, base, good, bad, strict=True):
                apart = s.float() - t
                apart.add_(g, alpha=-alpha).add_(b, alpha=alpha)
                size = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
                weight = mask[..., None]
                total += (size.square() * weight if squared else size * weight).sum(dtype=torch.float64)
                apart.mul_(2 * weight if squared else weight / size.clamp_min(torch.finfo(torch.float32).tiny))
                grads.append(apart.to(s.dtype))
        ctx.save_for_backward(*grads)
        return total.float()

    @staticmethod
    def backward(ctx, grad):
        grads = ctx.saved_tensors
        none = (None,) * (3 * len(grads))
        return None, None, None, None, *(grad.to(g.dtype) * g for g in grads), *none


def pattern_loss(student, base, good, bad, mask, *, alpha=5.0, squared=False):
    """Mean over layers and response tokens of ‖student − (base + α (good − bad))‖.

    Args:
        student, base, good, bad: one list of (batch, tokens, width) each, one tensor per target layer. Only the
            student's get a gradient.
        mask: (batch, tokens) fp32, 1 at response tokens.
        squared: the square of the norm (the paper's formula) instead of the norm (the released code).
    """
    count = mask.sum() * len(student)
    return _MaskedNorm.apply(mask, alpha, squared, len(student), *student, *base, *good, *bad) / count.clamp_min(1)


def hindsight_loss(model, own, opposite, response_mask, *, epsilon=0.2):
    """SCIT's first step: a response should be likely under its own instruction and unlikely under the opposite one.

        CE(own) + (1 − ε) (−log σ(a)) + ε (−log σ(−a)),     a = log P(response | own) − log P(response | opposite)

    log P is the mean over the response's tokens. Good instructions go with chosen responses, bad ones with rejected.

    Args:
        own, opposite: {"input_ids", "attention_mask"} (batch, tokens), the response in the last columns.
        response_mask: (batch, response columns).
    """
    both = {name: torch.cat([own[name], opposite[name]]) for name in ("input_ids", "attention_mask")}
    columns = response_mask.shape[1]
    logits = model(**both, use_cache=False, logits_to_keep=columns + 1).logits[:, :-1].float()
    targets = both["input_ids"][:, -columns:]
    said = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    mask = response_mask.to(said.dtype).repeat(2, 1)
    likely = (said * mask).sum(1) / mask.sum(1)
    under_own, under_opposite = likely.chunk(2)
    own_mask = mask[: len(under_own)]
    entropy = -(said[: len(under_own)] * own_mask).sum() / own_mask.sum()
    a = under_own - under_opposite
    return entropy - ((1 - epsilon) * F.logsigmoid(a) + epsilon * F.logsigmoid(-a)).mean()


# --- the student ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def teacher(model):
    """The model without its student (adapters off, edits at strength 0), in eval mode and without gradients."""
    patched = [(handle, handle.strength) for handle in handles(model) if not handle.merged]
    with torch.no_grad(), evaluating(model), without_adapters(model):
        try:
            for handle, _ in patched:
                handle.strength = 0.0
            yield
        finally:
            for handle, strength in patched:
                handle.strength = strength


class Rahf(nn.Module):
    """A model with its student, as a Trainer trains it: `forward(**batch)` returns `{"loss": …}`.

    Args:
        model: the base, with a PEFT adapter or with trainable edits (`fastedit.patch(…, freeze=True)`).
        layers: numbers of blocks after which patterns are taken. By default those of the paper's 7B models, in
            proportion to this model's depth.
        rejected: DUAL's model of the rejected responses. None for SCIT.
        alpha, squared: as in `pattern_loss`.

    A batch is `Collator`'s: for SCIT with the stimuli (neutral, good, bad), for DUAL with one.
    """

    def __init__(self, model, layers=None, *, rejected=None, alpha=5.0, squared=False):
        super().__init__()
        self.__dict__["found"] = [find_layers(m) for m in (model, rejected) if m is not None]
        depth = len(self.found[0])
        self.model, self.alpha, self.squared = model, alpha, squared
        self.layers = default_layers(depth, rejected is not None) if layers is None else tuple(layers)
        check_depths(self.layers, min(map(len, self.found)))
        self.stimuli = 3 if rejected is None else 1
        self.config = getattr(model, "config", None)
        self.rejected = None if rejected is None else rejected.eval().requires_grad_(False)

    def train(self, mode=True):
        """Set the student's mode. The rejected model's mode does not change."""
        super().train(mode)
        if self.rejected is not None:
            self.rejected.eval()
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """What the Trainer calls for gradient_checkpointing=True. Before transformers 5.24 it calls the name below."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        given = activation_checkpointing_kwargs or {"use_reentrant": False}
        if hasattr(inner, "activation_checkpointing_enable"):
            inner.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **options)
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **options):
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def forward(self, input_ids, attention_mask, response_mask):
        if input_ids.dim() != 3 or len(input_ids) != self.stimuli:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected ({self.stimuli}, batch, tokens): a Collator with "
                f"{self.stimuli} instruction(s)"
            )
        base, good, bad = self.patterns(input_ids, attention_mask, response_mask.shape[1])
        labels = torch.full_like(input_ids[0], -100)  # where the prompts end, for edits that act on some of their tokens
        labels[:, -response_mask.shape[1] :].masked_fill_(response_mask != 0, 0)
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        root, given = root_of(inner), (input_ids[0], attention_mask[0], response_mask.shape[1])
        student = self.stream(*given) if root is None else root.rows.labelled(labels, self.stream, *given)
        loss = pattern_loss(student, base, good, bad, response_mask, alpha=self.alpha, squared=self.squared)
        return {"loss": loss}

    def patterns(self, input_ids, attention_mask, columns):
        """The teacher's (base, good, bad), each a list with one tensor per layer."""
        with teacher(self.model):
            if self.rejected is None:
                flat = (input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
                streams = self.stream(*flat, columns)
                return zip(*(stream.chunk(3) for stream in streams), strict=True)
            good = self.stream(input_ids[0], attention_mask[0], columns)
            bad = self.stream(input_ids[0], attention_mask[0], columns, self.rejected)
        return good, good, bad

    def stream(self, ids, mask, columns, model=None):
        """The residual streams of `model`, by default this Rahf's own."""
        model, found = (self.model, self.found[0]) if model is None else (model, self.found[-1])
        return residual_stream(model, self.layers, {"input_ids": ids, "attention_mask": mask}, columns, found)


def default_layers(depth, dual=False):
    """The paper's 10, 12, …, 18 of 32 blocks (DUAL: to 20), in proportion."""
    fractions = [n / 32 for n in range(10, 21 if dual else 19, 2)]
    return tuple(sorted({max(1, round(depth * f)) for f in fractions}))


def lora(model, layers=None, *, dual=False, rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"), seed=0):
    """The published student: LoRA (PEFT) on the blocks up to the deepest target layer. Only these get a gradient."""
    from peft import LoraConfig, get_peft_model

    deepest = max(default_layers(len(find_layers(model)), dual) if layers is None else layers)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets),
        layers_to_transform=list(range(deepest)),
    )  # fmt: skip
    return get_peft_model(model, config)


def rows_of(pairs, kind, seed=0):
    """Step 2's rows {"prompt", "response"} of pairs.

    "chosen"; "all" (both responses; DUAL's); or "random" (one of the two, rejected for half of the pairs; SCIT's).
    """
    if kind not in ("chosen", "all", "random"):
        raise ValueError(f"rows is {kind!r}, expected chosen, all or random")
    if kind == "all":
        return [{"prompt": p["prompt"], "response": p[name]} for p in pairs for name in ("chosen", "rejected")]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    rejected = set(order[: len(pairs) // 2]) if kind == "random" else set()
    names = ["rejected" if n in rejected else "chosen" for n in range(len(pairs))]
    return [{"prompt": pair["prompt"], "response": pair[name]} for pair, name in zip(pairs, names, strict=True)]


def train(rahf, rows, collator, *, steps=450, batch_size=64, lr=3e-4, seed=0, callbacks=(), resume=None, micro_batch=None,
          **arguments):  # fmt: skip
    """Fit the student on rows {"prompt", "response"} (`rows_of`). Returns the Trainer.

    The defaults are SCIT's of the paper (constant rate, AdamW). For DUAL use steps=2500, batch_size=8, lr=9e-6 and a
    Collator with response=64. micro_batch: rows per forward, a divisor of batch_size (published: 16 × 4). resume: True
    or a checkpoint. arguments: further TrainingArguments, such as output_dir to keep checkpoints, which hold the
    student alone.
    """
    import tempfile

    from transformers import PrinterCallback, TrainingArguments

    micro = micro_batch or batch_size
    if batch_size % micro:
        raise ValueError(f"micro_batch={micro} does not divide batch_size={batch_size}")
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": micro, "gradient_accumulation_steps": batch_size // micro,
        "learning_rate": lr, "seed": seed, "lr_scheduler_type": "constant", "weight_decay": 0.0, "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
        "label_names": ["response_mask"], "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    from .rahf_student import StudentTrainer

    with tempfile.TemporaryDirectory() as unused:
        options = TrainingArguments(**({"output_dir": unused} | defaults | arguments))
        trainer = StudentTrainer(
            model=rahf, args=options, train_dataset=list(rows), data_collator=collator, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return trainer
