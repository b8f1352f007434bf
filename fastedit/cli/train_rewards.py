"""`fastedit train --task reward`: an edit and a scalar head on a causal model, from preference rows."""

from pathlib import Path

from rich.console import Console

from .loading import SIZES, load_model, trainer_options
from .train import edits_of
from .train_responses import as_chat, split

_OWN = {
    "rank": 4, "layers": None, "positions": None, "site": None, "evaluate": None, "lr": 2e-3, "epochs": 2, "batch_size": 8,
    "rows": None, "prompt_tokens": 1024, "response_tokens": 512, "chat": False, "shifted": None, "ascent": 0.0, "seed": 0,
}  # fmt: skip


def defaults(task):
    return _OWN | SIZES


def run(model, data, out, method, task, *, rank, layers, positions, site, evaluate, lr, epochs, batch_size, rows, prompt_tokens,
        response_tokens, chat, shifted, ascent, seed, device, dtype, device_map, quantize, accumulate, checkpointing,
        resume):  # fmt: skip
    from ..texts.data_files import read_rows

    train, held = split(data, evaluate, rows, seed)
    others = [] if shifted is None else read_rows(shifted)
    if chat:
        train, held, others = ([as_chat(row) for row in part] for part in (train, held, others))
    edits = edits_of(method, rank=rank, seed=seed, layers=layers, positions=positions, site=site)
    loaded, tokenizer = load_model(model, device, dtype, device_map, quantize)
    from .. import patch, training
    from ..patching import edit_folder as store
    from ..training.rewards import ranked
    from .progress import TrainingBar, bars

    console, reward = Console(), training.RewardModel(loaded)
    handle = patch(loaded, edits, freeze=True)
    before = ranked(reward, tokenizer, held, batch_size)
    with bars(console) as progress:
        training.fit_reward(
            reward, handle, tokenizer, train, shifted=others, ascent=ascent, lr=lr, epochs=epochs, batch_size=batch_size,
            prompt=prompt_tokens, response=response_tokens, seed=seed, callbacks=[TrainingBar(progress, task)],
            output_dir=Path(out) / "checkpoints", resume=resume or None,
            **trainer_options(device=device, accumulate=accumulate, checkpointing=checkpointing),
        )  # fmt: skip
    after = ranked(reward, tokenizer, held, batch_size)
    summary = {
        "task": task, "method": method, "rows": len(train), "held_out": len(held), "epochs": epochs, "lr": lr, "seed": seed,
        "batch_size": batch_size, "ascent": ascent, "ranked_before": before, "ranked_after": after,
    }  # fmt: skip
    store.save(handle, out, base_model=model, training=summary)
    tokenizer.save_pretrained(out)
    console.print(f"held-out pairs ranked right: {100 * before:.1f} % before, [bold]{100 * after:.1f} %[/] after")
    console.print(f"saved {out}; use it with: fastedit predict {out} --model {model} 'a reply'", markup=False)
