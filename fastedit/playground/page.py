"""The playground's page, drawn with Gradio. session.py does the work behind it."""

import os
import shutil
import tempfile

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from ..arguments import layers_of_text

CSS = """
.gradio-container {max-width: 1280px !important}
.token {padding: 1px 0; border-radius: 3px; white-space: pre-wrap}
.tokens {line-height: 2; font-family: ui-monospace, monospace}
"""
LARGEST = 4.0
POSITIONS = ["all", "prompt", "generated", "first 4", "last 4"]


class Dials(dict):
    """One visitor's {edit's name: strength}, and whether their reply is to stop. Gradio gives each a copy of the first."""

    stop = False


def build(session, title):
    """The gr.Blocks of a Session."""
    with gr.Blocks(title=f"fastedit · {title}", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        dials, version = gr.State(Dials()), gr.State(0)
        gr.Markdown(f"## fastedit playground · {title}")
        with gr.Row():
            with gr.Column(scale=3):
                _chat(session, dials)
            with gr.Column(scale=2):
                _dials(session, dials, version)
        with gr.Tab("Make a direction"):
            _create(session, version)
        _tab("Color tokens", lambda: _color(session, dials, version))
        _tab("Export", lambda: _export(session, dials, version))
    return page


def _tab(label, fill):
    """A tab that is filled when it is first opened: the page loads a third fewer files without it."""
    with gr.Tab(label) as tab:
        opened = gr.State(False)
        tab.select(lambda: True, None, opened, show_progress="hidden")

        @gr.render(triggers=[opened.change])
        def _():
            fill()


def _chat(session, dials):
    with gr.Row():
        plain = gr.Chatbot(label="Unedited", height=420, elem_id="plain", buttons=["copy"])
        edited = gr.Chatbot(label="Edited", height=420, elem_id="edited", buttons=["copy"])
    meter = gr.Markdown("KL to the unedited model: –", elem_id="meter")
    text = gr.Textbox(label="Message", placeholder="Say something, and turn a dial while it answers", elem_id="message")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="send")
        stop = gr.Button("Stop", elem_id="stop")
        clear = gr.Button("Clear", elem_id="clear")
    with gr.Row():
        length = gr.Slider(8, 512, value=128, step=8, label="Longest reply, tokens", elem_id="length")
        temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0: greedy)")

    def answer(message, plain_said, edited_said, mine, tokens, heat):
        message = (message or "").strip()
        if not message:
            raise gr.Error("The message is empty.")
        mine.stop = False
        said = [[*_plain(history), {"role": "user", "content": message}] for history in (plain_said, edited_said)]
        kls = []  # of the edited reply's tokens
        steps = session.reply(*said, lambda: mine, max_new_tokens=int(tokens), temperature=heat, seed=0)
        for step in _told(steps):
            kls += [] if step.kl is None else [step.kl]
            shown = [[*s, {"role": "assistant", "content": r}] for s, r in zip(said, (step.plain, step.edited), strict=True)]
            over = step.finished or mine.stop
            doses = f"**{kls[-1]:.2f}** nats now, {sum(kls) / len(kls):.2f} on average"
            yield "", *shown, f"KL to the unedited model: {doses}{'' if over else ' …'}"
            if over:
                return

    given = [text, plain, edited, dials, length, temperature]
    gr.on(
        [send.click, text.submit], answer, given, [text, plain, edited, meter], concurrency_limit=None,
        show_progress="hidden",
    )  # fmt: skip
    stop.click(lambda mine: setattr(mine, "stop", True), dials, None, queue=False)
    clear.click(lambda: ([], [], "KL to the unedited model: –"), None, [plain, edited, meter], queue=False)


def _told(steps):
    """The steps; what the model's own code raises becomes a message on the page, and its traceback goes to the terminal."""
    try:
        yield from steps
    except Exception as error:
        raise gr.Error(f"The model failed while it wrote: {type(error).__name__}: {error}") from error


def _plain(history):
    """Messages as templates take them: role and text."""
    found = []
    for message in history or ():
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        found.append({"role": message["role"], "content": content})
    return found


def _dials(session, dials, version):
    gr.Markdown("### Edits\nEach dial acts on the next token.")

    @gr.render(inputs=[dials, version])
    def sliders(mine, _):
        if not session.edits:
            gr.Markdown("No edit yet. *Make a direction* below.", elem_id="edits")
        for name, held in ((name, held) for name, held in list(session.edits.items()) if held.dialed):
            dial = gr.Slider(
                -LARGEST, LARGEST, value=mine.get(name, 0.0), step=0.05, label=name, info=held.about,
                elem_id=f"dial-{name}", key=f"dial-{name}",
            )  # fmt: skip
            dial.input(lambda value, mine, name=name: mine.__setitem__(name, value), [dial, dials], None,
                       queue=False, show_progress="hidden")  # fmt: skip


def _create(session, version):
    with gr.Row():
        positive = gr.Textbox(label="More like these (one sentence per line)", lines=6, elem_id="positive")
        negative = gr.Textbox(label="Less like these (one sentence per line)", lines=6, elem_id="negative")
    with gr.Row():
        name = gr.Textbox(label="Name", elem_id="name")
        at = gr.Dropdown(["mean", "last token"], value="mean", label="Measured at")
        methods = [("difference of means", "mean"), ("probe, with its accuracy", "probe")]
        method = gr.Dropdown(methods, value="mean", label="Found by", elem_id="method")
        make = gr.Button("Make it", variant="primary", elem_id="make")
    with gr.Accordion("Where it acts", open=False, elem_id="where"):
        with gr.Row():
            layers = gr.Textbox(label="Layers", placeholder="the third that separate best; or 8-11, 14", elem_id="layers")
            positions = gr.Dropdown(POSITIONS, value="all", label="Tokens", allow_custom_value=True, elem_id="positions")
        with gr.Row():
            like = gr.Textbox(label="Only on prompts like these (four or more; empty: on all)", lines=3, elem_id="like")
            unlike = gr.Textbox(label="and not like these", lines=3, elem_id="unlike")
    picture = gr.Plot(label="Separation per layer", elem_id="separation")
    said = gr.Markdown(elem_id="made")

    def create(name, positive, negative, at, method, layers, positions, like, unlike, version):
        try:
            chosen = layers_of_text(layers) if (layers or "").strip() else None
            where = {"layers": chosen, "positions": positions, "like": like, "unlike": unlike}
            held = session.create(name, positive, negative, at, method=method, **where)
        except (ValueError, TypeError, ImportError) as error:
            raise gr.Error(str(error)) from None
        from ..plots.directions import figure

        return figure(held.directions), f"**{name.strip()}** is on the model: {held.about}.", version + 1

    given = [name, positive, negative, at, method, layers, positions, like, unlike, version]
    make.click(create, given, [picture, said, version])


def _names(session, version, label, elem_id, among):
    """A list of the edits that `among` takes, the newest chosen; it follows what is made later."""

    def now():
        names = [name for name, held in session.edits.items() if among(held)]
        return {"choices": names, "value": names[-1] if names else None}

    box = gr.Dropdown(**now(), label=label, elem_id=elem_id)
    version.change(lambda: gr.Dropdown(**now()), None, box)
    return box


def _color(session, dials, version):
    with gr.Row():
        text = gr.Textbox(label="Text", lines=3, elem_id="colored-text")
        name = _names(session, version, "Direction", "color-name", lambda held: held.directions is not None)
        go = gr.Button("Color", elem_id="color")
    shown, heat = gr.HTML(elem_id="colored"), gr.Plot(label="Layer × token")

    def color(text, name, mine):
        try:
            tokens, layers, values = session.color(text or "", name, mine)
        except KeyError:
            raise gr.Error("There is no direction yet: make one first.") from None
        except ValueError as error:
            raise gr.Error(str(error)) from None
        from ..plots.tokens import heat_map, html

        return html(tokens, values.mean(0)), heat_map(tokens, layers, values)

    go.click(color, [text, name, dials], [shown, heat])


def _export(session, dials, version):
    with gr.Row():
        name = _names(session, version, "Edit", "export-name", lambda held: held.dialed)
        go = gr.Button("Export at its dial", elem_id="export")
    kept = tempfile.TemporaryDirectory(prefix="fastedit-")  # goes with the page; Gradio serves copies of its own
    files = gr.File(label="Files", file_count="multiple", elem_id="files")
    python, request = gr.Code(label="Python", language="python"), gr.Code(label="vLLM request", language="json")

    def export(name, mine):
        if name not in session.edits:
            raise gr.Error("There is no edit to export.")
        folder = tempfile.mkdtemp(dir=kept.name)
        dial = mine.get(name) or 1.0
        paths = session.export(name, dial, folder)
        found = [shutil.make_archive(str(path), "zip", folder, path.name) if path.is_dir() else str(path) for path in paths]
        lines = session.lines(name, dial)
        return found, lines["Python"], lines["vLLM request"]

    go.click(export, [name, dials], [files, python, request])


def serve(session, title, host="127.0.0.1", port=7860, block=True):
    """Binds, prints the address and serves until interrupted (or, with block False, returns the gr.Blocks).

    Raises OSError if the port is taken.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot  # Gradio does at the first event, and a visitor would wait for it: 1 to 3 s

    page = build(session, title)
    page.queue(default_concurrency_limit=None).launch(
        server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]), css=CSS,
        footer_links=[], ssr_mode=False, show_error=True,
    )  # fmt: skip
    if block:
        print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page
