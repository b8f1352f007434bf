"""`fastedit sweep`: a grid of layers and doses, judged by replies."""

from rich.console import Console

from .loading import load_model
from .progress import pictures
from .texts import as_chat, layer_numbers, read_texts
from .train_recontrol import find_reward


def run(
    model, directions, prompts, measure, doses, unit, layers, control, max_new_tokens, chat, out, seed, batch_size, **loading
):
    """The fastedit.Sweep; with `out`, the best cell's edit, its directions and the picture are saved there."""
    judge, asked = find_reward(measure, "--measure"), read_texts(prompts)
    asked = as_chat(asked) if chat else asked
    import fastedit

    from ..methods.replies import plain, replies

    along = fastedit.Directions.load(directions)
    loaded, tokenizer = load_model(model, **loading)
    shown = [plain(prompt) for prompt in asked]

    def measured(changed):
        return judge(shown, replies(changed, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size))

    more = {"prompts": asked, "tokenizer": tokenizer} if unit == "kl" else {}
    found = fastedit.sweep(
        loaded, along, measured, doses=doses, layers=[layer_numbers(text) for text in layers] if layers else None, unit=unit,
        control=control, seed=seed, resume=out, **more,
    )  # fmt: skip
    if out is not None:
        best = found.best()
        with fastedit.patch(loaded, found.edit(best)) as handle:
            note = {"method": "sweep", "measure": measure, "dose": best.dose, "unit": unit, "mean": best.mean}
            fastedit.store.save(handle, out, base_model=str(model), training=note)
        along.at(*best.layers).save(out)
        with pictures(Console(stderr=True)):
            found.heat_map(out / "sweep.png")
    return found
