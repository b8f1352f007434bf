"""The command line: `fastedit demo | doctor | show | train | contrast | generate | serve`.

A command's imports happen when it runs.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="fastedit", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Representation editing inside transformer layers at the cost of the residual add.",
)  # fmt: skip


def _say_version(wanted: bool):
    if wanted:
        from .. import __version__

        print(f"fastedit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which.")] = False,
):
    """Representation editing inside transformer layers at the cost of the residual add."""


Out = Annotated[Path, typer.Option(help="Folder to write to.")]


@app.command("demo")
def run_demo(
    out: Out = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option(help="A few hundred sentences, one epoch: does it run, not how well.")
    ] = False,
):
    """Fine-tune a real encoder with RED, beside a frozen head and LoRA, and draw a picture. About 5 minutes.

    The task: 4,500 sentences of Python's own documentation, half of them with two words swapped: which?

    **Example:** `fastedit demo --out demo-output`
    """
    from .demo import run

    run(out, quick)


@app.command("doctor")
def run_doctor():
    """Say what is installed, what is missing and how to get it.

    Exit code 1: a compiler is here and the kernels that it should have built are not.

    **Example:** `fastedit doctor`
    """
    from .doctor import run

    raise typer.Exit(run())


@app.command("show")
def run_show(folder: Annotated[str, typer.Argument(help="What `handle.save` wrote, or a Hub repo id.")]):
    """Print an edit: what it does where, its base, how it was trained, how far it is from doing nothing.

    **Example:** `fastedit show demo-output/edit`
    """
    from .show import run

    run(folder)


@app.command("train")
def run_train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id: an encoder; a causal model for rahf and recontrol.")],
    data: Annotated[Path, typer.Argument(help="Labelled texts, preference rows or prompts: see below.")],
    out: Out = Path("my-edit"),
    method: Annotated[str, typer.Option(help="red, loreft, direft, noreft, rahf or recontrol.")] = "red",
    rank: Annotated[int | None, typer.Option(min=1, help="Of loreft, direft, noreft (4), or rahf's student (8).")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts; by default text or sentence.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; by default label.")] = None,
    evaluate: Annotated[Path | None, typer.Option("--eval", help="Held-out file; by default a tenth of DATA.")] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="2e-2; rahf 3e-4 (scit), 9e-6 (dual); recontrol 1e-4.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="2; recontrol 100 at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="32; rahf 64 (scit), 8 (dual); recontrol 512.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Use this many rows of DATA at most.")] = None,
    mode: Annotated[str | None, typer.Option(help="rahf: scit or dual.")] = None,
    student: Annotated[str | None, typer.Option(help="rahf: lora, red or loreft.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="rahf: of the student; 450 (scit), 2500 (dual).")] = None,
    alpha: Annotated[float | None, typer.Option(help="rahf: of the target pattern; 5.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=0, help="rahf: of each teacher (450); 0 for ready ones.")] = None,
    teacher_lr: Annotated[float | None, typer.Option(min=0.0, help="rahf: 2e-5.")] = None,
    reward: Annotated[str | None, typer.Option(help="recontrol: word:WORD, or module:function.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="recontrol: responses a prompt; 4.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="recontrol: 64.")] = None,
    units: Annotated[int | None, typer.Option(min=1, help="recontrol: of the value net; 4096.")] = None,
    lam: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="recontrol: λ of TD(λ); 0.")] = None,
    step_size: Annotated[float | None, typer.Option(help="recontrol: a of the ascent; 0.5.")] = None,
    ascent_steps: Annotated[int | None, typer.Option(min=0, help="recontrol: n of the ascent; 30.")] = None,
    seed: int | None = None,
):
    """Train an edit by a method, and save it.

    red, loreft, direft, noreft: an edit and a linear head on labelled texts (.tsv with a header, or .jsonl).
    rahf: preferences into an edit or LoRA; rows with prompt, chosen and rejected (.json or .jsonl).
    recontrol: a value net for sampled responses' rewards; prompts as .txt, .json or .jsonl.

    **Examples:** `fastedit train ./encoder reviews.tsv --out my-edit`,
    `fastedit train ./encoder reviews.jsonl --method loreft --rank 4 --lr 1e-3 --epochs 3`,
    `fastedit train ./model pairs.jsonl --method rahf --mode scit --student red --out aligned` and
    `fastedit train ./model prompts.txt --method recontrol --reward word:dog --lam 0.9 --out control`
    """
    from .train import run

    own = ("context", "model", "data", "out", "method")
    run(model, data, out, method, {name: value for name, value in context.params.items() if name not in own})


@app.command("contrast")
def run_contrast(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    positive: Annotated[Path, typer.Option(help="Texts of what to steer towards: .txt, .json or .jsonl.")],
    negative: Annotated[Path, typer.Option(help="Texts of what to steer away from.")],
    out: Out = Path("my-direction"),
    method: Annotated[str, typer.Option(help="mean, pca (pairs: line k with line k) or probe.")] = "mean",
    probe: Annotated[str, typer.Option(help="logistic or mass-mean.")] = "logistic",
    layers: Annotated[str | None, typer.Option(help="Such as 3, 8-15 or 0,4,-1; by default all.")] = None,
    site: Annotated[str, typer.Option(help="block, mlp or attn.")] = "block",
    at: Annotated[str, typer.Option(help="last token, first token or mean.")] = "last token",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts to so many tokens.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="Also write a control vector for llama.cpp here.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep what is done here, and go on from it.")] = None,
    seed: int = 0,
):
    """Find the direction from one set of texts to another; save it, the edit that steers along it, and a picture.

    Files hold one text a line (.txt), a JSON list (.json) or objects with "text" (.jsonl).

    **Examples:** `fastedit contrast ./model --positive happy.txt --negative sad.txt --out happy` and
    `fastedit contrast ./model --positive happy.txt --negative sad.txt --method probe --layers 8-15 --at mean`
    """
    from .contrast import run

    run(model, positive, negative, out, method, probe, layers, site, at, batch_size, max_length, gguf, resume, seed)


@app.command("generate")
def run_generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: .txt, .json or .jsonl.")] = None,
    edit: Annotated[str | None, typer.Option(help="What `handle.save` or `fastedit contrast` wrote.")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="The dial; several times for several.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Texts a prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token, one text a prompt.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
):
    """Generate with an edit on the model, at one strength or several.

    **Examples:** `fastedit generate ./model --edit happy --strength 2 --prompt "Once upon a time"` and
    `fastedit generate ./model --edit happy --strength 0 --strength 1 --strength 4 --prompts prompts.txt`
    """
    from .generate import run

    run(model, prompt, prompts, edit, strength, count, max_new_tokens, temperature, top_p, seed)


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id, as for `vllm serve`.")],
    edits: Annotated[Path, typer.Option(help="Folder of saved edits, one folder each; its name is the edit's.")],
    sites: Annotated[
        str | None, typer.Option(help="Some of mlp,attn,block; by default what the edits in the folder need.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Of low-rank edits, at most; by default likewise.")] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Edits in the tables at once.")] = None,
    gates: Annotated[
        bool | None, typer.Option(help="Whether edits may be behind gates; by default as the folder needs.")
    ] = None,
):
    """Serve a model with vLLM; each request may name an edit. Arguments not listed here go to `vllm serve`.

    A request names its edit in `vllm_xargs`: `{"fastedit": "anna", "fastedit_strength": 1.0}`. Folders may be added and
    removed while the server runs.

    **Example:** `fastedit serve ./model --edits ./edits --rank 4 --port 8000 --max-num-seqs 64`
    """
    from .serve import run

    run(model, edits, sites, rank, capacity, context.args, gates=gates)


@app.command("playground")
def run_playground(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    edits: Annotated[Path | None, typer.Option(help="Folder of saved edits, one folder each; each gets a dial.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind. Anyone who reaches it can use the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
):
    """Open a local page: chat with the unedited and the edited model side by side, and turn dials while they write.

    **Example:** `fastedit playground HuggingFaceTB/SmolLM2-135M-Instruct --edits ./edits`
    """
    from .playground import run

    run(model, edits, host, port)
