"""Edits on a Hub: pushed to and loaded from a small local server that speaks huggingface_hub's requests."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_models as tiny
import torch

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
def server(tmp_path, monkeypatch):
    """A hub of this process's own: what huggingface_hub has read of its address when it was imported is put in its place."""
    from huggingface_hub import constants

    made = ThreadingHTTPServer(("127.0.0.1", 0), Repos)
    made.repos, address = {}, f"http://127.0.0.1:{made.server_port}"
    for name, value in {
        "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def test_push_and_load_by_name(server):
    handle = fe.patch(tiny.build("llama"), fe.RED())
    for tensor in handle.named_tensors().values():
        tensor.add_(0.1)
    said = handle.push_to_hub("anna/louder", base_model="org/base", training={"lr": 0.01})
    assert said.endswith(f"/anna/louder/commit/{SHA}")
    assert {"README.md", "edit.json"} < set(server.repos["anna/louder"])
    card = server.repos["anna/louder"]["README.md"].decode()
    assert 'base_model: "org/base"' in card and "| RED | mlp | 0–2 |" in card and "| lr | 0.01 |" in card
    found = fe.load(tiny.build("llama"), "anna/louder").named_tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in handle.named_tensors().items())
    with pytest.raises(fe.EditFileError, match="there is no folder anna/quieter, and as a Hub repo"):
        fe.load(tiny.build("llama"), "anna/quieter")


def test_what_is_pushed_is_of_one_save(server, tmp_path, monkeypatch):
    """A second writer comes after the first file: it waits until all are copied."""
    handle, copy, writers = fe.patch(tiny.build("llama"), fe.Steer({1: torch.ones(32)})), shutil.copy, []
    handle.save(tmp_path / "edit")
    header, tensors = fe.store.read(tmp_path / "edit")

    def copied(*given):
        found = copy(*given)
        if not writers:
            later = {name: 2 * tensor for name, tensor in tensors.items()}
            writers.append(threading.Thread(target=fe.store.write, args=(tmp_path / "edit", header, later)))
            writers[0].start()
            writers[0].join(0.5)
        return found

    monkeypatch.setattr(hub.shutil, "copy", copied)
    hub.push(tmp_path / "edit", "anna/first")
    writers[0].join()
    found = fe.load(tiny.build("llama"), "anna/first").named_tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not any(torch.equal(tensors[name], tensor) for name, tensor in fe.store.read(tmp_path / "edit")[1].items())


def test_a_card_of_the_users_own_is_kept_and_other_files_stay(server, tmp_path):
    fe.patch(tiny.build("llama"), fe.Steer({1: torch.ones(32)})).save(tmp_path / "edit")
    (tmp_path / "edit" / "README.md").write_text("mine\n")
    (tmp_path / "edit" / "secret.txt").write_text("mine alone")
    hub.push(tmp_path / "edit", "anna/mine")
    assert server.repos["anna/mine"]["README.md"] == b"mine\n" and "secret.txt" not in server.repos["anna/mine"]
    with pytest.raises(ValueError, match="expected user/name"):
        hub.push(tmp_path / "edit", "mine")


def test_a_card_holds_no_markup_of_the_file(tmp_path):
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED())
    fe.store.save(handle, tmp_path, training={"note": "a | b\n# <script>alert(1)</script>"})
    header, tensors = fe.store.read(tmp_path)
    header["base"]["model"] = "x`\n---\n<b>"
    text = hub.card(header, tensors, "anna/edit")
    assert "<script>" not in text.replace("\\<script\\>", "") and "\n---\n<b>" not in text.partition("---\n\n")[2]
    assert "a \\| b # " in text
