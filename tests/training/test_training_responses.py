"""SFT and preferences: the losses against their formulas, the reference at strength 0, positions, resuming."""

import math

import pytest
import tiny_models as tiny
import torch
from chat_tokenizers import tokenizer_of
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import fastedit as fe
from fastedit import training
from fastedit.files.edit_file import EditFileError
from fastedit.texts.chat import encode_preference
from fastedit.training import losses
from fastedit.training.batches import Padded, as_features, response_logps, token_logps
from fastedit.training.reference import at_strength, load_reference, store_reference
from fastedit.training.responses import PreferenceTrainer, encode_pairs

ROWS = [{"prompt": f"say {c}: ", "response": c * n} for n, c in enumerate("abcdefgh", 2)]
PAIRS = [{"prompt": f"say {c}: ", "chosen": c * 3, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]
ASKED = [{"role": "user", "content": "x"}]
FAST = {"epochs": 3, "batch_size": 4, "lr": 2e-2, "use_cpu": True}


def model_of(family="llama"):
    torch.manual_seed(0)
    return tiny.build(family, vocab_size=160)


def by_hand(model, encoded):
    """Summed log-probability of one response, unpadded."""
    ids = torch.tensor([encoded.ids])
    logits = model(ids, use_cache=False).logits.log_softmax(-1)
    return logits[0, encoded.prompt - 1 : -1].gather(1, ids[0, encoded.prompt :, None]).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_each_response_alone(family):
    model = tiny.exact(model_of(family)).eval()
    tokenizer = tokenizer_of()
    pairs = [encode_preference(tokenizer, row) for row in PAIRS[:3]]
    batch = Padded(0)([{"chosen": as_features(a), "rejected": as_features(b)} for a, b in pairs])
    (chosen, rejected), (long, short) = response_logps(model, model, batch)
    for n, (a, b) in enumerate(pairs):
        torch.testing.assert_close(chosen[n].double(), by_hand(model, a), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rejected[n].double(), by_hand(model, b), rtol=1e-6, atol=1e-6)
        assert (int(long[n]), int(short[n])) == (len(a.response), len(b.response))


def test_the_losses_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    w, y, rw, rl = (-5 * torch.rand(4, generator=draw, dtype=torch.float64) - 0.5 for _ in range(4))
    n, m = torch.tensor([3, 4, 5, 6]), torch.tensor([2, 7, 3, 3])
    sigma = torch.sigmoid
    expected = -torch.log(sigma(0.3 * ((w - rw) - (y - rl))))
    torch.testing.assert_close(losses.dpo((w, y), (rw, rl), beta=0.3), expected)
    torch.testing.assert_close(losses.dpo((w, y), (rw, rl), beta=0.3, sign=-1), -torch.log(1 - torch.exp(-expected)))
    p, q = torch.exp(w / n), torch.exp(y / m)
    odds = torch.log((p / (1 - p)) / (q / (1 - q)))
    torch.testing.assert_close(losses.orpo((w, y), (n, m), weight=0.2), -w / n - 0.2 * torch.log(sigma(odds)))
    plus, minus = (torch.clamp(a - b, min=1) for a, b in ((rl, rw), (rw, rl)))
    torch.testing.assert_close(losses.reps((w, y), (rw, rl), (n, m)), -F.logsigmoid(plus * w / n - y / m))
    torch.testing.assert_close(losses.reps((w, y), (rw, rl), (n, m), sign=-1), -F.logsigmoid(minus * y / m - w / n))
    tiny_p = torch.tensor([-1e-12], dtype=torch.float64)
    assert losses.orpo((tiny_p, tiny_p), (n[:1], n[:1])).isfinite().all()


@pytest.mark.parametrize("positions", [None, "last 2", "generated"])
def test_sft_lowers_the_loss_of_responses_it_has_not_seen(positions, tmp_path):
    model, tokenizer = model_of(), tokenizer_of()
    handle = fe.patch(model, fe.RED(positions=positions), freeze=True)
    before = heldout(model, tokenizer)
    trainer = training.sft(
        handle, tokenizer, ROWS[:6], evaluate=ROWS[6:], epochs=10, batch_size=3, lr=5e-2, use_cpu=True
    )
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(heldout(model, tokenizer), rel=1e-5) and after < before - (
        0.1 if positions is None else 0.005
    )
    assert all(not p.requires_grad for n, p in model.named_parameters() if not n.startswith("fastedit"))


def heldout(model, tokenizer):
    from fastedit.texts.chat import encode_row

    batch = Padded(0)([as_features(encode_row(tokenizer, row)) for row in ROWS[6:]])
    with torch.no_grad():
        said, mask = token_logps(model.eval(), model, batch)
    return float(-said.sum() / mask.sum())


def test_a_quantised_base_trains_by_its_edit_alone():
    """transformers refuses to train what says it is quantised and has no adapter; an edit is one."""
    from types import SimpleNamespace

    model = model_of()
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    handle = fe.patch(model, fe.RED(), freeze=True)
    training.sft(handle, tokenizer_of(), ROWS, epochs=3, use_cpu=True)
    assert not handle.never_moved()


def test_accumulated_batches_are_one_batch():
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = model_of()
        handle = fe.patch(model, fe.RED(), freeze=True)
        training.sft(handle, tokenizer_of(), ROWS, epochs=1, batch_size=batch, lr=1e-2, use_cpu=True,
                     gradient_accumulation_steps=accumulate, max_grad_norm=0.0, optim="sgd", warmup_steps=0)  # fmt: skip
        found.append(handle.named_tensors())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_preferences_are_learned(loss):
    model, tokenizer = model_of(), tokenizer_of()
    handle = fe.patch(model, fe.RED(), freeze=True)
    margins = margin(model, tokenizer)
    training.prefer(handle, tokenizer, PAIRS, loss=loss, **FAST | {"epochs": 12, "lr": 5e-2})
    assert margin(model, tokenizer) > margins + 1, loss
    assert handle.strength == 1.0
    handle.strength = 0.0
    assert margin(model, tokenizer) == margins, "the reference is in the model still"


def margin(model, tokenizer):
    batch = Padded(0)(encode_pairs(tokenizer, PAIRS))
    with torch.no_grad():
        (chosen, rejected), _ = response_logps(model.eval(), model, batch)
    return float((chosen - rejected).mean())


@pytest.mark.parametrize("loss", ["dpo", "bipo", "reps"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_autograd_of_the_formula(loss, checkpointing, tmp_path):
    """Against two models: one edited, one bare as the reference, backward through both sides of the loss at once."""
    from transformers import TrainingArguments

    model, tokenizer = tiny.exact(model_of()), tokenizer_of()
    handle = fe.patch(model, fe.RED(), freeze=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    batch = Padded(0)(encode_pairs(tokenizer, PAIRS[:2]))
    with torch.no_grad(), at_strength(handle, 0.0):
        reference, _ = response_logps(model, model, batch)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=checkpointing, report_to=[])
    trainer = PreferenceTrainer(loss=loss, beta=0.5, handle=handle, args=args, data_collator=Padded(0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.optimizer, trainer.current_gradient_accumulation_steps = None, 1
    for _ in range(2):  # BiPO's sign may differ
        model.zero_grad()
        state = trainer.draw.get_state()
        trainer.training_step(model, dict(batch))
        got = [p.grad.clone() for p in handle.parameters()]
        trainer.draw.set_state(state)
        signs = {"bipo": [2 * int(torch.randint(2, (), generator=trainer.draw)) - 1], "reps": [1, -1]}.get(loss, [1])
        expected = [torch.zeros_like(g) for g in got]
        for sign in signs:
            handle.strength = float(sign)
            policy, lengths = response_logps(model, model, batch)
            each = losses.dpo(policy, reference, beta=0.5, sign=sign)
            if loss == "reps":
                each = losses.reps(policy, reference, lengths, sign=sign)
            grads = torch.autograd.grad(each.mean(), list(handle.parameters()))
            expected = [total + grad for total, grad in zip(expected, grads, strict=True)]
        handle.strength = 1.0
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_reference_between_forward_and_backward_harms_neither():
    """As TRL's DPOTrainer runs it: the policy, then the reference, then backward. A frozen handle is part of both."""
    tokenizer = tokenizer_of()
    batch = Padded(0)(encode_pairs(tokenizer, PAIRS[:2]))
    model = tiny.exact(model_of())
    fe.patch(model, fe.Steer(torch.ones(32), layers=0))
    with torch.no_grad():
        expected, _ = response_logps(model.eval(), model, batch)
    handle = fe.patch(model, fe.RED(), freeze=True)
    plain = None
    for between in (False, True):
        policy, _ = response_logps(model.train(), model, batch)
        if between:
            with training.at_zero(model):
                reference, _ = response_logps(model, model, batch)
            assert torch.equal(torch.stack(reference), torch.stack(expected)) and handle.strength == 1.0
        grads = torch.autograd.grad(policy[0].sum(), list(handle.parameters()))
        assert between is False or all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        plain = grads


def test_stored_log_probabilities_give_the_same_run_and_are_tied_to_model_and_rows(tmp_path):
    found = []
    for stored in (None, tmp_path / "ref.safetensors"):
        model, tokenizer = model_of(), tokenizer_of()
        handle = fe.patch(model, fe.RED(), freeze=True)
        training.prefer(handle, tokenizer, PAIRS, stored=stored, **FAST)
        found.append(handle.named_tensors())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
    rows, path = encode_pairs(tokenizer, PAIRS), tmp_path / "ref.safetensors"
    before = path.stat().st_mtime_ns
    store_reference(handle, rows, path, 0)
    assert path.stat().st_mtime_ns == before, "one that fits is read, though the edit has been trained"
    with pytest.raises(EditFileError, match="of other rows"):
        load_reference(handle, rows[:4], path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(EditFileError, match="of another model"):
        load_reference(handle, rows, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of a number
    path.write_bytes(content)
    with pytest.raises(EditFileError, match="does not have the checksum that it names"):
        load_reference(handle, rows, path)
    path.write_bytes(b"torn")
    with pytest.raises(EditFileError, match="holds no stored log-probabilities"):
        load_reference(handle, rows, path)


def test_resuming_ends_where_an_unbroken_run_ends(tmp_path):
    found = []
    for resume in (False, True):
        handle = fe.patch(model_of(), fe.RED(positions="last 2"), freeze=True)
        given = FAST | {"output_dir": tmp_path / str(resume), "save_total_limit": 3}
        if resume:
            training.sft(handle, tokenizer_of(), ROWS, **given)
            handle = fe.patch(model_of(), fe.RED(positions="last 2"), freeze=True)
            import shutil

            shutil.rmtree(tmp_path / "True/checkpoint-6")
        training.sft(handle, tokenizer_of(), ROWS, resume=resume, **given)
        found.append(handle.named_tensors())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
    fresh = model_of()
    fe.load(fresh, tmp_path / "False/checkpoint-6")
    assert isinstance(fresh, LlamaForCausalLM)


@pytest.mark.parametrize("call, said", [
    (lambda h, t: training.sft(h, t, [ROWS[0], {"prompt": "x"}]), "row 2: there is no column 'response'"),
    (lambda h, t: training.sft(h, t, []), "no rows"),
    (lambda h, t: training.sft(h, t, [{"messages": ASKED}]), "row 1, column 'messages': there is no assist"),
    (lambda h, t: training.prefer(h, t, [PAIRS[0], {**PAIRS[0], "rejected": ""}]), "row 2, column 'rejected': the res"),
    (lambda h, t: training.prefer(h, t, PAIRS, loss="ipo"), "loss is 'ipo', expected one of dpo"),
    (lambda h, t: training.sft(h, t, ROWS, resume=True), "resume needs the output_dir"),
])  # fmt: skip
def test_bad_rows_are_named_before_any_training(call, said):
    handle = fe.patch(model_of(), fe.RED(), freeze=True)
    with pytest.raises(ValueError, match=said):
        call(handle, tokenizer_of())
    assert all(
        math.isclose(float(v.sum()), 32 if n.endswith("scale") else 0) for n, v in handle.named_tensors().items()
    )


@pytest.mark.slow
def test_two_processes_of_accelerate_train_as_one(tmp_path):
    import training_worker
    from processes import HERE, accelerated

    done = accelerated(HERE / "training_worker.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    training_worker.main(tmp_path / "one")
    for name in ("sft", "dpo", "run/checkpoint-2"):
        (_, alone), (_, both) = (fe.store.read(tmp_path / run / name) for run in ("one", "two"))
        for key, tensor in alone.items():
            torch.testing.assert_close(both[key], tensor, rtol=1e-5, atol=1e-7)
            assert name != "sft" or not torch.equal(tensor, torch.full_like(tensor, float(key.endswith("scale"))))
