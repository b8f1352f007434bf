"""The playground in a real Chromium: how long its first load takes beside a bare Gradio page, and memory over use.

    python -m bench.playground --loads 10 --out bench/results
    python -m bench.playground --minutes 20 --out bench/results

Needs gradio, matplotlib, playwright and Chromium. The model is SmolLM2-135M-Instruct. Each load is one of a server and a
browser that were just started, so that no cache holds anything; the two pages take turns. A load is over when the message
box and the dials stand on the page, by the browser's clock since the navigation began.

Use: one tab sends a message every 20 s and turns the dial each time. Every tenth time it clears the chat, colors a text,
exports, and the page is loaded anew.

Writes playground-loads.csv (page, ms until the message box, ms until the dials, requests, KB) and playground-memory.csv
(seconds, replies, MB of the server's anonymous resident memory, MB of the page's JavaScript heap).
"""

import argparse
import contextlib
import csv
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time

from .machine import about

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run", "--disable-quic", "--enable-precise-memory-info"]  # fmt: skip
WAIT = 600_000  # ms
WATCH = """
const seen = {};
const look = () => {
  const box = document.querySelector('#message textarea');
  if (box?.offsetParent) seen.message ??= performance.now();
  if (document.querySelector('#edits, [id^=dial-]')?.offsetParent) seen.dials ??= performance.now();
  requestAnimationFrame(look);
};
look();
window.seen = seen;
"""
ASKED = ["How was your weekend?", "What do you think of Mondays?", "Tell me about your day.", "Describe a walk in the park."]


def serve(which, port):
    """In a process of its own: serves a page, says so, and waits."""
    if which == "bare":
        import gradio as gr

        with gr.Blocks(analytics_enabled=False) as page:
            gr.Markdown("## bare")
            gr.Textbox(elem_id="message")
        page.launch(server_port=port, quiet=True, prevent_thread_lock=True, footer_links=[], ssr_mode=False)
    else:
        import fastedit as fe
        from fastedit.playground.page import serve as serve_page
        from fastedit.playground.session import Session

        serve_page(Session(*fe.chat_model()), "SmolLM2-135M-Instruct", port=port, block=False)
    print("serving", flush=True)
    time.sleep(1e6)


@contextlib.contextmanager
def served(which):
    """(process, address) of a page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.playground", "--serve", which, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not any(line.startswith("serving") for line in process.stdout):
            raise RuntimeError(f"the {which} page did not start")
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.kill()


@contextlib.contextmanager
def tab_at(driver, url):
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM, timeout=WAIT)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(WAIT)
    tab.add_init_script(WATCH)
    tab.goto(url, wait_until="commit")
    yield tab
    browser.close()


def loads(driver, count):
    for _turn in range(count):
        for which in ("bare", "playground"):
            with served(which) as (_, url), tab_at(driver, url) as tab:
                tab.wait_for_function("seen.message" + (" && seen.dials" if which == "playground" else ""))
                seen = tab.evaluate("seen")
                files = tab.evaluate(
                    "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                    ".map(entry => entry.decodedBodySize)"
                )
            row = {
                "page": which, "message_ms": round(seen["message"]), "dials_ms": round(seen.get("dials", 0)) or "",
                "requests": len(files), "KB": round(sum(files) / 1000), "load_average": round(os.getloadavg()[0], 1),
            }  # fmt: skip
            print(row, flush=True)
            yield row


def resident(process):
    """MB of memory that the process has taken, without the pages of files, such as weights, that the system may drop."""
    text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) / 1000


def put(tab, box, value):
    number = tab.locator(f"{box} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def make(tab, name, positive, negative):
    tab.fill("#positive textarea", "\n".join(positive))
    tab.fill("#negative textarea", "\n".join(negative))
    tab.fill("#name input, #name textarea", name)
    tab.click("#make")
    tab.wait_for_selector(f"#dial-{name}")


def color(tab, text):
    tab.get_by_role("tab", name="Color tokens").click()
    tab.fill("#colored-text textarea", text)
    tab.click("#color")
    tab.wait_for_selector("#colored .token")


def export(tab):
    tab.get_by_role("tab", name="Export").click()
    tab.click("#export")


def use(driver, minutes, every=20):
    from fastedit.examples import HAPPY, SAD, lines

    with served("playground") as (process, url), tab_at(driver, url) as tab:
        make(tab, "happy", lines(HAPPY), lines(SAD))
        begun, replies = time.monotonic(), 0
        while time.monotonic() - begun < 60 * minutes:
            due = begun + every * replies
            time.sleep(max(0, due - time.monotonic()))
            if replies % 10 == 0:
                color(tab, "It was a wonderful day, and then it was a terrible day.")
                export(tab)
                tab.wait_for_function("document.querySelector('#files').innerText.includes('.zip')")
                tab.reload(wait_until="commit")
                tab.wait_for_selector("#dial-happy")
                put(tab, "#length", 32)
            put(tab, "#dial-happy", (replies % 5 - 2) / 2)
            tab.fill("#message textarea", ASKED[replies % len(ASKED)])
            tab.click("#send")
            finish(tab, replies % 10 + 1)
            replies += 1
            row = {
                "seconds": round(time.monotonic() - begun), "replies": replies, "server_MB": round(resident(process)),
                "page_heap_MB": round(tab.evaluate("performance.memory.usedJSHeapSize") / 1e6, 1),
            }  # fmt: skip
            print(row, flush=True)
            yield row


def finish(tab, count):
    """Waits for the whole of the edited model's count-th reply: the meter then ends without dots."""
    tab.wait_for_function(
        "count => document.querySelectorAll('#edited [data-testid=bot]').length >= count"
        " && !document.querySelector('#meter').innerText.trim().endsWith('…')",
        arg=count,
    )


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = None
        for row in rows:
            row |= about()
            writer = writer or csv.DictWriter(file, list(row), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
            file.flush()
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=0, help="of each page")
    parser.add_argument("--minutes", type=float, default=0, help="of use")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.port)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        if given.loads:
            rows = list(loads(driver, given.loads))
            write(given.out / "playground-loads.csv", rows)
            for which, column in (("bare", "message_ms"), ("playground", "message_ms"), ("playground", "dials_ms")):
                found = [row[column] for row in rows if row["page"] == which]
                print(f"{which}, {column}: median {statistics.median(found)}, {min(found)} to {max(found)}")
        if given.minutes:
            write(given.out / "playground-memory.csv", use(driver, given.minutes))


if __name__ == "__main__":
    main()
