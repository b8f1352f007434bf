"""The public face as a program meets it, for a type checker (make lint); nothing here runs.

assert_type says what must be known of a result. `# pyright: ignore[rule]` stands where the call is wrong: were the mistake no
longer found, the ignore would be unnecessary, which is an error too (pyproject.toml).
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch

import fastedit
from fastedit import arrays, training
from fastedit.patching.explain import Explanation
from fastedit.recipes import predict
from fastedit.training import EditCallback, Reference
from fastedit.verifying.outcome import Outcome


def edits(vectors: dict[int, torch.Tensor], directions: fastedit.Directions) -> list[fastedit.Edit]:
    gate = fastedit.Gate(directions, 0.5, kind="cosine", layer=3, site="block") & ~fastedit.Gate(vectors)
    assert_type(fastedit.RED(layers=range(4), positions="first 4 + last 4", strength=0.5).when(gate), fastedit.RED)
    assert_type(fastedit.REDPlus(layers=[0, -1]), list[fastedit.RED])
    fastedit.Rotate(torch.eye(2, 8), 0.1, trainable=True, site="mlp", keep_norm=True)
    fastedit.LowRank(torch.ones(1, 8), None, np.ones((1, 8)), layers="decoder.3")
    return [
        fastedit.ScaleBias(bias=False), fastedit.Steer(directions, layers=slice(2, None), positions={"tokens": [5]}),
        fastedit.Ablate(vectors), fastedit.Clamp([1.0, 0.0], 2), fastedit.Amplify(vectors, 0.0), fastedit.Probe(vectors),
        fastedit.LoReFT(4, seed=1), fastedit.DiReFT(4, site="attn"), fastedit.NoReFT(4),
    ]  # fmt: skip


def wrong_edits(vectors: torch.Tensor) -> None:
    fastedit.RED(sites="mlp")  # pyright: ignore[reportCallIssue]
    fastedit.RED(site="mpl")  # pyright: ignore[reportArgumentType]
    fastedit.Steer()  # pyright: ignore[reportCallIssue]
    fastedit.Steer(vectors, strength="high")  # pyright: ignore[reportArgumentType]
    fastedit.Steer(vectors, layers=2.5)  # pyright: ignore[reportArgumentType]
    fastedit.LoReFT(rank=4, seeds=0)  # pyright: ignore[reportCallIssue]
    fastedit.Probe(vectors, positions="prompt")  # pyright: ignore[reportCallIssue]
    fastedit.REDPlus(site="mlp")  # pyright: ignore[reportCallIssue]
    fastedit.Gate(vectors, decide="tokens")  # pyright: ignore[reportArgumentType]
    fastedit.Stack(["a", "b"])  # pyright: ignore[reportArgumentType]
    fastedit.NoSuchEdit()  # pyright: ignore[reportAttributeAccessIssue]


def handles(model: torch.nn.Module, ids: torch.Tensor) -> None:
    with fastedit.patch(model, fastedit.RED(), freeze=True) as handle:
        assert_type(handle, fastedit.Handle)
        assert_type(handle.strength, float)
        handle.strength = 2
        assert_type(handle.named_tensors(tenant=0), dict[str, torch.Tensor])
        assert_type(handle.readings[0], torch.Tensor)
        assert_type(handle.explain({"input_ids": ids}), Explanation)
        assert_type(handle.save("my-edit"), Path)
        handle.prompt([4, 5])
        handle.mask(ids > 0)
    assert_type(fastedit.load(model, Path("my-edit"), head=False), fastedit.Handle)
    assert_type(fastedit.verify(model, "my-edit", modes=["cache"]).ok, bool)
    assert_type(fastedit.verify(model, fastedit.RED()), Outcome)
    fastedit.patch(model, fastedit.RED(), tenant=2)  # pyright: ignore[reportCallIssue]
    fastedit.patch(model, "my-edit")  # pyright: ignore[reportArgumentType]
    handle.strength = "high"  # pyright: ignore[reportAttributeAccessIssue]
    handle.merge(dtype=torch.float32)  # pyright: ignore[reportCallIssue]


def banks(model: torch.nn.Module, directions: fastedit.Directions) -> None:
    with fastedit.Bank(model, 256, sites=("mlp", "block"), rank=4) as bank:
        bank.add("anna", "my-edit")
        bank.add("ben", [fastedit.Steer(directions)])
        with bank.assign(["anna", None, fastedit.Stack("anna", "ben")], [1.0, 1.0, [0.5, 2.0]]):
            model(torch.ones(3, 4))
        assert_type(bank.stats().hits, int)
    bank.add("carl", 3)  # pyright: ignore[reportArgumentType]
    fastedit.Bank(model, 256, unassigned="ignore")  # pyright: ignore[reportArgumentType]


def directions(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> None:
    captured = fastedit.capture(model, tokenizer, texts, layers=range(8), site="mlp", groups=[0, 1])
    assert_type(captured[3], fastedit.Moments)
    assert_type(captured[3].mean(), torch.Tensor)
    found = fastedit.contrast(model, tokenizer, texts, texts, method="probe")
    assert_type(found, fastedit.Directions)
    assert_type(2 * found.normalised() - found / 2, fastedit.Directions)
    assert_type(found.window(3), tuple[int, ...])
    assert_type(fastedit.calibrate(model, fastedit.Steer(found), texts, target_kl=0.5, tokenizer=tokenizer).strength, float)
    swept = fastedit.sweep(model, found, lambda model: [0.0, 1.0], doses=[0.5, 1], layers=[range(2), 3], unit="residual")
    assert_type(swept.edit(swept.best()), fastedit.Steer)
    fastedit.contrast(model, tokenizer, texts, texts, method="median")  # pyright: ignore[reportArgumentType]
    fastedit.calibrate(model, fastedit.RED(), texts)  # pyright: ignore[reportCallIssue]
    fastedit.sweep(model, found, len, doses=[1], unit="nats")  # pyright: ignore[reportArgumentType]


def neighbours(model: torch.nn.Module) -> None:
    chat, tokenizer = fastedit.chat_model(dtype=torch.bfloat16)
    chat.generate(**tokenizer("Once", return_tensors="pt"))
    assert_type(fastedit.load_red_checkpoint(model, "delta_vector.pth"), fastedit.Handle)
    handle: fastedit.Handle = fastedit.adopt(model, positions="call")
    handle.remove()
    fastedit.adopt(model, positions="last")  # pyright: ignore[reportArgumentType]


def ops(hidden: torch.Tensor, scale: torch.Tensor, read: torch.Tensor) -> None:
    assert_type(fastedit.ops.edit(hidden, scale, strength=0.5), torch.Tensor)
    assert_type(fastedit.ops.edit(hidden, read=read, write=read, return_projection=True), tuple[torch.Tensor, torch.Tensor])
    out, normed = fastedit.ops.edit_add_norm(hidden, hidden, scale, kind="gemma")
    assert_type((out, normed), tuple[torch.Tensor, torch.Tensor])
    assert_type(fastedit.ops.project(hidden, read), torch.Tensor)
    fastedit.ops.value_ascent(hidden, fastedit.ValueNet(8, units=(16, 4)), 3, 0.5)
    fastedit.ops.edit_add(hidden, hidden, on="residual")  # pyright: ignore[reportArgumentType]
    fastedit.ops.edit(hidden, scales=scale)  # pyright: ignore[reportCallIssue]
    fastedit.ops.moments(hidden, groups="two")  # pyright: ignore[reportArgumentType]


def numpy_arrays(hidden: np.ndarray, scale: np.ndarray) -> None:
    arrays.edit(hidden, scale=scale, strength=0.5).sum()
    count, _, _ = arrays.moments(hidden)
    count.astype(float)
    arrays.edit_add_norm(hidden, hidden, scale, kind="batch")  # pyright: ignore[reportArgumentType]
    arrays.project(hidden)  # pyright: ignore[reportCallIssue]


def training_of(model: torch.nn.Module, handle: fastedit.Handle, tokenizer: Any) -> None:
    rows = [{"prompt": "Hi", "response": "Hello"}]
    training.sft(handle, tokenizer, rows, lr=2e-3, bf16=True).evaluate()
    training.prefer(handle, tokenizer, rows, loss="orpo", stored="reference.safetensors")
    classifier, handle = training.classify(model, tokenizer, [("fine", 1)], fastedit.RED(), **training.GLUE["sst2"])
    assert_type(predict(classifier, ["a film"], tokenizer), torch.Tensor)
    training.regress(model, tokenizer, [(("a", "b"), 0.5)], fastedit.RED())
    EditCallback(handle, decay="identity", resume="out")
    assert_type(Reference(handle), Reference)
    training.prefer(handle, tokenizer, rows, loss="ppo")  # pyright: ignore[reportArgumentType]
    EditCallback(model)  # pyright: ignore[reportArgumentType]
    training.classify(model, tokenizer, [("fine", 1)], head="mean")  # pyright: ignore[reportCallIssue]
