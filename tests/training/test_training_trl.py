"""TRL's SFTTrainer and DPOTrainer as they are, with edits, with PEFT beside them, and the reference at strength 0."""

import pytest
import tiny_models as tiny
import torch
from chat_tokenizers import tokenizer_of
from peft import LoraConfig

import fastedit as fe
from fastedit.training import EditCallback, Reference

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"say {c}: ", "completion": c * n} for n, c in enumerate("abcdefgh", 2)]
PAIRS = [{"prompt": f"say {c}: ", "chosen": c * 3, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def options(folder, **changes):
    given = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 3, "logging_strategy": "no", "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return given | changes


def model_of():
    torch.manual_seed(0)
    return tiny.build("llama", vocab_size=160)


@pytest.mark.parametrize("positions", [None, "last 2", "generated"])
def test_sft_trains_the_edit_where_it_is_to_act(positions, tmp_path):
    model = model_of()
    handle = fe.patch(model, fe.RED(positions=positions), freeze=True)
    trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**options(tmp_path)), train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer_of(), callbacks=[EditCallback(handle)],
    ).train()  # fmt: skip
    assert not handle.never_moved()
    fresh = model_of().eval()
    fe.load(fresh, tmp_path / "checkpoint-3")
    ids = torch.randint(3, 100, (2, 7))
    assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("packing", [{"packing": True, "max_length": 48}, {"padding_free": True, "max_length": None}])
def test_packed_rows_are_refused_where_positions_need_the_prompt(packing, tmp_path):
    model = model_of()
    fe.patch(model, fe.RED(positions="last 2"), freeze=True)
    args = trl.SFTConfig(**options(tmp_path, **packing))
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer_of()
    )
    with pytest.raises(ValueError, match=r"are packed|several responses"):
        trainer.train()


def test_sft_with_a_peft_config_leaves_the_edit_trainable_and_keeps_both(tmp_path):
    model = model_of()
    handle = fe.patch(model, fe.RED())
    trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**options(tmp_path)), train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer_of(), peft_config=LoraConfig(**LORA), callbacks=[EditCallback(handle)],
    ).train()  # fmt: skip
    assert not handle.never_moved()
    fresh = model_of().eval()
    fe.load(fresh, tmp_path / "checkpoint-3")
    ids = torch.randint(3, 100, (2, 7))
    assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
    bare = model_of().eval()
    assert not torch.equal(bare(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("positions", [None, "last 2"])
@pytest.mark.parametrize("lora", [False, True])
def test_dpo_with_the_same_model_at_strength_0_as_the_reference(lora, positions, tmp_path):
    """The same steps as with a bare copy of the model in memory."""
    found = []
    for kind in ("copy", "same"):
        torch.manual_seed(0)
        model = model_of()
        handle = fe.patch(model, fe.RED(positions=positions), freeze=True)
        trl.DPOTrainer(
            model=model, ref_model=model_of() if kind == "copy" else Reference(handle), args=trl.DPOConfig(**options(tmp_path)),
            train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tokenizer_of(),
            peft_config=LoraConfig(**LORA) if lora else None, callbacks=[EditCallback(handle)],
        ).train()  # fmt: skip
        assert not handle.never_moved() and handle.strength == 1.0
        found.append(handle.named_tensors())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)
