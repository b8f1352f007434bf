"""SFT and DPO by whoever runs this: one process, or two under `accelerate launch`; the edits are saved in a folder."""

import sys
from pathlib import Path

import tiny_models as tiny
import torch
from accelerate import PartialState
from chat_tokenizers import tokenizer_of

import fastedit as fe
from fastedit import training

ROWS = [{"prompt": f"say {c}: ", "response": c * n} for n, c in enumerate("abcdefgh", 2)]
PAIRS = [{"prompt": f"say {c}: ", "chosen": c * 3, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]


def main(folder):
    torch.set_num_threads(1)
    alone = PartialState().num_processes == 1
    given = {
        "epochs": 2, "batch_size": 8 if alone else 4, "lr": 1e-2, "use_cpu": True, "optim": "sgd", "max_grad_norm": 0.0,
        "warmup_steps": 0,
    }  # fmt: skip
    for name in ("sft", "dpo"):
        torch.manual_seed(0)
        model = tiny.build("llama", vocab_size=160)
        handle = fe.patch(model, fe.RED(positions="last 2"), freeze=True)
        if name == "sft":
            training.sft(handle, tokenizer_of(), ROWS, output_dir=folder / "run", **given)
        else:
            training.prefer(handle, tokenizer_of(), PAIRS, **given)
        if PartialState().is_main_process:
            handle.save(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
