"""Which tokens are measured: spans, responses, suffixes, last k, without attention sinks; of texts and of chat messages."""

import pytest
import tiny_models as tiny
import torch
from gate_cases import vector
from test_capture import hidden_states
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit.capturing.rows_on_disk import Rows
from fastedit.methods.cast import cast, condition

TEXTS = ["the cat sat on the mat .", "a dog ran", "so it is very good ."]
CHAT = [{"role": "user", "content": "is it good ?"}, {"role": "assistant", "content": "yes it is ."}]


@pytest.fixture(scope="module")
def model():
    return tiny.exact(tiny.build("llama"))


def measured(model, data, folder, **how):
    """The rows of layer 1, one an item."""
    fe.capture(model, tokenizer(), data, layers=1, rows=folder, **how)
    return Rows(folder).layer(1)[0]


def states(model, ids):
    return hidden_states(model, "llama", [("block", 1)], ids)["block", 1]


def ids_of(text):
    return tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    "how, texts, spans",
    [
        ({"at": "last 3"}, TEXTS, [(-3, None)] * 3),
        ({"at": "last 9"}, TEXTS, [(0, None)] * 3),
        ({"at": "suffix", "suffix": " i think"}, [f"{t} i think" for t in TEXTS], [(-2, None)] * 3),
        ({"at": "span", "spans": [(4, 7), (2, 9), (0, 2)]}, TEXTS, [(2, 3), (2, 4), (1, 2)]),
    ],
)
def test_spans_of_texts(model, tmp_path, how, texts, spans):
    found = measured(model, TEXTS, tmp_path, sinks=None, **how)
    for row, text, (start, stop) in zip(found, texts, spans, strict=True):
        torch.testing.assert_close(row, states(model, ids_of(text))[start:stop].mean(0), rtol=0, atol=1e-6)


def test_spans_of_token_ids_and_of_padded_batches(model, tmp_path):
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    found = measured(model, ids, tmp_path / "a", at="span", spans=[(1, 3), (0, 2)], sinks=None)
    for row, sequence, (start, stop) in zip(found, ids, ((1, 3), (0, 2)), strict=True):
        torch.testing.assert_close(row, states(model, sequence)[start:stop].mean(0), rtol=0, atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    batch = {"input_ids": torch.tensor([ids[0], [0, *ids[1]]]), "attention_mask": mask}
    left = batch | {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    found = measured(model, [left], tmp_path / "b", at="last 2", sinks=None)
    for row, sequence in zip(found, ids, strict=True):
        torch.testing.assert_close(row, states(model, sequence)[-2:].mean(0), rtol=0, atol=1e-6)


def test_responses_of_messages_and_rows(model, tmp_path):
    found = measured(model, [CHAT, {"prompt": "the cat", "response": "sat ."}], tmp_path, at="response", sinks=None)
    chat = states(model, ids_of("<user> is it good ? </s> <assistant> yes it is . </s>"))
    torch.testing.assert_close(found[0], chat[-5:].mean(0), rtol=0, atol=1e-6)
    row = states(model, ids_of("the cat sat . </s>"))
    torch.testing.assert_close(found[1], row[-3:].mean(0), rtol=0, atol=1e-6)


def test_a_prompt_of_messages_ends_where_the_answer_begins_and_no_bos_is_doubled(model, tmp_path):
    found = measured(model, [CHAT[:1], "<s> a dog ran"], tmp_path, at="last token")
    torch.testing.assert_close(found[0], states(model, ids_of("<user> is it good ? </s> <assistant>"))[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], states(model, ids_of("a dog ran"))[-1], rtol=0, atol=1e-6)
    directions = fe.contrast(model, tokenizer(), [CHAT], [[CHAT[0], {"role": "assistant", "content": "no ."}]], at="response")
    assert directions.about["at"] == "response" and directions.statistics[1]["tokens"] == 5 + 3


def sinking(scale=100.0):
    """A model whose first token, <s>, is a sink: its embedding is `scale` times the others' length."""
    model = tiny.exact(tiny.build("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= scale
    return model


@pytest.mark.parametrize("at", ["mean", "all tokens"])
def test_sinks_are_left_out_of_means_and_counted(tmp_path, at):
    model = sinking()
    whole = [states(model, ids_of(text)) for text in TEXTS]
    assert all(h[0].norm() > 20 * h[1:].norm(dim=1).median() for h in whole)
    found = fe.capture(model, tokenizer(), TEXTS, layers=[1], at=at, rows=tmp_path)
    assert found.left_out == {1: (3, sum(map(len, whole)))} and "left out as attention sinks" in repr(found)
    rows = [h[1:].mean(0) for h in whole] if at == "mean" else [h[1:] for h in whole]
    expected = torch.stack(rows) if at == "mean" else torch.cat(rows)
    torch.testing.assert_close(Rows(tmp_path).layer(1)[0].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1].mean()[0], expected.mean(0), rtol=0, atol=1e-5)
    kept = fe.capture(model, tokenizer(), TEXTS, layers=[1], at=at, sinks=None)
    assert kept.left_out[1][0] == 0 and (kept[1].mean()[0] - expected.mean(0)).abs().max() > 1


def test_the_mean_of_a_prompt_that_decides_is_without_sinks():
    model = sinking()
    ids = torch.tensor([ids_of(TEXTS[0])])
    mean = states(model, ids[0].tolist())[1:].mean(0)
    c = vector(5).double()
    score = torch.cosine_similarity(mean, torch.tanh(torch.outer(c, c) / (c @ c) @ mean), dim=0).item()
    for threshold, opens in ((score - 1e-3, True), (score + 1e-3, False)):
        edit = cast(vector(6), condition(vector(5), layer=1, threshold=threshold), layers=[2])
        with torch.no_grad():
            plain = model(input_ids=ids).logits
            with fe.patch(model, edit) as handle:
                assert ((model(input_ids=ids).logits - plain).abs().max() > 1e-3).item() is opens
                assert [sensor.left_out.tolist() for sensor in handle._sensors()] == [[1]]


def test_the_counts_of_an_interrupted_pass_go_on(tmp_path):
    model, data = sinking(), TEXTS * 30

    def dying():
        yield from data[:70]
        raise KeyboardInterrupt

    how = {"layers": [1], "at": "mean", "batch_size": 2, "resume": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fe.capture(model, tokenizer(), dying(), save_every=0, **how)
    again = fe.capture(model, tokenizer(), data, **how)
    assert again.left_out == fe.capture(model, tokenizer(), data, layers=[1], at="mean").left_out == {1: (90, 570)}
    with pytest.raises(ValueError, match=r"another pass \(sinks 5.0\)"):
        fe.capture(model, tokenizer(), data, **how, sinks=None)


@pytest.mark.parametrize(
    "data, how, message",
    [
        (TEXTS, {"at": "last 0"}, "at is 'last 0', expected one of .*'last K'"),
        (TEXTS, {"at": "suffix"}, "suffix is None with at='suffix'"),
        (TEXTS, {"suffix": "so"}, "suffix is 'so' with at='last token'"),
        (TEXTS, {"at": "span"}, "spans is not given"),
        (TEXTS, {"spans": [(0, 1)] * 3}, "spans is given"),
        (TEXTS, {"at": "span", "spans": [(0, 1)]}, "1 spans for 3 texts"),
        (TEXTS, {"at": "span", "spans": [(0, 1), (3, 40), (0, 1)]}, r"item 1 has the span \(3, 40\), but 9 characters"),
        (TEXTS, {"at": "span", "spans": [(0, 1), (1, 2), (0, 1)]}, "item 1: no token covers characters 1 to 2"),
        (TEXTS, {"at": "response"}, "item 0 is one text without a response"),
        ([CHAT[:1]], {"at": "response"}, "item 0 ends with a user turn"),
        ([CHAT], {"at": "suffix", "suffix": "so"}, "item 0 is messages: at='suffix' is of texts"),
        ([[7, 8]], {"at": "response"}, "item 0 is token ids"),
        ([{"input_ids": torch.ones(1, 2).long()}], {"at": "response"}, "ready batch"),
        (CHAT, {}, "item 0 is one message: the data is one conversation"),
        ([CHAT[1:]], {}, "item 0: roles out of order"),
        ([{"prompt": "a"}], {}, "item 0|row 0: there is no column 'response'"),
        (["a dog", [7, 8]], {}, "texts beside token ids"),
        (TEXTS, {"at": "span", "spans": [(8, 11)] * 3, "max_length": 2}, "item 0 has 8 tokens, of which those at 'span' end"),
        (TEXTS, {"sinks": 1}, "sinks is 1, expected None, or a number above 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(model, data, how, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fe.capture(model, tokenizer(), data, **how)


def test_a_mean_of_sinks_alone_is_refused():
    with pytest.raises(ValueError, match="item 0 has 1 tokens at 'span', all of them attention sinks"):
        fe.capture(sinking(), None, [[1, 8, 9, 10]], at="span", spans=[(0, 1)])


def test_a_template_that_is_not_there(model):
    plain = tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        fe.capture(model, plain, [CHAT])


def test_the_means_of_packed_prompts_are_without_their_own_sinks():
    model, parts = sinking(), [ids_of(text) for text in TEXTS[:2]]
    places = [n for part in parts for n in range(len(part))]
    rows = {"input_ids": torch.tensor([[*parts[0], *parts[1]]]), "position_ids": torch.tensor([places])}
    c = vector(5).double()
    means = [states(model, ids)[1:].mean(0) for ids in parts]
    scores = [torch.cosine_similarity(m, torch.tanh(torch.outer(c, c) / (c @ c) @ m), dim=0).item() for m in means]
    for which, other in ((0, 1), (1, 0)):
        if scores[which] > scores[other]:
            gate = condition(vector(5), layer=1, threshold=sum(scores) / 2)
            with torch.no_grad():
                plain = model(**rows, use_cache=False).logits
                with fe.patch(model, cast(vector(6), gate, layers=[2])) as handle:
                    moved = (model(**rows, use_cache=False).logits - plain).abs().amax(-1)[0] > 1e-3
                    assert [sensor.left_out.tolist() for sensor in handle._sensors()] == [[1, 1]]
            opened = [bool(moved[: len(parts[0])].all()), bool(moved[len(parts[0]) :].all())]
            assert opened[which] and not opened[other]
