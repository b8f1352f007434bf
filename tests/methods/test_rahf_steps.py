"""RAHF from end to end: teachers with fp32 masters, saved and resumed; checkpoints of the student alone; held-out margins."""

import copy

import pytest
import tiny_models as tiny
import torch
from chat_tokenizers import ASKED, tokenizer_of
from test_rahf import Letters, batch, with_lora, with_red
from torch.nn import functional as F
from transformers import LlamaForCausalLM, TrainerCallback

import fastedit as fe
from fastedit.files.edit_file import EditFileError
from fastedit.methods import rahf, rahf_student, rahf_teachers

PAIRS = [{"prompt": f"say {c}", "chosen": c * 4, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]
FAST = {"steps": 4, "batch_size": 4, "micro_batch": 2, "lr": 1e-2, "use_cpu": True}


def model_of(**changes):
    torch.manual_seed(0)
    return tiny.build("llama", vocab_size=160, **changes)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Dtypes(TrainerCallback):
    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        self.seen |= {p.dtype for p in model.parameters() if p.requires_grad}
        self.seen |= {t.dtype for s in optimizer.state.values() for t in s.values() if t.dim()}


@pytest.mark.parametrize("by", ["full", "lora", "red", "red+"])
def test_what_trains_is_fp32_whatever_the_model_s_dtype(by):
    model, seen = model_of(dtype=torch.bfloat16), Dtypes()
    before, flags = bits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    taught, other = rahf_teachers.teach(
        model,
        tokenizer_of(),
        PAIRS,
        "scit",
        by=by,
        callbacks=lambda name: [seen],
        **FAST | {"lr": 0.1 if by != "full" else 1e-3},
    )
    assert seen.seen == {torch.float32} and other is None and taught is model
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    if not by.startswith("red"):  # whose layers stay fp32 where bf16 would round the edit away
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert set(bits(model)) == set(before)
    assert any(not torch.equal(t, before[n]) for n, t in bits(model).items() if n in before)


def test_scit_and_dual_teach_what_they_are_to_teach(tmp_path):
    tokenizer = tokenizer_of()
    collator = rahf.Collator(tokenizer, ("",), end=True)
    bare = sum(rahf_student.margins(model_of(), collator, PAIRS))
    chosen, rejected = rahf_teachers.teach(
        model_of(), tokenizer, PAIRS, "dual", output_dir=tmp_path, **FAST | {"steps": 20, "lr": 1e-3}
    )
    assert (
        sum(rahf_student.margins(chosen, collator, PAIRS)) > bare > sum(rahf_student.margins(rejected, collator, PAIRS))
    )
    again, other = rahf_teachers.teach(model_of(), tokenizer, PAIRS, "dual", output_dir=tmp_path, resume=True, **FAST)
    for found, expected in (
        (again, chosen),
        (other, rejected),
        (LlamaForCausalLM.from_pretrained(tmp_path / "rejected/model"), rejected),
    ):
        assert all(torch.equal(t, bits(expected)[n]) for n, t in bits(found).items())
    hindsight, _ = rahf_teachers.teach(model_of(), tokenizer, PAIRS, "scit", **FAST | {"steps": 20, "lr": 1e-3})
    told = [
        sum(rahf_student.margins(hindsight, rahf.Collator(tokenizer, (i,), end=True), PAIRS))
        for i in (rahf.GOOD, rahf.BAD)
    ]
    assert told[0] > told[1], "the instruction tells which response is likely"


def test_published_settings_are_the_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(
        rahf_teachers, "_teach", lambda model, tokenizer, pairs, collator, by, *rest: seen.append((by, rest[-1]))
    )
    rahf_teachers.teach(model_of(), tokenizer_of(), PAIRS, "scit")
    rahf_teachers.teach(model_of(), tokenizer_of(), PAIRS, "dual")
    for (by, given), rows, epochs in zip(seen, (64, 128, 128), (2, 3, 3), strict=True):
        steps = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
        assert (by, steps, given["num_train_epochs"]) == ("full", rows, epochs)
        assert (
            given["learning_rate"] == 2e-5 and given["lr_scheduler_type"] == "cosine" and given["warmup_steps"] == 0.1
        )


@pytest.mark.parametrize("given, said", [
    ({"mode": "both"}, "mode is 'both'"), ({"by": "loreft"}, "no weights can hold"),
    ({"batch_size": 6, "micro_batch": 4}, "does not divide batch_size=6"),
])  # fmt: skip
def test_bad_options(given, said):
    with pytest.raises(ValueError, match=said):
        rahf_teachers.teach(model_of(), tokenizer_of(), PAIRS, **given)
    with pytest.raises(ValueError, match=r"row 2: .*empty response"):
        rahf_teachers.teach(model_of(), tokenizer_of(), [PAIRS[0], {**PAIRS[0], "rejected": ""}], **FAST)


@pytest.mark.parametrize("student", [with_lora, with_red])
def test_checkpoints_hold_the_student_alone_and_a_run_goes_on_from_them(student, tmp_path):
    collator, found = rahf.Collator(Letters(), ("",), 8), []
    rows = rahf.rows_of(
        [{"prompt": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"]} for p in PAIRS], "all"
    )
    for resume in (None, True):
        model = student(tiny.build("llama", tie_word_embeddings=True))
        module = rahf.Rahf(model, (1, 2), rejected=tiny.build("llama"))
        folder = tmp_path / str(resume)
        given = {"batch_size": 4, "micro_batch": 2, "lr": 1e-2, "use_cpu": True, "output_dir": str(folder),
                 "save_strategy": "steps", "save_steps": 2, "steps": 4}  # fmt: skip
        if resume:
            (tmp_path / "None/checkpoint-2").rename(folder / "checkpoint-2") if folder.mkdir() is None else None
        rahf.train(module, rows, collator, resume=resume, **given)
        found.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    saved = tmp_path / "None/checkpoint-4"
    assert (saved / "student.safetensors").is_file() and not (saved / "model.safetensors").exists()
    content = bytearray((saved / "student.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "student.safetensors").write_bytes(content)
    with pytest.raises(EditFileError, match="does not have the checksum that it names"):
        rahf.train(module, rows, collator, **given | {"resume": str(saved), "steps": 6})
    (saved / "student.safetensors").unlink()
    with pytest.raises(EditFileError, match="is not there"):
        rahf.train(module, rows, collator, **given | {"resume": str(saved), "steps": 6})


def test_the_rejected_model_moves_along_and_stays_in_eval_mode():
    module = rahf.Rahf(with_red(tiny.build("llama")), (1, 2), rejected=tiny.build("llama")).to(torch.float64).train()
    assert {p.dtype for p in module.rejected.parameters()} == {torch.float64} and not module.rejected.training
    assert not any(p.requires_grad for p in module.rejected.parameters()) and module.model.training


@pytest.mark.parametrize("student", [with_lora, with_red])
def test_gradient_checkpointing_gives_the_same_gradients(student):
    grads = []
    for checkpointing in (False, True):
        module = rahf.Rahf(student(tiny.exact(tiny.build("llama"))), (1, 2)).train()
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        if checkpointing:
            module.activation_checkpointing_enable()
        module(**batch())["loss"].backward()
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert grads[0]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_rows_and_margins_are_what_they_say():
    given = rahf.rows_of(PAIRS, "random", seed=3)
    rejected = [row["response"] == pair["rejected"] for row, pair in zip(given, PAIRS, strict=True)]
    assert sum(rejected) == 4 and rejected != [
        r["response"] == p["rejected"] for r, p in zip(rahf.rows_of(PAIRS, "random"), PAIRS, strict=True)
    ]
    assert [row["response"] for row in rahf.rows_of(PAIRS[:2], "all")] == ["aaaa", "zz", "bbbb", "zzz"]
    assert [row["response"] for row in rahf.rows_of(PAIRS, "chosen")] == [pair["chosen"] for pair in PAIRS]
    model, letters = tiny.exact(tiny.build("llama")).eval(), Letters()
    for pair, found in zip(PAIRS, rahf_student.margins(model, rahf.Collator(letters), PAIRS, 3), strict=True):
        said = []
        for name in ("chosen", "rejected"):
            asked, answer = letters(pair["prompt"])["input_ids"], letters(pair[name], False)["input_ids"]
            logits = F.log_softmax(model(torch.tensor([asked + answer])).logits[0], -1)
            said.append(sum(logits[len(asked) + n - 1, token] for n, token in enumerate(answer)))
        assert found == pytest.approx(float(said[0] - said[1]), abs=1e-5)


def test_messages_get_the_instruction_in_their_system_turn():
    tokenizer = tokenizer_of("llama3")
    given = rahf.Collator(tokenizer, ("", "Be good."), 20, 200)([{"prompt": ASKED, "response": "fine"}])
    plain, told = (
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(given["input_ids"][:, 0], given["attention_mask"][:, 0], strict=True)
    )
    assert plain.count("<|begin_of_text|>") == told.count("<|begin_of_text|>") == 1
    assert "<|start_header_id|>system<|end_header_id|>\n\nBe good.<|eot_id|>" in told and "system" not in plain
    assert told.endswith("fine<|eot_id|>") and int(given["response_mask"].sum()) == 5
    with pytest.raises(ValueError, match="is longer than prompt=5"):
        rahf.Collator(tokenizer, ("",), 20, 5)([{"prompt": ASKED, "response": "fine"}])


def test_a_student_at_some_of_the_prompt_s_tokens_is_told_where_it_ends():
    model = tiny.build("llama")
    fe.patch(model, fe.RED(positions="last 2", layers=[0, 1]), freeze=True)
    module = rahf.Rahf(model, (1, 2)).train()
    module(**batch())["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    copied = copy.deepcopy(module)
    assert copied(**batch())["loss"].isfinite()
