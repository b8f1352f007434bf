"""`fastedit merge | convert | evaluate | sweep | bench | push`: what an edit becomes, and what it does, in a line each."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .loading import BatchSize, Device, DeviceMap, Dtype, Out, Quantize, folder, folder_or_gguf

app = typer.Typer(rich_markup_mode="markdown")

AnyModel = Annotated[str, typer.Argument(help="Folder or Hub id of the base, or smollm2.")]
Edit = Annotated[str, typer.Argument(help="What `handle.save` or `fastedit train` wrote, or a Hub repo id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("merge")
def merge(
    model: AnyModel,
    edit: Edit,
    out: Out = Path("my-merged-model"),
    strength: Annotated[float | None, typer.Option(help="The dial; by default the edit's own.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Keep layers in float32 that would lose the edit to rounding.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
):
    """Put an edit into the weights, and save an ordinary model that needs no fastedit.

    **Example,** of what `fastedit train --help` makes:

    ```
    fastedit merge smollm2 style --out merged
    ```
    """
    from .edited import merged

    _say(merged(model, edit, out, strength, fp32, device=device, dtype=dtype, device_map=device_map), as_json)


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="A saved edit, directions, a .gguf, or a folder of PEFT or pyreft.")],
    out: Annotated[
        Path, typer.Argument(help="Folder to write; for llama.cpp a file that ends in .gguf.", callback=folder_or_gguf)
    ],
    to: Annotated[str | None, typer.Option(help="edit, gguf, peft, pyreft or directions; by default by OUT's end.")] = None,
    model: Annotated[str | None, typer.Option(help="The base; by default the one that SOURCE names.")] = None,
    positions: Annotated[str | None, typer.Option(help='pyreft: where it acted, such as "last 1".')] = None,
    as_json: Json = False,
):
    """Turn edits of one library into those of another: PEFT's (IA)³, pyreft's, repeng's and llama.cpp's vectors, and ours.

    **Examples,** of what `fastedit contrast --help` makes, and with PEFT:

    ```
    fastedit convert happy happy.gguf
    fastedit convert happy.gguf happy-again --model smollm2
    fastedit convert ./peft-ia3 my-edit --model ./model
    fastedit convert my-edit ./peft --to peft --model ./model
    ```
    """
    from .convert import run

    _say(run(source, out, to, model, positions), as_json)


@app.command("evaluate")
def evaluate(
    model: AnyModel,
    data: Annotated[Path, typer.Argument(help="Rows with labels for an edit with a head, else texts: .csv, .jsonl, .txt, …")],
    edit: Annotated[str, typer.Option(help="What `handle.save` or `fastedit train` wrote, or a Hub repo id.")],
    strength: Annotated[list[float] | None, typer.Option(help="The dial; several times for several.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts; by default text or sentence.")] = None,
    other: Annotated[str | None, typer.Option(help="pairs: column of the second texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; by default label.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
):
    r"""Say how good an edit is on held-out data: accuracy or correlations of a trained head, else loss, perplexity and KL.

    KL: from the model without the edit to the one with it, nats per token of the texts: the dose.

    **Examples,** of what `train --help` and `contrast --help` make:

    ```
    fastedit evaluate minilm fastedit/examples/moods.tsv --edit my-edit
    fastedit evaluate smollm2 fastedit/examples/prompts.txt --edit happy \
        --strength 0.3 --strength 0.6 --json
    ```
    """
    from .edited import evaluated

    columns = {"text": text, "other": other, "label": label or "label"}
    loading = {"device": device, "dtype": dtype, "device_map": device_map, "quantize": quantize}
    _say(evaluated(model, data, edit, strength, columns, batch_size, **loading), as_json)


@app.command("sweep")
def sweep(
    model: AnyModel,
    directions: Annotated[str, typer.Argument(help="Saved directions, as of `fastedit contrast`.")],
    prompts: Annotated[Path, typer.Option(help="Prompts to reply to: .txt, .json, .jsonl or .csv.")],
    measure: Annotated[str, typer.Option(help="Of replies: word:WORD counts one; module:function(prompts, replies) → numbers.")],
    dose: Annotated[list[float] | None, typer.Option(help="Several times for several; 1 by default.")] = None,
    unit: Annotated[str, typer.Option(help="strength, residual (times its norm) or kl (nats a token).")] = "strength",
    layers: Annotated[
        list[str] | None, typer.Option(help="Steered together, such as 8-11; several times for several. By default each alone.")
    ] = None,
    control: Annotated[bool, typer.Option("--control", help="Also a random direction at each place.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 48,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns of the tokenizer's template.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the best edit, the picture and what is done so far.", callback=folder)
    ] = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
):
    r"""Choose layers and a dose: steer at each of a grid, reply to the prompts, and let a measure judge.

    **Example,** of what `fastedit contrast --help` makes:

    ```
    fastedit sweep smollm2 happy --prompts fastedit/examples/prompts.txt \
        --measure word:happy --dose 0.5 --max-new-tokens 16 --out best
    ```
    """
    from .sweep import run

    loading = {"device": device, "dtype": dtype, "device_map": device_map, "quantize": quantize}
    found = run(
        model, directions, prompts, measure, dose or [1.0], unit, layers, control, max_new_tokens, chat, out, seed,
        batch_size, **loading,
    )
    print(json.dumps(found.json(), indent=1) if as_json else found)


@app.command("bench")
def bench(
    model: AnyModel,
    edit: Annotated[str | None, typer.Option(help="What `handle.save` wrote; by default RED at every layer, untrained.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    rounds: Annotated[int, typer.Option(min=3, help="Timings of each, taking turns.")] = 30,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
):
    """Time a model with an edit against itself without: a prompt's forward, and one more token behind it.

    The variants take turns in one process; printed are medians, and their ratio with an interval. A busy machine shows in
    the interval, and in "unedited again", which should be 1.

    **Examples:**

    ```
    fastedit bench smollm2 --rounds 10
    fastedit bench ./model --edit my-edit
    ```
    """
    from .bench import run

    loading = {"device": device, "dtype": dtype, "device_map": device_map, "quantize": quantize}
    _say(run(model, edit, tokens, batch, rounds, **loading), as_json)


@app.command("push")
def push(
    folder: Annotated[Path, typer.Argument(help="What `handle.save` or `fastedit train` wrote.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload an edit",
    card: Annotated[bool, typer.Option("--card", help="Print the model card, and push nothing.")] = False,
    as_json: Json = False,
):
    """Upload a saved edit to the Hugging Face Hub, with a model card; a README.md in the folder is kept.

    The token is huggingface_hub's: HF_TOKEN, or `hf auth login`.

    **Example,** of what `fastedit contrast --help` makes; without `--card` it is uploaded:

    ```
    fastedit push happy anna/happy --card
    ```
    """
    from ..files.edit_file import read
    from ..patching import hub

    hub.check_repo(repo)
    if card:
        print(hub.card(*read(folder), repo))
        return
    _say({"pushed": str(folder), "to": repo, "at": hub.push(folder, repo, private=private or None, message=message)}, as_json)


def _say(found, as_json):
    """A dict, or a list of them: JSON, or a line each."""
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for row in found if isinstance(found, list) else [found]:
        print("  ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in row.items() if value is not None))


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value
