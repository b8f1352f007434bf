"""RED trains under the Hugging Face Trainer and accelerate, and its checkpoints come back."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)  # fmt: skip

import fastedit as fe
from fastedit.recipes import EditTrainer, SentenceClassifier, load_head, load_trained, save_trained

WIDTH, DEPTH = 16, 2


def bert(dropout=0.1):
    torch.manual_seed(7)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=24,
        vocab_size=30, max_position_embeddings=16, hidden_dropout_prob=dropout, initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def data(rows=32):
    """Label 1 where the second token is an even number."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 30, (rows, 6), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[1] % 2 == 0).long()}
        for row in ids
    ]


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8, "num_train_epochs": 3,
        "learning_rate": 2e-2, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "seed": 1,
        "dataloader_pin_memory": False, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**(defaults | changes))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_plain_trainer_trains_the_edit_and_the_head_alone(tmp_path):
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    before = parameters(model)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=data()).train()
    changed = moved(before, parameters(model))
    assert changed == {name for name in before if "fastedit" in name or name.startswith(("classifier", "bert.pooler"))}
    assert len(changed) == 2 * DEPTH + 4
    assert handle.num_parameters() == 2 * WIDTH * DEPTH


def test_training_lowers_the_loss_of_what_a_frozen_head_cannot_learn(tmp_path):
    losses = {}
    for name in ("head", "red"):
        model = bert(dropout=0.0)
        handle = fe.patch(model, fe.RED(), freeze=True)
        if name == "head":
            handle.remove()
            for parameter in model.bert.parameters():
                parameter.requires_grad_(False)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, num_train_epochs=40, learning_rate=5e-2),
            train_dataset=data(),
            eval_dataset=data(),
        )
        trainer.train()
        losses[name] = trainer.evaluate()["eval_loss"]
    assert losses["red"] < 0.75 * losses["head"], losses


# --- fp32 masters in a low-precision model ------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "from_pretrained"])
def test_masters_stay_fp32_in_a_model_that_does_not(cast, tmp_path):
    model = bert()
    if cast == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        handle = fe.patch(model, fe.RED())
    else:
        handle = fe.patch(model, fe.RED())
        model.half() if cast == "half" else model.bfloat16() if cast == "bfloat16" else model.to(
            torch.bfloat16
        )
    assert model.bert.encoder.layer[0].output.dense.weight.dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["bf16 model", "bf16 autocast", "both"])
def test_scales_leave_one_in_bf16(tmp_path, mode):
    """At this learning rate no single step is visible at bf16's resolution around 1 (2^-8)."""
    model = bert()
    if mode != "bf16 autocast":
        model.to(torch.bfloat16)
    handle = fe.patch(model, fe.RED(), freeze=True)
    if mode == "both":
        model.to(torch.bfloat16)
    args = arguments(tmp_path, learning_rate=1e-4, bf16=mode != "bf16 model")
    Trainer(model=model, args=args, train_dataset=data()).train()
    scales = [t for name, t in handle.named_tensors().items() if name.endswith("scale")]
    assert len(scales) == DEPTH
    for scale in scales:
        assert scale.dtype == torch.float32
        assert (scale != 1).all(), "a scale did not move"
        assert (scale - 1).abs().max() < 2**-8, "the step is too large to show anything"


# --- accelerate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepare(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=8))
    before = handle.named_tensors()
    before = {name: t.clone() for name, t in before.items()}
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert moved(before, handle.named_tensors()) == set(before)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    unwrapped = accelerator.unwrap_model(model)
    handle.remove()
    assert not any("fastedit" in name for name in unwrapped.state_dict())
    AcceleratorState._reset_state(True)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        model = bert(dropout=0.0)
        handle = fe.patch(model, fe.RED(), freeze=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        batch = {key: torch.stack([row[key] for row in data(8)]) for key in data(1)[0]}
        model(**batch).loss.backward()
        gradients.append([p.grad for p in handle.parameters()])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients, strict=True))


# --- checkpoints --------------------------------------------------------------------------------------------


class Record(TrainerCallback):
    """What the parameters were at each save."""

    def __init__(self):
        self.at = {}

    def on_save(self, args, state, control, model=None, **_):
        self.at[state.global_step] = parameters(model)


def trainer_of(mode, model, handle, args, **others):
    if mode == "plain":
        return Trainer(model=model, args=args, train_dataset=data(), **others)
    return EditTrainer(handle=handle, checkpoints=mode, args=args, train_dataset=data(), **others)


def second_checkpoint_is_best():
    """A metric that peaks at the second evaluation, whatever the model does."""
    calls = iter([0.2, 0.9, 0.1])
    return lambda prediction: {"score": next(calls)}


@pytest.mark.parametrize("mode", ["plain", "edit", "model"])
def test_the_best_checkpoint_is_loaded_at_the_end_though_not_the_last(tmp_path, mode):
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    record = Record()
    args = arguments(
        tmp_path,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer = trainer_of(
        mode,
        model,
        handle,
        args,
        eval_dataset=data(8),
        compute_metrics=second_checkpoint_is_best(),
        callbacks=[record],
    )
    trainer.train()
    assert sorted(record.at) == [4, 8, 12] and trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    assert not same(record.at[8], record.at[12])
    assert same(parameters(model), record.at[8])


@pytest.mark.parametrize("mode", ["plain", "edit", "model"])
def test_resuming_ends_where_an_unbroken_run_ends(tmp_path, mode):
    def run(folder, resume=None):
        model = bert()  # dropout on: the random state must come back too
        handle = fe.patch(model, fe.RED(), freeze=True)
        trainer = trainer_of(mode, model, handle, arguments(folder, save_strategy="epoch", weight_decay=0.01))
        trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"))
    assert same(whole, resumed)


def test_an_edit_checkpoint_is_small_and_loads_as_an_edit(tmp_path):
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    args = arguments(tmp_path, save_strategy="epoch", save_only_model=True)
    EditTrainer(handle=handle, args=args, train_dataset=data()).train()
    checkpoint = tmp_path / "checkpoint-12"
    assert {f.name for f in checkpoint.iterdir()} == {
        "edit.json",
        "edit.safetensors",
        "head.safetensors",
        "trainer_state.json",
    }
    assert json.loads((checkpoint / "edit.json").read_text())["training"]["step"] == 12

    fresh = bert()
    again = fe.load(fresh, checkpoint)
    load_head(fresh, checkpoint)
    assert same({n: t for n, t in again.named_tensors().items()}, handle.named_tensors())
    batch = {key: torch.stack([row[key] for row in data(8)]) for key in ("input_ids", "attention_mask")}
    assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)


def test_checkpoints_on_transformers_5_17():
    older = os.environ.get("FASTEDIT_TRANSFORMERS_517")
    if not older:
        pytest.skip("FASTEDIT_TRANSFORMERS_517 does not name a folder with transformers 5.17")
    chosen = "(best_checkpoint or resuming) and edit"
    code = (
        "import sys, pytest, transformers; assert transformers.__version__.startswith('5.17');"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-p', 'no:cacheprovider', '-k', '{chosen}']))"
    )
    paths = os.pathsep.join([older, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_weight_decay_leaves_edits_alone(tmp_path):
    """Decay pulls towards 0, and a scale at rest is 1."""
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    trainer = EditTrainer(handle=handle, args=arguments(tmp_path, weight_decay=0.5), train_dataset=data())
    assert trainer.get_decay_parameter_names(model)
    assert not [name for name in trainer.get_decay_parameter_names(model) if "fastedit" in name]
    trainer.create_optimizer()
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    own = {id(p) for p in handle.parameters()}
    assert own <= optimised and not own & decayed


def test_an_unknown_kind_of_checkpoint_is_refused(tmp_path):
    handle = fe.patch(bert(), fe.RED())
    with pytest.raises(ValueError, match="expected 'edit' or 'model'"):
        EditTrainer(handle=handle, checkpoints="adapter", args=arguments(tmp_path))


def changed(folder, handle, model, damage):
    """load_trained refuses and nothing has changed."""
    damage(Path(folder))
    before = parameters(model)
    with pytest.raises(fe.EditFileError) as caught:
        load_trained(model, handle, folder)
    assert same(parameters(model), before)
    return str(caught.value)


def test_a_head_and_an_edit_of_two_saves_are_not_mixed(tmp_path):
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    save_trained(model, handle, tmp_path / "first")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    save_trained(model, handle, tmp_path / "second")
    head = (tmp_path / "second" / "head.safetensors").read_bytes()
    message = changed(tmp_path / "first", handle, model, lambda f: (f / "head.safetensors").write_bytes(head))
    assert "not the head of this edit" in message
    message = changed(tmp_path / "second", handle, model, lambda f: (f / "head.safetensors").unlink())
    assert "has no head.safetensors" in message


def test_another_head_or_another_edit_is_refused(tmp_path):
    model = bert()
    handle = fe.patch(model, fe.RED(), freeze=True)
    save_trained(model, handle, tmp_path)
    other = bert()
    other.classifier = torch.nn.Linear(WIDTH, 5)
    message = changed(tmp_path, fe.patch(other, fe.RED(), freeze=True), other, lambda f: None)
    assert "classifier.bias has shape (2,), this model's is (5,)" in message
    other = bert()
    message = changed(tmp_path, fe.patch(other, fe.RED(layers=[0]), freeze=True), other, lambda f: None)
    assert "not of this handle: 0.layers.1.mlp" in message


# --- the mean-pooled classifier -----------------------------------------------------------------------------


def test_sentence_classifier_ignores_padding_and_keeps_its_head_trainable():
    model = SentenceClassifier(bert().bert, 3).eval()
    handle = fe.patch(model, fe.RED(), freeze=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "fastedit" not in n} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    ids = torch.tensor([[4, 9, 2]])
    short = model(ids, torch.ones_like(ids))["logits"]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=ids.dtype)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    assert short.shape == (1, 3) and torch.allclose(model(padded, mask)["logits"], short, atol=1e-6)
    result = model(ids, torch.ones_like(ids), labels=torch.tensor([2]))
    assert result["loss"] == torch.nn.functional.cross_entropy(short, torch.tensor([2]))
    handle.remove()


# --- the paper's counts -------------------------------------------------------------------------------------


def test_a_copied_model_trains_on_its_own():
    model = bert()
    fe.patch(model, fe.RED())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "fastedit" in name:
                parameter.add_(1)
    assert not moved(parameters(bert()), {n: p for n, p in parameters(model).items() if "fastedit" not in n})
    batch = {key: torch.stack([row[key] for row in data(4)]) for key in ("input_ids", "attention_mask")}
    assert not torch.allclose(model.eval()(**batch).logits, twin.eval()(**batch).logits)


def test_red_trains_a_causal_language_model(tmp_path):
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, vocab_size=30
    )
    model = LlamaForCausalLM(config)
    handle = fe.patch(model, fe.RED(), freeze=True)
    before = parameters(model)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data()]
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows).train()
    assert moved(before, parameters(model)) == {name for name in before if "fastedit" in name}
    assert handle.num_parameters() == 2 * 2 * 16
