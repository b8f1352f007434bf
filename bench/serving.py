"""Tokens per second of a vLLM engine: 64 requests under 64 edits beside the same requests unedited, and beside plain vLLM.

    .venv-vllm/bin/python -m bench.serving --blocks 9 --rounds 9    # width 512, 4 layers, 64 requests of 16 + 16 tokens

Two engines in one process, one configured for edits and one not, take turns over the same requests; greedy, prefix caching
off. `edited`, `steered`: each request names an edit of its own (RED on mlp; a vector on block). `unedited`: none does, on
the engine that serves edits. `unused`: the engine without edits, the plugin loaded. `plain`: the same with vLLM's own
process_inputs put back, as without the plugin. Ratios are of tokens per second; the interval is over blocks. Where all
rounds would take longer than --minutes, fewer are made, which is said. Rows go to bench/results/serving-cpu.csv.
"""

import argparse
import csv
import os
import pathlib
import tempfile

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastedit as fe
from fastedit.verifying.timing import interleave, quantiles, ratio, time_once

from .machine import about

BESIDE = [("edited", "unedited"), ("steered", "unedited"), ("edited", "plain"), ("unedited", "plain"), ("unused", "plain")]
FIELDS = (
    "what", "beside", "mode", "dtype", "width", "layers", "requests", "edits", "prompt", "tokens", "blocks", "rounds",
    "ratio", "interval", "tokens_per_second_p20", "tokens_per_second_p50", "tokens_per_second_p80",
)  # fmt: skip


def save_model(folder, width, layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, pad_token_id=0,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def save_edits(model, folder, count):
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        scale, bias, vectors = (0.05 * torch.randn(layers, width, generator=draw) for _ in range(3))
        for kind, edit in (("red", fe.ScaleBias(1 + scale, bias)), ("steer", fe.Steer(vectors, site="block"))):
            with fe.patch(model, [edit]) as handle:
                handle.save(folder / kind / f"edit-{number}")


def engine(folder, chosen, **more):
    from vllm import LLM

    return LLM(
        str(folder), skip_tokenizer_init=True, dtype=chosen.dtype, max_model_len=256, enforce_eager=not chosen.compiled,
        max_num_seqs=chosen.requests, max_num_batched_tokens=2048, enable_prefix_caching=False, block_size=32, **more,
    )  # fmt: skip


def requests(chosen, named):
    from vllm import SamplingParams

    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4096, (chosen.requests, chosen.prompt), generator=draw).tolist()
    common = {"temperature": 0.0, "max_tokens": chosen.tokens, "ignore_eos": True, "detokenize": False}
    extra = [{"fastedit": f"edit-{i % chosen.edits}"} if named else None for i in range(chosen.requests)]
    return [{"prompt_token_ids": prompt} for prompt in ids], [SamplingParams(**common, extra_args=e) for e in extra]


def variants(chosen, base):
    """{what: a run of all requests}"""
    from vllm.v1.engine.input_processor import InputProcessor

    save_edits(save_model(base / "model", chosen.width, chosen.layers), base / "edits", chosen.edits)
    serve = {
        kind: engine(base / "model", chosen, additional_config={"fastedit": {"edits": str(base / "edits" / kind)}})
        for kind in ("red", "steer")
    }
    bare = engine(base / "model", chosen)
    ours, theirs = InputProcessor.process_inputs, InputProcessor.process_inputs.__wrapped__

    def run(llm, named):
        inputs, params = requests(chosen, named)
        return lambda: llm.generate(inputs, params, use_tqdm=False)

    def plain():
        InputProcessor.process_inputs = theirs
        try:
            unused()
        finally:
            InputProcessor.process_inputs = ours

    unused = run(bare, False)
    return {
        "edited": run(serve["red"], True), "steered": run(serve["steer"], True), "unedited": run(serve["red"], False),
        "unused": unused, "plain": plain,
    }  # fmt: skip


def within(found, chosen):
    """Rounds a block that all fit into --minutes, by a second run of each variant."""
    for run in found.values():
        run()
    once = sum(time_once(run) for run in found.values())
    fitting = int(60 * chosen.minutes / once / chosen.blocks)
    if fitting < chosen.rounds:
        print(f"a round takes {once:.1f} s: {max(1, fitting)} rounds a block, not {chosen.rounds} (--minutes)", flush=True)
    return max(1, min(chosen.rounds, fitting))


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description="Edits in vLLM.")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="vLLM's torch.compile instead of eager")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="of measuring, at most")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        found = variants(chosen, pathlib.Path(base))
        chosen.rounds = within(found, chosen)
        medians = interleave(found, blocks=chosen.blocks, rounds=chosen.rounds, warmup=0)
    where = about() | {"mode": "compiled" if chosen.compiled else "eager"}
    where |= {key: getattr(chosen, key) for key in FIELDS[3:12]}
    chosen.out.mkdir(parents=True, exist_ok=True)
    with open(chosen.out / "serving-cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *about()))
        writer.writeheader()
        for what, beside in BESIDE:
            found, interval = ratio(medians, beside, what)  # of times: the inverse is that of tokens per second
            speed = quantiles([chosen.requests * chosen.tokens / seconds for seconds in medians[what]])
            row = {f"tokens_per_second_p{p}": f"{s:.1f}" for p, s in zip((20, 50, 80), speed, strict=True)}
            row |= {"what": what, "beside": beside, "ratio": f"{found:.4f}", "interval": f"{interval:.4f}"}
            writer.writerow(where | row)
            print(f"{what}: {found:.3f} ± {interval:.3f} of {beside}, {speed[1]:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
