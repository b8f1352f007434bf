"""Every family at every site: what an edited model computes, that it comes back bit for bit, and its sizes."""

import copy

import pytest
import tiny_models as tiny
import torch
import transformers
import zoo
from patch_cases import random_form, scaled_then_low_rank, scrambled, tiny_plain

import fastedit as fe
from fastedit.families import TABLE, find_layers
from fastedit.patching.merge import MergeError

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16)
ADDED = ("mlp", "attn", "block")


def identities(name, sites=None):
    return [fe.ScaleBias(site=site) for site in sites or zoo.sites(name)]


@pytest.mark.parametrize("name", zoo.CASES)
def test_sites_are_where_they_are_written_down_and_as_wide(name):
    model = zoo.build(name)
    layers = find_layers(model)
    assert [layer.module for layer in layers] == zoo.layers(model, name)
    assert sum(family.matches(layers[0].module) for family in TABLE) == 1
    handle = fe.patch(model, identities(name), fused=False)
    for number, site in enumerate(zoo.sites(name)):
        spots = zoo.spots(model, name, site)
        found = {layer.index: layer.at(site) for layer in layers if layer.at(site) is not None}
        assert found == {index: module for index, module, _ in spots}
        for index, _, width in spots:
            assert handle.named_tensors()[f"{number}.{layers[index].name}.{site}.scale"].shape == (width,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", zoo.CASES)
def test_identity_edits_leave_the_logits_bits(name, dtype):
    """On the fused path wherever no norm is fused: a hook on a norm means that it is called."""
    model = zoo.build(name, dtype)
    said = zoo.output(model, name)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda m, a, o: None)
    for fused in (False, True):
        for sites in ([s for s in zoo.sites(name) if s != "attn"], ["attn"]):
            with tiny.quiet(fe.patch, model, identities(name, sites), fused=fused) as handle:
                assert torch.equal(zoo.output(model, name), said)
                if fused:
                    rows = handle.report().rows
                    carried = {row["site"] for row in rows if row["path"] == "fused"}
                    assert carried == zoo.CASES[name].fused & set(sites)
                    assert all(row["path"].startswith("plain: ") for row in rows if row["path"] != "fused")
                scrambled(handle)
                assert not torch.equal(zoo.output(model, name), said)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", zoo.CASES)
def test_an_edit_at_any_site_equals_plain_hooks(name, dtype):
    model = zoo.build(name, dtype)
    wide = zoo.exact(model)
    for site in zoo.sites(name):
        forms = {index: random_form(width=width, seed=index) for index, _, width in zoo.spots(model, name, site)}
        forms.pop(1, None)  # one layer without, so that it shows which is edited
        if not forms:
            forms = {1: random_form(width=zoo.spots(model, name, site)[0][2])}
        eager = zoo.output(zoo.hook_reference(model, name, site, forms), name)
        reference = zoo.output(zoo.hook_reference(wide, name, site, forms), name)
        edits = [e for index, form in forms.items() for e in scaled_then_low_rank(form, site, [index])]
        for fused in (True, False) if site in ADDED else (True,):
            with tiny.quiet(fe.patch, model, edits, fused=fused):
                tiny.assert_promise(zoo.output(model, name), eager, reference)


@pytest.mark.parametrize("name", [name for name in zoo.CASES if name not in ("vit", "whisper")])
def test_positions_at_every_site(name):
    """Nowhere: the bits of the model. Everywhere: the edit without positions, at the tokens that are not padding."""
    model, given = zoo.build(name), zoo.inputs(name)
    said, real = zoo.output(model, name), given["attention_mask"].bool()
    if zoo.CASES[name].decoder:
        real = torch.ones_like(given["decoder_input_ids"], dtype=torch.bool)
    real = real if said.dim() == 3 else slice(None)
    nowhere, everywhere = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    for site in zoo.sites(name):
        found = []
        for positions, fused in (("mask", False), ("mask", True), (None, True)):
            edit = fe.ScaleBias(site=site, positions=positions)
            with tiny.quiet(fe.patch, model, edit, fused=fused) as handle:
                scrambled(handle)
                if positions == "mask":
                    handle.mask(nowhere)
                    apart = float((zoo.output(model, name) - said).abs().max())
                    assert apart <= (1e-5 if fused else 0.0), site  # a fused norm rounds as it will
                    handle.mask(everywhere)
                found.append(zoo.output(model, name)[real])
                handle.mask(None)
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4, msg=lambda m, site=site: f"{site}: {m}")
        torch.testing.assert_close(*found[1:], rtol=1e-4, atol=1e-4, msg=lambda m, site=site: f"{site}: {m}")
        assert not torch.equal(found[0], said[real]), site


@pytest.mark.parametrize("name", zoo.CASES)
def test_removal_gives_every_bit_back_and_files_keep_every_site(name, tmp_path):
    model = zoo.build(name)
    other = copy.deepcopy(model)
    before, said = tiny.state(model), zoo.output(model, name)
    handle = scrambled(fe.patch(model, identities(name)))
    edited = zoo.output(model, name)
    assert not torch.allclose(edited, said)
    handle.save(tmp_path)
    loaded = fe.load(other, tmp_path)
    assert loaded.config() == handle.config() and torch.equal(zoo.output(other, name), edited)
    assert torch.equal(zoo.output(copy.deepcopy(model), name), edited)
    torch.testing.assert_close(zoo.output(tiny_plain(model), name), edited, rtol=1e-4, atol=2e-5)
    handle.remove()
    tiny.assert_same_state(model, before)
    assert torch.equal(zoo.output(model, name), said)


# --- what fused layers step back for ------------------------------------------------------------------------

DROPOUTS = {
    "phi3": ("resid_pdrop",), "gpt_neox": ("hidden_dropout",), "gpt_neox-sequential": ("hidden_dropout",),
    "falcon": ("hidden_dropout",), "falcon-rw": ("hidden_dropout", "attention_dropout"), "opt": ("dropout",),
    "opt-350m": ("dropout",), "bart": ("dropout", "activation_dropout"), "whisper": ("dropout", "activation_dropout"),
    "vit": ("hidden_dropout_prob",), "modernbert": ("attention_dropout", "mlp_dropout"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUTS)
def test_active_dropout_drops_what_it_drops_on_the_plain_path(name):
    model = zoo.build(name, **dict.fromkeys(DROPOUTS[name], 0.3)).train()
    scrambled(fe.patch(model, identities(name, ADDED)))
    results = []
    for edited in (model, tiny_plain(model)):
        torch.manual_seed(4)
        results.append(zoo.output(edited, name))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(results[0], zoo.output(model, name)), "no dropout was active"


STEPS = ("phi3", "gemma2", "olmo2", "gpt_neox", "falcon-40b", "falcon-rw", "opt", "opt-350m", "bart", "whisper", "vit",
         "modernbert")  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_hooks_see_and_change_what_they_do_on_the_plain_path(name):
    model = zoo.build(name)
    scrambled(fe.patch(model, identities(name, ADDED)))
    plain = tiny_plain(model)
    inside = [key for key, _ in zoo.layers(model, name)[0].named_modules() if "act" not in key and "drop" not in key]
    for key in inside:
        seen, results = [], []
        for edited in (model, plain):

            def change(module, args, output, seen=seen):
                rows = output[0] if isinstance(output, tuple) else output
                seen.append(rows.clone())
                rows = torch.tanh(rows) * 1.5
                return (rows, *output[1:]) if isinstance(output, tuple) else rows

            hook = zoo.layers(edited, name)[0].get_submodule(key).register_forward_hook(change)
            results.append(zoo.output(edited, name))
            hook.remove()
        assert len(seen) == 2, key
        torch.testing.assert_close(*seen, rtol=1e-4, atol=5e-5, msg=f"seen at {key!r}")
        torch.testing.assert_close(*results, rtol=1e-4, atol=5e-5, msg=f"after a change at {key!r}")


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_the_plain_path(name):
    model = zoo.build(name)
    handle = scrambled(fe.patch(model, identities(name), freeze=True))
    plain = tiny_plain(model)
    grads = []
    for edited in (model, plain):
        edited(**zoo.inputs(name)).logits.square().sum().backward()
        grads.append([p.grad for key, p in edited.named_parameters() if key.startswith("fastedit.")])
    assert len(grads[0]) == len(list(handle.parameters()))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-6


# --- sites of the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site, layers, says", [
    ("embed", 1, "not of layer 1: leave layers= out .* kept with encoder.0, decoder.0"),
    ("final", [0, -1], "not of layer 0: .* kept with decoder.1"), ("final", "encoder", "not of layer 'encoder'"),
])  # fmt: skip
def test_sites_of_the_model_take_no_layer(site, layers, says):
    model = zoo.build("t5")
    before = tiny.state(model)
    with pytest.raises(ValueError, match=says):
        fe.patch(model, fe.ScaleBias(site=site, layers=layers))
    tiny.assert_same_state(model, before)


def test_a_stack_may_be_named_for_its_embedding():
    model = zoo.build("t5")
    handle = fe.patch(model, fe.ScaleBias(site="embed", layers="decoder"))
    assert handle.config()[0]["layers"] == [2] and next(iter(handle.named_tensors())) == "0.decoder.0.embed.scale"
    assert fe.patch(model, fe.ScaleBias(site="embed")).config()[0]["layers"] == [0, 2]
    assert fe.patch(model, fe.ScaleBias(site="final", layers=-1)).config()[0]["layers"] == [3]


def test_vectors_of_another_width_are_refused_with_the_site():
    model = zoo.build("mistral")
    with pytest.raises(ValueError, match=r"scale has width 32, but site 'k' of layer layers\.0 is 16 wide"):
        fe.patch(model, fe.ScaleBias(torch.ones(32), site="k"))
    with pytest.raises(ValueError, match=r"bias has width 32, but site 'ffn_in' of layer layers\.0 is 48 wide"):
        fe.patch(model, fe.Steer(torch.ones(32), site="ffn_in"))


def test_a_mixture_has_no_ffn_in_and_says_so():
    with pytest.raises(ValueError, match=r"'ffn_in' was not found in MixtralDecoderLayer.*no single last linear map"):
        fe.patch(zoo.build("mixtral"), fe.ScaleBias(site="ffn_in"))


def test_a_fused_projection_of_an_unknown_layout_is_refused():
    model = zoo.build("phi3")
    before = tiny.state(model)
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"qkv_proj has 64 outputs, expected 1 × .*edit 'attn' instead"):
        fe.patch(model, fe.ScaleBias(site="q"))
    assert before["classes"] == tiny.state(model)["classes"]


# --- sizes --------------------------------------------------------------------------------------------------

DEFAULTS = ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM",
            "Olmo2ForCausalLM", "Gemma2ForCausalLM", "GPTNeoXForCausalLM", "FalconForCausalLM", "OPTForCausalLM",
            "Qwen3MoeForCausalLM", "BertForMaskedLM", "DebertaV2ForMaskedLM", "ModernBertForMaskedLM",
            "ViTForImageClassification")  # fmt: skip


def test_red_has_two_numbers_a_feature_and_layer_at_full_size():
    for kind in (getattr(transformers, name) for name in DEFAULTS):
        config = kind.config_class()
        with torch.device("meta"):
            model = kind(config)
        handle = fe.patch(model, fe.RED())
        assert handle.num_parameters() == 2 * config.hidden_size * config.num_hidden_layers, kind


@pytest.mark.parametrize("name, changes, expected", [
    ("RobertaModel", {}, 92_160), ("GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 245_760),
])  # fmt: skip
def test_red_plus_has_its_published_number_of_parameters(name, changes, expected):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**changes))
    handle = tiny.quiet(fe.patch, model, fe.REDPlus(), freeze=True)
    assert handle.num_parameters() == expected
    assert {edit.site for edit in handle.edits} == {"q", "k", "v", "attn", "mlp"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'site'"):
        fe.REDPlus(site="mlp")


# --- merging ------------------------------------------------------------------------------------------------

MAPS = ("q", "k", "v", "attn", "ffn_in", "mlp")
MERGED = ("mistral", "phi3", "gpt_neox", "falcon-40b", "gpt2", "opt", "deberta", "modernbert", "bart")


@pytest.mark.filterwarnings("ignore:merging gave")
@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_says_what_the_edited_one_says(name):
    model = zoo.build(name)
    before = tiny.state(model)
    edits = []
    for site in MAPS:
        for index, _, width in zoo.spots(model, name, site)[:1]:
            edits += scaled_then_low_rank(random_form(width=width), site, [index])
    handle = fe.patch(model, edits, fused=False)
    patched, edited, exact = tiny.state(model), zoo.output(model, name), zoo.output(zoo.exact(model), name)
    handle.merge()
    tiny.assert_promise(zoo.output(model, name), edited, exact)
    handle.unmerge()
    tiny.assert_same_state(model, patched)
    handle.merge()
    handle.remove()
    tiny.assert_same_state(model, before)


def test_handles_merged_into_one_projection_are_unmerged_from_the_last():
    model = zoo.build("gpt2")
    before = tiny.state(model)
    handles = [scrambled(fe.patch(model, fe.ScaleBias(site=site))) for site in "qk"]
    edited = zoo.output(model, "gpt2")
    for handle in handles:
        handle.merge()
    torch.testing.assert_close(zoo.output(model, "gpt2"), edited, rtol=1e-4, atol=1e-5)
    with pytest.raises(MergeError, match="unmerge that one first"):
        handles[0].unmerge()
    for handle in reversed(handles):
        handle.unmerge()
        handle.remove()
    tiny.assert_same_state(model, before)


def test_the_merged_biases_of_a_fused_projection_are_saved_and_reloaded(tmp_path):
    model = zoo.build("modernbert")
    handle = scrambled(fe.patch(model, [fe.ScaleBias(site="v"), fe.ScaleBias(site="ffn_in")]))
    tiny.quiet(handle.merge)
    merged = zoo.output(model, "modernbert")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.attention_bias and again.config.mlp_bias
    assert torch.equal(zoo.output(again, "modernbert"), merged)


def test_final_is_not_merged():
    model = zoo.build("llama")
    with pytest.raises(MergeError, match="to run"):
        fe.patch(model, fe.ScaleBias(site="final")).merge()


# --- how models are run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gpt_neox", "falcon", "falcon-rw", "opt", "bart"])
def test_generation_with_a_cache_is_that_of_the_plain_path_without(name):
    model = zoo.build(name)
    scrambled(fe.patch(model, identities(name)))
    given = {"input_ids": zoo.inputs(name)["input_ids"], "max_new_tokens": 5, "do_sample": False}
    told = model.generate(**given)
    assert torch.equal(told, tiny_plain(model).generate(**given, use_cache=False))


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "gpt2", "bart"])
def test_checkpointing_recomputes_the_same_gradients(name):
    model = zoo.build(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in zoo.layers(model, name):
        for key in ("dropout", "activation_dropout"):
            if isinstance(getattr(layer, key, None), float):
                setattr(layer, key, 0.0)
    scrambled(fe.patch(model, identities(name), freeze=True))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**zoo.inputs(name)).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for once, twice in zip(*grads, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_an_overflow_of_whispers_encoder_is_clamped_before_the_edit():
    model = zoo.build("whisper", torch.float16)
    layer = model.model.encoder.layers[1]
    with torch.no_grad():
        layer.fc2.bias.fill_(3e4)
    handle = fe.patch(model, fe.ScaleBias(torch.full((zoo.WIDTH,), 0.5), site="block"))
    assert {row["path"] for row in handle.report().rows} == {"fused"}
    hidden = torch.full((1, 3, zoo.WIDTH), 6e4, dtype=torch.float16)
    with torch.no_grad():
        fused, plain = layer(hidden, None), tiny_plain(model).model.encoder.layers[1](hidden, None)
    assert torch.equal(fused, plain) and fused.max() == (65504 - 1000) / 2


def test_a_compiled_model_says_what_the_eager_one_says():
    model = zoo.build("gpt_neox")
    scrambled(fe.patch(model, identities("gpt_neox")))
    said = zoo.output(model, "gpt_neox")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(zoo.output(compiled, "gpt_neox"), said, rtol=1e-4, atol=1e-5)


def test_sites_of_one_module_are_edited_beside_each_other():
    """`q`, `k` and `v` of one projection, the input and the output of one linear map, in any order of patching."""
    model = zoo.build("gpt2")
    forms = {site: random_form(width=zoo.width_of("gpt2", site), seed=n) for n, site in enumerate(("q", "v", "ffn_in", "mlp"))}
    slow = model
    for site, form in forms.items():
        slow = zoo.hook_reference(slow, "gpt2", site, {0: form, 1: form})
    expected = zoo.output(slow, "gpt2")
    for order in (list(forms), list(reversed(forms))):
        edits = [e for site in order for e in scaled_then_low_rank(forms[site], site, None)]
        for fused in (True, False):
            with fe.patch(model, edits, fused=fused):
                torch.testing.assert_close(zoo.output(model, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_the_last_layers_block_is_edited_before_what_the_head_reads():
    model, block, final = zoo.build("bert"), random_form(seed=1), random_form(seed=2)
    slow = zoo.hook_reference(zoo.hook_reference(model, "bert", "block", {1: block}), "bert", "final", {1: final})
    edits = scaled_then_low_rank(final, "final", None) + scaled_then_low_rank(block, "block", [1])
    fe.patch(model, edits)
    torch.testing.assert_close(zoo.output(model, "bert"), zoo.output(slow, "bert"), rtol=1e-4, atol=1e-5)


def test_a_forward_of_the_instance_means_hooks_for_every_kind_of_site():
    model = zoo.build("gpt2")
    edits = identities("gpt2", ("q", "v", "ffn_in", "embed", "block", "final"))
    handle = scrambled(fe.patch(model, edits))
    edited, tensors = zoo.output(model, "gpt2"), handle.named_tensors()
    handle.remove()
    replaced = [model.transformer.ln_f]
    for layer in model.transformer.h:
        replaced += [layer, layer.attn.c_attn, layer.mlp.c_proj]
    for module in replaced:
        module.forward = lambda *a, forward=module.forward, **k: forward(*a, **k)
    before = tiny.state(model)
    handle = fe.patch(model, edits)
    handle.load_tensors(tensors)
    torch.testing.assert_close(zoo.output(model, "gpt2"), edited, rtol=1e-4, atol=1e-5)
    handle.remove()
    tiny.assert_same_state(model, before)
