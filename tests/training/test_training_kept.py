"""What is trained is kept, whoever saves it: head and adapter with `handle.save`, in checkpoints, by `save_pretrained`."""

import json
import warnings

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerState, TrainingArguments

import fastedit as fe
from fastedit.files import edit_file
from fastedit.files.edit_file import EditFileError
from fastedit.training import EditCallback

IDS = torch.randint(3, tiny.VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row.clone()} for row in IDS]
SENTENCES = [{"input_ids": row, "labels": row[0] % 2} for row in IDS]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def arguments(folder, **changes):
    given = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **given | changes)


def trained(folder, family="bert", data=SENTENCES, **changes):
    model = tiny.build(family).train()
    handle = fe.patch(model, fe.RED(), freeze=True)
    Trainer(model=model, args=arguments(folder, **changes), train_dataset=data).train()
    return model.eval(), handle


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_save_and_load_keep_the_head(family, tmp_path):
    model, handle = trained(tmp_path / "run", family, save_strategy="no")
    handle.save(tmp_path / "edit")
    fresh = tiny.build(family).eval()
    with torch.no_grad():
        for parameter in fresh.classifier.parameters():
            parameter.add_(1.0)
    fe.load(fresh, tmp_path / "edit")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    again = tiny.build(family).eval()
    untrained = again.classifier.state_dict()
    untrained = {name: tensor.clone() for name, tensor in untrained.items()}
    fe.load(again, tmp_path / "edit", head=False)
    assert all(torch.equal(again.classifier.state_dict()[n], t) for n, t in untrained.items())


@pytest.mark.parametrize("training", [{"head": "linear"}, {"adapters": {}}, "by hand", [1]])
def test_a_summary_that_would_be_taken_for_what_was_trained_beside_is_refused(tmp_path, training):
    """Saved, such an edit could not be loaded: it would name a head that is not there."""
    handle = fe.patch(tiny.build("llama"), fe.RED())
    with pytest.raises(ValueError, match=r"training is .*expected a dict without"):
        fe.store.save(handle, tmp_path / "edit", training=training)
    assert not (tmp_path / "edit").exists()


def test_a_head_that_is_damaged_or_of_another_model_is_refused(tmp_path):
    _, handle = trained(tmp_path / "run", save_strategy="no")
    handle.save(tmp_path / "edit")
    other = tiny.build("bert", num_labels=5)
    with pytest.raises(EditFileError, match=r"classifier\.bias has shape \(2,\), this model's is \(5,\)"):
        fe.load(other, tmp_path / "edit")
    assert not hasattr(other, "fastedit"), "nothing is left on the model"
    content = bytearray((tmp_path / "edit/head.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "edit/head.safetensors").write_bytes(content)
    with pytest.raises(EditFileError, match="not the head of this edit"):
        fe.load(tiny.build("bert"), tmp_path / "edit")
    (tmp_path / "edit/head.safetensors").unlink()
    with pytest.raises(EditFileError, match=r"has no head\.safetensors"):
        fe.load(tiny.build("bert"), tmp_path / "edit")


def test_a_crash_between_head_and_edit_leaves_the_old_pair(tmp_path, monkeypatch):
    model, handle = trained(tmp_path / "run", save_strategy="no")
    handle.save(tmp_path / "edit")
    expected = model(IDS).logits
    with torch.no_grad():
        model.classifier.weight.add_(1.0)

    def crash(path, *given, **named):
        if path.name == "edit.json":
            raise KeyboardInterrupt
        return replace(path, *given, **named)

    replace = edit_file.replace
    monkeypatch.setattr(edit_file, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        handle.save(tmp_path / "edit")
    monkeypatch.undo()
    fresh = tiny.build("bert").eval()
    fe.load(fresh, tmp_path / "edit")
    assert torch.equal(fresh(IDS).logits, expected)
    handle.save(tmp_path / "edit")
    assert sorted(p.name for p in (tmp_path / "edit").iterdir()) == [
        "edit.json",
        "edit.safetensors",
        "head.safetensors",
    ]


@pytest.mark.parametrize("other", ["head", "edit"])
def test_a_resume_that_is_refused_leaves_the_model_as_it_was(other, tmp_path):
    def made(edit, **changes):
        model = tiny.build("bert", **changes).train()
        callback = EditCallback(fe.patch(model, edit, freeze=True))
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=SENTENCES, callbacks=[callback])
        return model, callback, trainer

    made(fe.RED())[2].train()
    head = other == "head"
    model, callback, _ = made(fe.RED(), num_labels=5) if head else made(fe.RED(layers=[0]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = r"classifier\.bias has shape \(2,\)" if head else "not of this handle: 0.layers.1"
    with pytest.raises(EditFileError, match=message):
        callback.on_train_begin(arguments(tmp_path), TrainerState(global_step=4), None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_edit_beside_lora_is_kept_with_the_adapter(tmp_path):
    torch.manual_seed(0)
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED())
    wrapped = get_peft_model(model, LORA)
    callback = EditCallback(handle)
    Trainer(model=wrapped, args=arguments(tmp_path / "run"), train_dataset=ROWS, callbacks=[callback]).train()
    assert not handle.never_moved()
    handle.save(tmp_path / "edit")
    expected = model.eval()(IDS).logits
    for folder in ("edit", "run/checkpoint-4"):
        fresh = tiny.build("llama").eval()
        fe.load(fresh, tmp_path / folder)
        assert torch.equal(fresh(IDS).logits, expected), folder
    assert sorted(json.loads((tmp_path / "edit/edit.json").read_text())["training"]["adapters"]) == ["default"]


def lora_and_red(folder, callbacks, resume=None, **changes):
    torch.manual_seed(0)
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED())
    wrapped = get_peft_model(model, LORA)
    trainer = Trainer(
        model=wrapped, args=arguments(folder, **changes), train_dataset=ROWS, eval_dataset=ROWS[:4],
        callbacks=[make(handle) for make in callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return handle, trainer


def test_resuming_lora_and_red_ends_where_an_unbroken_run_ends(tmp_path):
    whole, _ = lora_and_red(tmp_path / "a", [EditCallback], max_steps=4)
    lora_and_red(tmp_path / "b", [EditCallback], max_steps=4, save_steps=2)
    again, _ = lora_and_red(tmp_path / "b", [EditCallback], str(tmp_path / "b/checkpoint-2"), max_steps=4)
    for name, tensor in whole.named_tensors().items():
        assert torch.equal(again.named_tensors()[name], tensor), name
    (tmp_path / "b/checkpoint-2/edit.json").unlink()
    with pytest.raises(EditFileError, match="holds no edit to go on from"):
        lora_and_red(tmp_path / "b", [EditCallback], str(tmp_path / "b/checkpoint-2"), max_steps=4)


def test_the_best_checkpoint_of_lora_and_red(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    handle, trainer = lora_and_red(tmp_path, [EditCallback], learning_rate=2.0, **best)
    folder = trainer.state.best_model_checkpoint
    assert not folder.endswith("checkpoint-4"), "a rate this high must make the last step a bad one"
    from fastedit.store import read

    for name, tensor in read(folder)[1].items():
        assert torch.equal(handle.named_tensors()[name], tensor)


@pytest.mark.parametrize("made", ["checkpoint", "save_pretrained"])
def test_what_a_plain_trainer_or_save_pretrained_wrote_loads_with_its_edit(made, tmp_path):
    model, handle = trained(tmp_path / "run")
    handle.strength = 0.5
    folder = tmp_path / "run/checkpoint-4"
    if made == "save_pretrained":
        folder = tmp_path / "saved"
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        handle.strength = 1.0
    again = type(model).from_pretrained(folder).eval()
    fe.load(again, folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    onto_base = tiny.build("bert").eval()
    with torch.no_grad():
        onto_base.classifier.weight.add_(1.0)
    assert torch.equal((fe.load(onto_base, folder), onto_base(IDS).logits)[1], model(IDS).logits), (
        "the head comes along"
    )
    handle.remove()
    assert not any("fastedit" in key for key in model.state_dict())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("decay", [None, "identity"])
def test_decay_pulls_to_the_identity_or_nowhere(decay, optimizer, tmp_path):
    found = {}
    for weight_decay in (0.0, 0.5):
        model = tiny.build("llama").train()
        handle = fe.patch(model, fe.ScaleBias(torch.full((32,), 1.5), torch.full((32,), 0.5)), freeze=True)
        rate = 0.1
        made = optimizer(list(handle.parameters()), lr=rate, weight_decay=weight_decay)
        args = arguments(tmp_path, max_steps=1, save_strategy="no", max_grad_norm=0.0)
        constant = torch.optim.lr_scheduler.LambdaLR(made, lambda _: 1.0)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=ROWS,
            optimizers=(made, constant),
            callbacks=[EditCallback(handle, decay=decay)],
        )
        trainer.train()
        found[weight_decay] = handle.named_tensors()
    for name, tensor in found[0.5].items():
        plain, at = found[0.0][name], 0.5  # how far scale and bias are from the identity at the start
        if decay is None:
            torch.testing.assert_close(tensor, plain, rtol=0, atol=2e-6)
        elif optimizer is not torch.optim.Adam:  # whose steps do not add up with decay
            torch.testing.assert_close(tensor, plain - rate * 0.5 * at, rtol=0, atol=2e-6)
        else:
            assert not torch.equal(tensor, plain)


def test_what_would_be_lost_is_said_before_training(tmp_path):
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED())
    with pytest.raises(ValueError, match="base weights train along"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[EditCallback(handle)]).train()
    with pytest.raises(ValueError, match="decay='identity' is known for scales and biases"):
        EditCallback(fe.patch(tiny.build("llama"), fe.LoReFT(2), freeze=True), decay="identity")
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED(), freeze=True)
    odd = torch.optim.Adagrad(list(handle.parameters()), weight_decay=0.1)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=ROWS,
        callbacks=[EditCallback(handle)],
        optimizers=(odd, None),
    )
    with pytest.raises(ValueError, match="Adagrad decays the edit by its own rule"):
        trainer.train()


def test_base_weights_that_were_trained_along_are_warned_of(tmp_path):
    model = tiny.build("llama").train()
    handle = fe.patch(model, fe.RED())
    Trainer(model=model, args=arguments(tmp_path / "run", save_strategy="no"), train_dataset=ROWS).train()
    with pytest.warns(UserWarning, match=r"\d+ weights of the model were trained too and are not in this edit"):
        handle.save(tmp_path / "edit")
    fe.load(tiny.build("llama"), tmp_path / "edit")


def test_a_base_that_was_trained_before_is_no_part_of_an_edit_on_it(tmp_path):
    model = tiny.build("llama").train()
    Trainer(model=model, args=arguments(tmp_path / "run", save_strategy="no"), train_dataset=ROWS).train()
    for freeze in (True, False):
        handle = fe.patch(model, fe.RED(), freeze=freeze)
        with torch.no_grad():
            next(handle.parameters()).add_(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.save(tmp_path / "edit")
        assert not (tmp_path / "edit/head.safetensors").exists()
        handle.remove()


def test_an_edit_that_never_moved_is_said_and_a_trained_or_loaded_one_not(tmp_path):
    handle = fe.patch(tiny.build("llama"), fe.RED(), freeze=True)
    with pytest.warns(UserWarning, match="has not moved since it was patched"):
        handle.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.load(tiny.build("llama"), tmp_path).save(tmp_path / "again")
        fe.patch(tiny.build("llama"), fe.Steer(torch.ones(32))).save(tmp_path / "steer")
        with torch.no_grad():
            next(handle.parameters()).add_(1e-3)
        handle.save(tmp_path)


@pytest.mark.parametrize("rate, warned", [(5e-5, True), (1e-4, True), (2e-3, False)])
def test_a_low_rate_is_warned_of_once_whatever_trains(rate, warned, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained(tmp_path, family="bert", learning_rate=rate, save_strategy="no", warmup_steps=2)
    said = [str(w.message) for w in said if "learning rate of the edit" in str(w.message)]
    assert len(said) == warned and all("Published: RED 1e-3" in text for text in said)


def test_freeze_leaves_what_is_new_trainable():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, RobertaForMaskedLM

    small = DistilBertConfig(vocab_size=60, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64)
    model = DistilBertForSequenceClassification(small)
    fe.patch(model, fe.RED(), freeze=True)
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"pre_classifier", "classifier", "fastedit"}
    bert = tiny.build("bert")
    bert.bert.pooler.dense.bias.data.zero_()
    fe.patch(bert, fe.RED(), freeze=True)
    assert bert.bert.pooler.dense.weight.requires_grad, "a pooler with zero biases was never trained"
    bert = tiny.build("bert")
    bert.bert.pooler.dense.bias.data.fill_(0.1)
    fe.patch(bert, fe.RED(), freeze=True)
    assert not bert.bert.pooler.dense.weight.requires_grad
    masked = RobertaForMaskedLM(tiny.config("roberta"))
    fe.patch(masked, fe.RED(), freeze=True)
    assert {n.split(".")[0] for n, p in masked.named_parameters() if p.requires_grad} == {"fastedit"}


def test_a_head_larger_than_its_model_is_not_read(tmp_path):
    _, handle = trained(tmp_path / "run", save_strategy="no")
    handle.save(tmp_path / "edit")
    with open(tmp_path / "edit" / "head.safetensors", "r+b") as file:
        file.truncate(1 << 40)  # of holes
    with pytest.raises(EditFileError, match=r"head\.safetensors .*bytes"):
        fe.load(tiny.build("bert"), tmp_path / "edit")
