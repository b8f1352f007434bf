"""Tiny models on disk that both libraries load, edits for them, and what Hugging Face's model says under each edit."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip

import torch
import transformers

import fastedit as fe

WIDTH, LAYERS, VOCABULARY, TOKENS = 64, 2, 128, 8
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256}
_LLAMA = _COMMON | {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.25, "head_dim": 32,
}  # fmt: skip
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256, "initializer_range": 0.25}
_OPT = {
    "hidden_size": WIDTH, "ffn_dim": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "word_embed_proj_dim": WIDTH,
    "init_std": 0.25,
}  # fmt: skip
_GEMMA3 = {  # layers of both kinds, the windows shorter than the prompts
    "initializer_range": 0.05, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
    "query_pre_attn_scalar": 32,
}  # fmt: skip
_QWEN2 = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
FAMILIES = {
    "llama": ("Llama", _LLAMA), "qwen2": ("Qwen2", _QWEN2), "qwen3": ("Qwen3", _LLAMA), "mistral": ("Mistral", _LLAMA),
    "gemma": ("Gemma", _LLAMA), "gemma2": ("Gemma2", _LLAMA | _GEMMA3 | {"initializer_range": 0.03}),
    "gemma3": ("Gemma3", _LLAMA | _GEMMA3), "opt": ("OPT", _COMMON | _OPT),
    "gpt2": ("GPT2", _GPT2 | {k: v for k, v in _COMMON.items() if k != "max_position_embeddings"}),
}  # fmt: skip
GREEDY = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}


def save_model(family, folder):
    """A random model of the family, fp32, with a tokenizer whose words are "t0" to "t127"; returns the model."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    head = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    name = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    model = getattr(transformers, head)(getattr(transformers, name)(**config)).eval()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t0")


def random(*shape, seed=0, size=0.5):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edits(seed=0):
    """One of each kind that a request may name."""
    vectors = random(LAYERS, WIDTH, seed=seed)
    return {
        "red": [fe.ScaleBias(1 + random(LAYERS, WIDTH, seed=seed + 1), random(LAYERS, WIDTH, seed=seed + 2))],
        "steer": [fe.Steer(vectors, site="block")],
        "low-rank": [fe.LowRank(random(2, WIDTH, seed=seed + 3), None, random(2, WIDTH, seed=seed + 4), site="attn")],
        "stacked": [
            fe.Ablate(random(WIDTH, seed=seed + 5), site="block"), fe.Steer(vectors, site="mlp"),
            fe.ScaleBias(1 + random(LAYERS, WIDTH, seed=seed + 6), None, site="mlp", strength=0.5),
        ],
        "gated": [
            fe.Steer(vectors, site="block").when(fe.Gate(vectors[0], kind="cosine", threshold=0.05)),
            fe.ScaleBias(None, vectors, site="mlp").when(fe.Gate(vectors[1], sharpness=2.0)),
        ],
        "generated": [fe.Steer(vectors, site="block", positions="generated")],
        "ends": [fe.Steer(2 * vectors, site="mlp", positions="first 2 + last 1")],
    }  # fmt: skip


def save_edit(model, folder, stack):
    with fe.patch(model, stack) as handle:
        handle.save(folder)


def save_edits(model, folder):
    """Each of `edits` under its name."""
    for name, stack in edits().items():
        save_edit(model, folder / name, stack)


def answers(model, stack, prompts, strength=1.0):
    """The greedy tokens of Hugging Face's model after each of `prompts` (of one length), under a stack of edits."""
    handle = fe.patch(model, stack) if stack else None
    try:
        if handle is not None:
            handle.strength = strength
        ids = torch.tensor(prompts)
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out[:, ids.shape[1] :].tolist()
    finally:
        if handle is not None:
            handle.remove()


def predicted(model, stack, prompt, answer):
    """fp32 logits (tokens, vocabulary) of each token of `answer` by one forward, under a stack on all tokens."""
    handle = fe.patch(model, stack) if stack else None
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 :].float()
    finally:
        if handle is not None:
            handle.remove()


def prompts(count, length=6, seed=0):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def start(model_folder, edits_folder=None, **changes):
    """An offline engine in this process."""
    from vllm import LLM

    if edits_folder is not None:
        options = {"edits": str(edits_folder)} | changes.pop("fastedit", {})
        changes["additional_config"] = {"fastedit": options}
    settings = {
        "dtype": "float32", "max_model_len": 192, "enforce_eager": True, "max_num_seqs": 16, "block_size": 32,
        "max_num_batched_tokens": 256, "skip_tokenizer_init": True,
    }  # fmt: skip
    return LLM(str(model_folder), **settings | changes)


def bank_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.fastedit


def params(name=None, strength=None, **changes):
    from vllm import SamplingParams

    given = {} if name is None else {"fastedit": name}
    given |= {} if strength is None else {"fastedit_strength": strength}
    return SamplingParams(**GREEDY | {"extra_args": given or None, "detokenize": False} | changes)


def tokens(llm, asked, **changes):
    """The tokens of [(prompt, name, strength), …], all at once."""
    inputs = [{"prompt_token_ids": prompt} for prompt, _, _ in asked]
    found = llm.generate(inputs, [params(name, s, **changes) for _, name, s in asked], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


_NAMES = (
    "", "..", "../red", "/etc/passwd", "red/edit.json", "x" * 300, "\0", "nobody", "red ", "é", 7, None,
)  # fmt: skip
_STRENGTHS = (
    1.0, 0, -0.5, 2, 1e39, -3e38, float("nan"), float("inf"), "1", None, True, 10**400, [], [1.0], [1.0, 0.5], {}, b"1",
)  # fmt: skip
_KEYS = (
    "fastedit", "fastedit_strength", "fastedit", "fastedit_strength", "fastedit_strengths", "Fastedit", "fastedit_plan",
    "cache_salt", "other",
)  # fmt: skip


def any_content(draw, *served):
    """The extra arguments of a request as a client may write them: a sound one's, one or two of them replaced or added."""
    given = {"fastedit": draw.choice(served), "fastedit_strength": 1.0}
    given = {key: value for key, value in given.items() if draw.random() < 0.8}
    return given | {draw.choice(_KEYS): _value(draw, served + _NAMES) for _ in range(draw.choice((1, 1, 2)))}


def _value(draw, names):
    value = draw.choice(names + _STRENGTHS)
    if draw.random() < 0.3:
        value = [draw.choice(names if draw.random() < 0.5 else _STRENGTHS) for _ in range(draw.choice((1, 2, 2, 20, 400)))]
    return [value] if draw.random() < 0.05 else value
