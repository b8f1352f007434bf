"""The table in docs/families.md is what patching says of the models in zoo.py. Run as a script, this writes it."""

import pathlib
import warnings

import pytest
import torch
import zoo

import fastedit as fe
from fastedit.edits.sites import SITES

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "families.md"
NAMES = {
    "llama": "Llama, SmolLM", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "phi3": "Phi-3, Phi-4",
    "granite": "Granite", "olmo2": "OLMo 2", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)",
    "gpt_neox": "GPT-NeoX, Pythia", "gpt_neox-sequential": "GPT-NeoX, not parallel", "falcon": "Falcon-7B",
    "falcon-40b": "Falcon-40B, -180B", "falcon-rw": "Falcon-RW, not parallel", "opt": "OPT", "opt-350m": "OPT-350m (post-norm)",
    "gpt2": "GPT-2", "mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE", "bert": "BERT",
    "roberta": "RoBERTa", "deberta": "DeBERTa", "deberta-v2": "DeBERTa-v2, -v3", "modernbert": "ModernBERT",
    "t5": "T5, both stacks", "bart": "BART, both stacks", "vit": "ViT", "whisper": "Whisper, both stacks",
}  # fmt: skip


def cells(name):
    """{site: how an edit alone there runs}"""
    model, found = zoo.build(name), dict.fromkeys(SITES, "–")
    for site in zoo.sites(name):
        with fe.patch(model, fe.ScaleBias(site=site)) as handle:
            paths = {row["path"].partition(":")[0] for row in handle.report().rows}
        assert len(paths) == 1, (name, site, paths)
        found[site] = paths.pop().replace("fused", "**fused**")
    return found


def table():
    lines = ["| family | " + " | ".join(f"`{site}`" for site in SITES) + " |", "|---" * (len(SITES) + 1) + "|"]
    lines += [f"| {NAMES[name]} | " + " | ".join(cells(name).values()) + " |" for name in zoo.CASES]
    return "\n".join(lines)


def page(text):
    head, rest = text.split("<!-- table -->\n")
    return f"{head}<!-- table -->\n{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_page_says_what_patching_says():
    assert set(NAMES) == set(zoo.CASES)
    torch.set_num_threads(1)  # as in test_every_family.py
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "docs/families.md is out of date: python tests/families/test_families_page.py writes it anew"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
