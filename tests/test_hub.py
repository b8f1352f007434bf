"""Edits on a Hub: pushed to and loaded from a small local server that speaks huggingface_hub's requests."""

import base64
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_models as tiny

import fastedit as fe
from fastedit.patching import hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Repos(BaseHTTPRequestHandler):
    """Repos in memory: {repo: {path: bytes}}; all uploads are taken as regular ones, in the commit itself."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(payload)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repos, parts = self.server.repos, self.path.split("?")[0].strip("/").split("/")
        if parts[-1] == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            repos.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if "preupload" in parts:
            files = json.loads(body)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if "commit" in parts:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repos["/".join(parts[2:4])][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{SHA}"
            return self.answer({"commitUrl": url, "commitOid": SHA, "success": True})
        return self.answer({"errors": [], "warnings": []})  # validate-yaml

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.server.repos.get("/".join(parts[2:4]))
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            names = [{"rfilename": name} for name in sorted(files)]
            if len(parts) > 4 and parts[4] == "tree":
                tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": SHA} for n in sorted(files)]
                return self.answer(tree)
            return self.answer({"id": "/".join(parts[2:4]), "sha": SHA, "siblings": names, "private": False, "tags": []})
        content = self.server.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        return self.answer(content, ETag=f'"{abs(hash(content)):x}"')


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Repos)
    made.repos = {}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def elsewhere(server, cache, code, code_=0):
    """A process whose hub is the local server: its address is read when huggingface_hub is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache), "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": os.path.dirname(__file__),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment)
    assert done.returncode == code_, done.stderr
    return done.stdout + done.stderr


PUSH = """
    import tiny_models as tiny, torch, fastedit as fe
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED())
    for name, tensor in handle.named_tensors().items():
        tensor.add_(0.1)
    print(handle.push_to_hub("anna/louder", base_model="org/base", training={"lr": 0.01}))
"""
LOAD = """
    import tiny_models as tiny, torch, fastedit as fe
    model = tiny.build("llama")
    handle = fe.load(model, "anna/louder")
    print({float(t.mean().round(decimals=3)) for n, t in handle.named_tensors().items()})
"""


def test_push_and_load_by_name(server, tmp_path):
    said = elsewhere(server, tmp_path / "a", PUSH)
    assert f"/anna/louder/commit/{SHA}" in said
    assert set(server.repos["anna/louder"]) >= {"README.md", "edit.json"}
    card = server.repos["anna/louder"]["README.md"].decode()
    assert 'base_model: "org/base"' in card and "| RED | mlp | 0–2 |" in card and "| lr | 0.01 |" in card
    said = elsewhere(server, tmp_path / "b", LOAD)
    assert "1.1" in said and "0.1" in said
    code = "import tiny_models as tiny, fastedit as fe\nfe.load(tiny.build('llama'), 'anna/quieter')"
    assert "EditFileError: there is no folder anna/quieter, and as a Hub repo" in elsewhere(server, tmp_path / "c", code, 1)


def test_a_card_of_the_users_own_is_kept(server, tmp_path):
    model = tiny.build("llama")
    fe.patch(model, fe.Steer({1: tiny.torch.ones(32)})).save(tmp_path / "edit")
    (tmp_path / "edit" / "README.md").write_text("mine\n")
    code = f"from fastedit.patching import hub\nhub.push({str(tmp_path / 'edit')!r}, 'anna/mine')"
    elsewhere(server, tmp_path / "a", code)
    assert server.repos["anna/mine"]["README.md"] == b"mine\n"
    with pytest.raises(ValueError, match="expected user/name"):
        hub.push(tmp_path / "edit", "mine")


def test_a_card_holds_no_markup_of_the_file(tmp_path):
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED())
    handle.save(tmp_path, training={"note": "a | b\n# <script>alert(1)</script>"})
    header, tensors = fe.store.read(tmp_path)
    header["base"]["model"] = "x`\n---\n<b>"
    text = hub.card(header, tensors, "anna/edit")
    assert "<script>" not in text.replace("\\<script\\>", "") and "\n---\n<b>" not in text.partition("---\n\n")[2]
    assert "a \\| b # " in text
