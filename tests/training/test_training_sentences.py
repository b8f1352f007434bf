"""Classification, pairs and regression: a head and an edit that learn what a frozen encoder's head cannot."""

import pytest
import torch
from chat_tokenizers import tokenizer_of
from transformers import BertConfig, BertModel

import fastedit as fe
from fastedit import training
from fastedit.recipes import accuracy, predict
from fastedit.training.sentences import correlations, with_head

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160,
         "initializer_range": 0.05}  # fmt: skip
LETTERS = "abcdefgh"


def encoder():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL, max_position_embeddings=64))


def words(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return ["".join(LETTERS[int(n)] for n in torch.randint(len(LETTERS), (6,), generator=draw)) for _ in range(count)]


@pytest.mark.parametrize("head", ["mean", "token"])
def test_classify_learns_and_comes_back(head, tmp_path):
    rows = [(text, int("a" in text)) for text in words(96)]
    tokenizer = tokenizer_of()
    model, handle = training.classify(encoder(), tokenizer, rows, fe.RED(), head=head, epochs=10, batch_size=16, lr=5e-2)
    logits = predict(model, [text for text, _ in rows], tokenizer)
    assert not handle.never_moved()
    if head == "mean":  # the first token of an untrained encoder says little of the others
        assert accuracy(logits, [label for _, label in rows]) > 0.9
    handle.save(tmp_path)
    fresh = with_head(encoder(), 2, head)
    fe.load(fresh, tmp_path)
    assert torch.equal(predict(fresh, [text for text, _ in rows], tokenizer), logits)


def test_pairs_are_told_apart_by_their_segments():
    both = list(zip(words(64), words(64, 1), strict=True))
    rows = [(pair, int("a" in pair[0])) for pair in both]
    tokenizer = tokenizer_of()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    seen = []
    model = encoder()
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs.get("token_type_ids")), with_kwargs=True)
    trained, _ = training.pairs(model, tokenizer, rows, fe.RED(), epochs=25, batch_size=16, lr=5e-2)
    assert all(types is not None for types in seen)
    assert accuracy(predict(trained, both, tokenizer), [label for _, label in rows]) > 0.8
    with pytest.raises(ValueError, match="row 2: found 'ab', expected a pair of texts"):
        training.pairs(encoder(), tokenizer, [rows[0], ("ab", 1)], fe.RED())


def test_regress_fits_numbers():
    rows = [(text, sum(letter == "b" for letter in text)) for text in words(96)]
    tokenizer = tokenizer_of()
    model, _ = training.regress(encoder(), tokenizer, rows, fe.RED(), epochs=12, batch_size=16)
    found = predict(model, [text for text, _ in rows], tokenizer)
    assert found.shape == (96, 1) and correlations(found, [value for _, value in rows])["pearson"] > 0.9


def test_states_are_had_with_nothing_in_the_head_s_place():
    """The demo fits its frozen head to them."""
    model = with_head(encoder(), 2).eval()
    model.classifier = torch.nn.Identity()
    ids = torch.tensor([[5, 6, 7]])
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(states, model.encoder(input_ids=ids).last_hidden_state.mean(1))


def test_a_head_over_a_bf16_encoder_trains_in_fp32():
    model = with_head(encoder().to(torch.bfloat16), 2)
    loss = model(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1]))[
        "loss"
    ]
    loss.backward()
    assert model.classifier.weight.dtype is model.classifier.weight.grad.dtype is torch.float32


def test_correlations():
    assert correlations([1, 2, 3], [1, 4, 9])["spearman"] == pytest.approx(1.0)
    assert correlations([1, 1, 2, 3], [4, 4, 3, 1])["spearman"] == pytest.approx(-1.0)
    assert correlations([1, 2, 3, 4], [2, 4, 6, 8.5])["pearson"] == pytest.approx(0.99838, abs=1e-5)


def test_the_paper_s_head_and_settings():
    head = with_head(encoder(), 3, "token").eval()
    states = torch.randn(2, 5, 32)
    first, second = head.classifier[1], head.classifier[4]
    expected = torch.tanh(states[:, 0] @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(head.classifier(head.pooled(states, torch.ones(2, 5))), expected)
    assert [m.p for m in head.classifier if isinstance(m, torch.nn.Dropout)] == [0.5, 0.5]
    assert training.GLUE["rte"] == {"head": "token", "lr": 8e-3, "epochs": 40}


@pytest.mark.parametrize("call, said", [
    (lambda: training.classify(encoder(), None, [], fe.RED()), "no rows"),
    (lambda: training.classify(encoder(), None, [("a", 0), ("b", "x")], fe.RED()), "row 2: the label is 'x'"),
    (lambda: training.classify(encoder(), None, [("a", 5)], fe.RED(), labels=2), "label 5, and labels=2"),
    (lambda: training.regress(encoder(), None, [("a", 1.0), ("b", "two")], fe.RED()), "row 2: 'two' is no number"),
    (lambda: with_head(encoder(), 2, "cls"), "head is 'cls', expected one of mean, token"),
])  # fmt: skip
def test_bad_rows(call, said):
    with pytest.raises(ValueError, match=said):
        call()
