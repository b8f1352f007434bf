"""The command line: `fastedit demo | doctor | show | train | predict | contrast | generate | verify | serve`, and those of
methods.py and tools.py.

A command's imports happen when it runs. Exit codes: 0; 1 where the answer is no (verify, doctor) or a step failed; 2 where
what was given is wrong, or does not go together; 130 where the user stopped it. An error is one line on stderr.
"""

import os
import sys
import unicodedata
from pathlib import Path
from typing import Annotated

import typer

from . import methods, tools
from .loading import BatchSize, Device, DeviceMap, Dtype, Out, OutFile, Quantize

app = typer.Typer(
    name="fastedit", no_args_is_help=True, rich_markup_mode="markdown",
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
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")] = False,
):
    """Representation editing inside transformer layers at the cost of the residual add."""


@app.command("demo")
def run_demo(
    out: Out = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option(help="A few hundred sentences, one epoch: does it run, not how well.")
    ] = False,
):
    """Steer a chat model, then fine-tune an encoder with RED beside a frozen head and LoRA; two pictures.

    Steered: replies along the direction from sad sentences to happy ones, beside a random direction at the same KL.
    Fine-tuned: 4,500 sentences of Python's own documentation, half of them with two words swapped: which?

    **Example:**

    ```
    fastedit demo --out demo-output
    ```
    """
    from .demo import run

    run(out, quick)


@app.command("doctor")
def run_doctor():
    """Say what is installed, what is missing and how to get it.

    Exit code 1: a compiler is here and the kernels that it should have built are not.

    **Example:**

    ```
    fastedit doctor
    ```
    """
    from .doctor import run

    raise typer.Exit(run())


@app.command("show")
def run_show(
    folder: Annotated[str, typer.Argument(help="What `handle.save` or `Directions.save` wrote, or a Hub repo id.")],
    reseal: Annotated[bool, typer.Option("--reseal", help="First give an edit.json changed by hand its checksum again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print edit.json and the shapes of its tensors.")] = False,
):
    """Print an edit: what it does where, its base, how it was trained, how far it is from doing nothing.

    **Example,** of what `fastedit contrast --help` makes:

    ```
    fastedit show happy
    ```
    """
    from .show import run

    run(folder, reseal, as_json)


@app.command("train")
def run_train(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id: an encoder for sentences, else a causal model; or minilm, smollm2.")
    ],
    data: Annotated[Path, typer.Argument(help="Rows: .jsonl, .json, .parquet, .tsv or .csv; see below.")],
    out: Out = Path("my-edit"),
    method: Annotated[str, typer.Option(help="red, red+, loreft, direft, noreft, vector; or rahf, recontrol.")] = "red",
    task: Annotated[str | None, typer.Option(help="classify (the default), pairs, regress, sft, preference or reward.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of loreft, direft, noreft (4), or rahf's student (8).")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 3, 8-15 or 0,4,-1; by default all.")] = None,
    positions: Annotated[str | None, typer.Option(help='Such as "last 4", of the prompt; by default all.')] = None,
    site: Annotated[str | None, typer.Option(help="mlp, attn, block, …; by default the method's.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts; by default text or sentence.")] = None,
    other: Annotated[str | None, typer.Option(help="pairs: column of the second texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; by default label.")] = None,
    prompt: Annotated[str | None, typer.Option(help="sft: column of the prompts.")] = None,
    response: Annotated[str | None, typer.Option(help="sft: column of the responses.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat", help="Prompts that are strings are user turns of the template.")] = None,
    head: Annotated[str | None, typer.Option(help="mean, or token: the RED paper's on GLUE.")] = None,
    evaluate: Annotated[Path | None, typer.Option("--eval", help="Held-out file; by default a tenth of DATA.")] = None,
    loss: Annotated[str | None, typer.Option(help="preference: dpo, bipo, orpo or reps.")] = None,
    beta: Annotated[float | None, typer.Option(min=0.0, help="preference: of dpo and bipo; 0.1.")] = None,
    store: Annotated[bool | None, typer.Option("--store", help="preference: store the reference's log-probabilities.")] = None,
    shifted: Annotated[Path | None, typer.Option(help="reward: rows without labels for MetaRM's ascent step.")] = None,
    ascent: Annotated[float | None, typer.Option(min=0.0, help="reward: MetaRM's step size; 0 for none.")] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="By task and method; rahf 3e-4 (scit), 9e-6 (dual); recontrol 1e-4.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="2; sft and preference 3; recontrol 100 at most.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="32; of causal models 8; rahf 64 (scit), 8 (dual); recontrol 512.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches per step; 1.")] = None,
    checkpointing: Annotated[bool | None, typer.Option("--checkpointing", help="Compute activations again in backward.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt, in tokens; 1024.")] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response, in tokens; 512.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")] = None,
    device_map: Annotated[str | None, typer.Option(help="auto: over several GPUs, by accelerate.")] = None,
    quantize: Annotated[str | None, typer.Option(help="8bit or 4bit, by bitsandbytes.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Use this many rows of DATA at most.")] = None,
    mode: Annotated[str | None, typer.Option(help="rahf: scit or dual.")] = None,
    student: Annotated[str | None, typer.Option(help="rahf: lora, red or loreft.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="rahf: of the student; 450 (scit), 2500 (dual).")] = None,
    alpha: Annotated[float | None, typer.Option(help="rahf: of the target pattern; 5.")] = None,
    fitted: Annotated[str | None, typer.Option(help="rahf: chosen, random (scit) or all (dual) responses.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="rahf: rows per forward; up to 16.")] = None,
    teacher: Annotated[str | None, typer.Option(help="rahf: full, lora, red or red+, the way a teacher is trained.")] = None,
    teacher_epochs: Annotated[float | None, typer.Option(min=0.0, help="rahf: 2 (scit), 3 (dual).")] = None,
    teacher_steps: Annotated[
        int | None, typer.Option(min=0, help="rahf: of each teacher, in place of epochs; 0 for ready ones.")
    ] = None,
    teacher_lr: Annotated[float | None, typer.Option(min=0.0, help="rahf: 2e-5.")] = None,
    reward: Annotated[str | None, typer.Option(help="recontrol: word:WORD, edit:FOLDER, or module:function.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="recontrol: responses per prompt; 4.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="recontrol: 64.")] = None,
    units: Annotated[str | None, typer.Option(help="recontrol: of the value net's layers; 4096, or 99,99,99.")] = None,
    lam: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="recontrol: λ of TD(λ); 0.")] = None,
    step_size: Annotated[float | None, typer.Option(help="recontrol: a of the ascent; 0.5.")] = None,
    ascent_steps: Annotated[int | None, typer.Option(min=0, help="recontrol: n of the ascent; 30.")] = None,
    target: Annotated[float | None, typer.Option(help="recontrol: a value to steer to, instead of upwards.")] = None,
    seed: int | None = None,
):
    r"""Train an edit by a method on a task, and save it with what was trained beside it.

    classify, pairs, regress: an edit and a head on an encoder; columns text (and other) and label.
    sft: an edit on a causal model; rows with messages, or prompt and response.
    preference, reward: rows with prompt, chosen and rejected; the reference is the same model without the edit.
    rahf: preferences into an edit or LoRA; rows with prompt, chosen and rejected.
    recontrol: a value net for sampled responses' rewards; prompts as .txt, .json or .jsonl.

    **Examples:**

    ```
    fastedit train minilm fastedit/examples/moods.tsv --epochs 20 --out my-edit
    fastedit train minilm fastedit/examples/moods.tsv --method loreft --rank 4 \
        --lr 5e-3 --epochs 20 --out my-loreft
    fastedit train smollm2 fastedit/examples/preferences.jsonl --task sft \
        --response chosen --chat --out style
    fastedit train smollm2 fastedit/examples/preferences.jsonl \
        --task preference --loss dpo --chat --out aligned
    fastedit train smollm2 fastedit/examples/preferences.jsonl --method rahf \
        --student red --chat --teacher lora --teacher-steps 10 --steps 20 \
        --out rahf
    fastedit train smollm2 fastedit/examples/prompts.txt --method recontrol \
        --chat --reward word:the --lam 0.9 --out control
    ```
    """
    from .train import run

    own = ("context", "model", "data", "out", "method", "task")
    run(model, data, out, method, task, {name: value for name, value in context.params.items() if name not in own})


@app.command("predict")
def run_predict(
    folder: Annotated[str, typer.Argument(help="What `fastedit train` wrote, or a Hub repo id.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Sentences, or prompts.")] = None,
    file: Annotated[Path | None, typer.Option("--texts", help="A file of them: .txt, .json, .jsonl or .csv.")] = None,
    model: Annotated[str | None, typer.Option(help="The base; by default the one that the edit names.")] = None,
    other: Annotated[list[str] | None, typer.Option(help="Second texts, for an edit trained on pairs.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    batch_size: BatchSize = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 100,
    out: OutFile("Also write the answers here, as .jsonl.") = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
):
    r"""Use what was trained: the label, number or reward of each text, or the reply to each prompt.

    **Examples,** of what `fastedit train --help` makes:

    ```
    fastedit predict my-edit "What a lovely surprise!"
    fastedit predict style --texts fastedit/examples/prompts.txt \
        --out replies.jsonl
    ```
    """
    from .predict import run

    run(
        folder, texts, file, model, other, max_new_tokens, batch_size, out, as_json,
        device=device, dtype=dtype, device_map=device_map, quantize=quantize,
    )  # fmt: skip


@app.command("contrast")
def run_contrast(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model, or smollm2.")],
    positive: Annotated[Path, typer.Option(help="Texts of what to steer toward: .txt, .json or .jsonl.")],
    negative: Annotated[Path, typer.Option(help="Texts of what to steer away from.")],
    out: Out = Path("my-direction"),
    method: Annotated[str, typer.Option(help="mean, pca (pairs: line k with line k) or probe.")] = "mean",
    probe: Annotated[str, typer.Option(help="logistic or mass-mean.")] = "logistic",
    layers: Annotated[str | None, typer.Option(help="Such as 3, 8-15 or 0,4,-1; by default all.")] = None,
    site: Annotated[str, typer.Option(help="block, mlp or attn.")] = "block",
    at: Annotated[
        str | None, typer.Option(help="mean, last token, last 4, response, …; by default by the kind of texts: see below.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Append this to every text, and measure there.")] = None,
    relative: Annotated[float | None, typer.Option(help="Strength 1 adds this many times the residual's norm.")] = None,
    kl: Annotated[float | None, typer.Option(min=0.0, help="Strength 1 is this mean KL, in nats per token.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="For --kl: prompts whose continuations are compared.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts to this many tokens.")] = None,
    gguf: OutFile("Also write a control vector for llama.cpp here.") = None,
    resume: Annotated[Path | None, typer.Option(help="Keep finished work here, and continue from it.")] = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    r"""Find the direction from one set of texts to another; save it, the edit that steers along it, and a picture.

    Files hold one text per line (.txt), a JSON list (.json), or objects with "text", "messages" or "prompt" and "response"
    (.jsonl, .parquet, .csv, .tsv). Prose is measured at the mean of its tokens, a chat at its response, a question where the
    answer begins. Without --layers, the third of the layers is saved that separates the sets best.

    **Examples:**

    ```
    fastedit contrast smollm2 --positive fastedit/examples/happy.txt \
        --negative fastedit/examples/sad.txt --out happy
    fastedit contrast smollm2 --positive fastedit/examples/happy.txt \
        --negative fastedit/examples/sad.txt --method probe --kl 0.3 --out dosed
    ```
    """
    from .contrast import run

    run(
        model, positive, negative, out, method, probe, layers, site, at, batch_size, max_length, gguf, resume, seed,
        suffix=suffix, relative=relative, kl=kl, prompts=prompts, device=device, dtype=dtype, device_map=device_map,
        quantize=quantize,
    )  # fmt: skip


@app.command("generate")
def run_generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model, or smollm2.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of them: .txt, .json, .jsonl, .csv.")] = None,
    edit: Annotated[str | None, typer.Option(help="A saved edit, or a control vector (.gguf).")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="The dial; may be given several times.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Texts per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token, one text per prompt.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns of the tokenizer's template.")] = False,
    system: Annotated[str | None, typer.Option(help="The system turn; implies --chat.")] = None,
    lexicons: Annotated[Path | None, typer.Option(help="Words by trait, as `fastedit ubpl` writes them.")] = None,
    trait: Annotated[list[str] | None, typer.Option(help="Of --lexicons, such as happy=2; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: number, strength, prompt, reply.")] = False,
    page: OutFile("Also write a page with the replies side by side.", "--html") = None,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    r"""Generate with an edit on the model, at one strength or several. Replies are numbered.

    **Examples,** with what `fastedit contrast --help` makes:

    ```
    fastedit generate smollm2 --chat --edit happy --strength 0 --strength 0.3 \
        --prompt "How was your weekend?"
    fastedit generate smollm2 --edit happy --strength 0 --strength 0.3 \
        --prompts fastedit/examples/prompts.txt --html replies.html
    ```
    """
    from .generate import run

    run(
        model, prompt, prompts, edit, strength, count, max_new_tokens, temperature, top_p, seed, chat, system, lexicons, trait,
        as_json, page, device=device, dtype=dtype, device_map=device_map, quantize=quantize,
    )  # fmt: skip


@app.command("verify")
def run_verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model of any kind.")],
    edit: Annotated[str | None, typer.Option(help="What `handle.save` wrote; by default a random vector at every block.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times; by default random tokens.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated per request.")] = 4,
    backend: Annotated[str, typer.Option(help="Of torch.compile; eager traces and does not compile.")] = "inductor",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    """Compare a model with an edit, in every mode that it has, with plain hooks on whole sequences.

    Modes: forward, batch, cache, no cache, static cache, padding, beams, threads, packing, checkpointing, compile. Each is
    right, refused, wrong, or left out because the model without edits differs there. Exit code 1: something is wrong.

    **Examples:**

    ```
    fastedit verify smollm2 --mode cache --mode beams --json
    fastedit verify ./model --edit my-edit
    ```
    """
    from .verify import run

    loading = {"device": device, "dtype": dtype, "device_map": device_map, "quantize": quantize}
    raise typer.Exit(run(model, edit, prompt, mode, new_tokens, backend, as_json, seed, **loading))


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id, as for `vllm serve`.")],
    edits: Annotated[Path, typer.Option(help="Folder of saved edits, one folder each; its name is the edit's.")],
    sites: Annotated[
        str | None, typer.Option(help="Some of mlp,attn,block; by default what the edits in the folder need.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Largest rank; by default as the folder needs.")] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Edits in the tables at once.")] = None,
    gates: Annotated[
        bool | None, typer.Option(help="Whether edits may be behind gates; by default as the folder needs.")
    ] = None,
    max_names: Annotated[int | None, typer.Option(min=1, help="Names that one request may list; 16 by default.")] = None,
    max_change: Annotated[
        float | None, typer.Option(help="How much a request may change a row, as a multiple of its length; 1000.")
    ] = None,
    staging: Annotated[Path | None, typer.Option(help="Folder of the workers' copies; .served in --edits.")] = None,
):
    """Serve a model with vLLM; each request may name an edit. Arguments not listed here go to `vllm serve`.

    A request names its edit in `vllm_xargs`: `{"fastedit": "anna", "fastedit_strength": 1.0}`. Folders may be added and
    removed while the server runs.

    **Example:**

    ```
    fastedit serve ./model --edits ./edits --rank 4 --port 8000 --max-num-seqs 64
    ```
    """
    from .serve import run

    limits = {"max_names": max_names, "max_change": max_change}
    staging = staging and str(staging.absolute())
    run(model, edits, sites, rank, capacity, context.args, gates=gates, staging=staging, **limits)


@app.command("playground")
def run_playground(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model, or smollm2.")],
    edits: Annotated[Path | None, typer.Option(help="Folder of saved edits, one folder each; each gets a dial.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind. Anyone who reaches it can use the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    """Open a local page: chat with the unedited and the edited model side by side, and turn dials while they write.

    **Examples:**

    ```
    fastedit playground smollm2
    fastedit playground ./model --edits ./edits
    ```
    """
    from .playground import run

    run(model, edits, host, port, device=device, dtype=dtype, device_map=device_map, quantize=quantize)


app.add_typer(methods.app)  # without a name: its commands are this app's, behind the others
app.add_typer(tools.app)


def main():
    """The program `fastedit`: the app, with errors as one line. FASTEDIT_TRACEBACK=1 shows where one came from.

    Files of fastedit/examples are found from every folder, in the package where they are not in this folder.
    """
    sys.argv[1:] = map(_located, sys.argv[1:])
    # of click's own, or of the copy of click that newer typers hold
    usage = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = app(standalone_mode=False)
    except usage as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            code = error.exit_code
        else:
            code = _complain(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _complain("stopped", 130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FASTEDIT_TRACEBACK"):
            raise
        given = isinstance(error, (ValueError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError,
                                   NotADirectoryError, PermissionError))  # fmt: skip
        code = _complain(error, 2 if given else 1)
    sys.exit(code if isinstance(code, int) else 0)


def _located(argument):
    found = Path(__file__).parents[2] / argument
    ours = argument.startswith("fastedit/examples/") and not Path(argument).exists() and found.is_file()
    return str(found) if ours else argument


def _complain(message, code):
    print("fastedit: " + plain(" ".join(str(message).split())), file=sys.stderr)
    return code


def plain(text):
    """The text with characters that control a terminal, or the direction of reading, written out as \x1b is."""
    return "".join(c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in str(text))
