"""How a model may be held while it is edited: offloaded, made on meta, in low precision, checkpointed, quantised,
with adapters; copies and pickles are in test_patch_handles.py."""

import copy

import pytest
import tiny_models as tiny
import torch
from mode_cases import KINDS, one_of_each
from patch_cases import scrambled

import fastedit as fe
from fastedit.families import find_layers

PATHS = (True, False)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # quantisers take blocks of 64


def fresh(family="llama", **changes):
    return tiny.build(family, **changes)


def patched(model, family="llama", fused=True):
    return scrambled(fe.patch(model, one_of_each(family), fused=fused))


def reference(family="llama"):
    """(logits of the edited model, the same on the plain path, in float64)"""
    says = []
    for model, fused in ((fresh(family), True), (fresh(family), False), (tiny.exact(fresh(family)), False)):
        patched(model, family, fused)
        says.append(tiny.output(model, family))
    return says


# --- accelerate's dispatch and offloading ---------------------------------------------------------------------


def offload(model, how, folder):
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    names = [*(f"model.layers.{n}" for n in range(tiny.LAYERS)), "model.embed_tokens", "model.norm"]
    places = {name: "disk" for name in names} | {"model.rotary_emb": "cpu", "lm_head": "cpu", "fastedit": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("order", ["patched first", "offloaded first"])
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
def test_an_offloaded_model_is_edited(how, order, tmp_path):
    """Weights come back for each forward; the edits stay where it runs, whoever came first."""
    got, eager, exact = reference()
    model = fresh()
    if order == "offloaded first":
        offload(model, how, tmp_path)
        handle = patched(model)
    else:
        handle = patched(model)
        offload(model, how, tmp_path)
    assert next(model.model.layers[0].mlp.parameters()).is_meta
    assert {t.device.type for t in handle.named_tensors().values()} == {"cpu"}
    tiny.assert_promise(tiny.output(model, "llama"), eager, exact)
    handle.strength = 0.0
    assert not torch.allclose(tiny.output(model, "llama"), got, atol=1e-2)
    handle.remove()
    assert torch.equal(tiny.output(model, "llama"), tiny.output(fresh(), "llama"))


def test_weights_loaded_straight_to_disk(tmp_path):
    from transformers import LlamaForCausalLM

    _, eager, exact = reference()
    fresh().save_pretrained(tmp_path / "base")
    places = {f"model.layers.{n}": "disk" for n in range(tiny.LAYERS)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off")
    ).eval()
    patched(model)
    tiny.assert_promise(tiny.output(model, "llama"), eager, exact)


# --- meta -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_a_model_patched_on_meta_and_then_loaded(how):
    """The dial is in no state dict, and what to_empty leaves is anything."""
    said, _, _ = reference()
    whole = fresh()
    handle = patched(whole)
    with torch.device("meta"):
        model = type(whole)(whole.config).eval()
    again = fe.patch(model, one_of_each("llama"))
    assert all(t.is_meta for t in again.named_tensors().values())
    again.strength = 0.5
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict(), assign=how == "assign")
    model.model.rotary_emb = whole.model.rotary_emb  # its buffers, too, are in no state dict
    handle.strength = 0.5
    assert torch.equal(tiny.output(model, "llama"), tiny.output(whole, "llama"))
    again.strength = 1.0
    assert torch.equal(tiny.output(model, "llama"), said)


# --- low precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_autocast_to_bf16_is_no_worse_than_the_plain_path(family, fused):
    _, _, exact = reference(family)
    model, plain = fresh(family), fresh(family)
    patched(model, family, fused)
    patched(plain, family, False)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = tiny.output(model, family), tiny.output(plain, family)
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def masters_bits(handle):
    return {name: t.clone() for name, t in handle.named_tensors().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casting_a_model_there_and_back_leaves_the_masters_bits(dtype):
    model = fresh()
    handle = patched(model)
    before = masters_bits(handle)
    model.to(dtype)
    model.float().double().half().float()
    assert all(torch.equal(t, before[n]) for n, t in handle.named_tensors().items())


def test_loss_scaling_skips_a_bad_step_and_leaves_exact_gradients():
    """Scaling by a power of two is exact, so a scaled step is the unscaled one bit for bit; one with an overflow
    is skipped and changes no bit."""
    ends = []
    for scaled in (False, True):
        model = fresh().train()
        handle = scrambled(fe.patch(model, [fe.RED(), fe.DiReFT(2)], freeze=True))
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**tiny.inputs("llama")).logits.float().square().mean()
            scaler.scale(loss).backward()
            if step == 1:
                next(iter(handle.parameters())).grad[0] = float("inf")
                before = masters_bits(handle)
            if step == 1 and not scaled:
                optimizer.zero_grad()
                continue
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 1:
                assert all(torch.equal(t, before[n]) for n, t in handle.named_tensors().items())
        ends.append(masters_bits(handle))
    assert all(t.dtype is torch.float32 and t.isfinite().all() for t in ends[1].values())
    assert all(torch.equal(ends[0][n], t) for n, t in ends[1].items())


@pytest.mark.parametrize("kind", ["red", "noreft", "direft"])
@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
def test_gradients_under_autocast_are_those_of_the_plain_path(site, kind):
    """Under autocast a fused add has bf16 and fp32 rows. Exact: the plain path, whose edit has one dtype, in fp32."""
    grads = []
    for fused, cast in ((True, True), (False, True), (False, False)):
        model = fresh().train()
        handle = scrambled(fe.patch(model, KINDS[kind](site=site), fused=fused, freeze=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(**tiny.inputs("llama")).logits.float().square().mean()
        loss.backward()
        grads.append([p.grad for p in handle.parameters()])
    for got, eager, exact in zip(*grads, strict=True):
        error, allowed = (got - exact).abs().max(), (eager - exact).abs().max()
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()


# --- gradient checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fused", PATHS)
def test_checkpointing_gives_the_same_gradients_bit_for_bit(fused, reentrant):
    """On the plain path nothing is computed otherwise. On the fused one a norm that is carried to the next layer is
    computed by the layer's own module instead, in another order: rounding."""
    grads = []
    for checkpointed in (False, True):
        model = fresh().train()
        handle = scrambled(fe.patch(model, one_of_each("llama"), fused=fused, freeze=True))
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**tiny.inputs("llama"), use_cache=False).logits.square().mean().backward()
        grads.append([p.grad for p in handle.parameters()])
    assert len(grads[0]) == len(list(handle.parameters()))
    for a, b in zip(*grads, strict=True):
        if fused:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
        else:
            assert torch.equal(a, b) and a.abs().sum() > 0


# --- quantised bases ------------------------------------------------------------------------------------------


def quantised(how):
    """A tiny Llama whose linear maps hold 4- or 8-bit weights."""
    model = fresh(**WIDE)
    if how == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda m, name: "proj" in name)
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if not isinstance(old, torch.nn.Linear):
                    continue
                if how == "bitsandbytes 4-bit":
                    new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
                    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
                else:
                    new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
                parent._modules[name] = new.to("cpu")
    return model.eval()


@pytest.mark.parametrize("how", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"])
def test_a_quantised_base_is_edited_trained_and_not_merged(how):
    from fastedit.patching.merge import MergeError

    model = quantised(how)
    slow = copy.deepcopy(model)
    given = tiny.inputs("llama")
    with torch.no_grad():
        bare = model(**given).logits
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.zeros(64), site="attn")], freeze=True)
    assert {row["path"] for row in handle.report().rows} == {"fused"}
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, bare, rtol=1e-4, atol=1e-4)
    scrambled(handle)
    for layer, (_, _, masters) in zip(find_layers(slow), list(handle._each())[:3], strict=True):
        scale, bias = masters.scale.detach(), masters.bias.detach()
        layer.at("mlp").register_forward_hook(lambda m, a, o, s=scale, b=bias: s * o + b)
    for layer, (_, _, masters) in zip(find_layers(slow), list(handle._each())[3:], strict=True):
        layer.at("attn").register_forward_hook(lambda m, a, o, b=masters.bias: o + b)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, slow(**given).logits, rtol=1e-4, atol=1e-4)
    model(**given).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())
    with pytest.raises(MergeError, match=r"quantized|expected a plain"):
        handle.merge()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, bare)


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["adapter first", "edit first"])
def test_an_edit_and_lora_train_together(order, tmp_path):
    """What trains is both and nothing else, and both have moved."""
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    base = fresh()
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    if order == "adapter first":
        model = peft.get_peft_model(base, lora)
        handle = fe.patch(model, fe.RED())
    else:
        handle = fe.patch(base, fe.RED(), freeze=True)
        model = peft.get_peft_model(base, lora)
        for parameter in handle.parameters():  # PEFT freezes all that is not its own
            parameter.requires_grad_(True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 2 * 2 + 2 * tiny.LAYERS
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, tiny.VOCABULARY, (16, 6))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8, num_train_epochs=2, report_to=[],
        learning_rate=1e-2, disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    handle.save(tmp_path / "edit")
    assert all(p.dtype is torch.float32 for p in handle.parameters())


def test_every_kind_is_tested():
    """The stacks above hold every kind in mode_cases."""
    assert len(one_of_each("llama")) == len(KINDS)
