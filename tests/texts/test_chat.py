"""Rows as token ids under five published templates: one BOS, an end that is learned, the prompt's length."""

import json

import pytest
from chat_tokenizers import ASKED, TEMPLATES, tokenizer_of
from transformers import PreTrainedTokenizerFast

from fastedit.texts import chat
from fastedit.texts.data_files import read_rows


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_has_one_bos_and_learns_where_it_ends(name):
    tokenizer, (_, _, _, end, adds) = tokenizer_of(name), TEMPLATES[name]
    row = chat.encode(tokenizer, ASKED, "fine  \n")
    text = tokenizer.decode(row.ids)
    if adds:
        assert row.ids[0] == tokenizer.bos_token_id and row.ids.count(tokenizer.bos_token_id) == 1
    assert row.ids[: row.prompt] == chat.prompt_ids(tokenizer, ASKED), "the prompt is what generation is given"
    assert row.ids[-1] == tokenizer.convert_tokens_to_ids(end), f"the last token learned is the turn's end: {text!r}"
    assert tokenizer.decode(row.response[:-1]).strip() == "fine" and end not in tokenizer.decode(row.response[:-1])
    assert row.labels()[: row.prompt] == [-100] * row.prompt and row.labels()[row.prompt :] == row.response
    whole = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": "fine  \n"}], tokenize=False)
    assert row.ids == tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"], (
        "nothing but the template's text"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_instruction_goes_into_the_system_turn_or_where_a_template_has_none_into_the_first(name):
    tokenizer = tokenizer_of(name)
    told = chat.with_system(tokenizer, ASKED, "Be brief.")
    text = tokenizer.decode(chat.prompt_ids(tokenizer, told))
    assert text.count("Be brief.") == 1 and "You are helpful." not in text
    assert [m["role"] for m in told] == (["user"] if name in ("gemma", "mistral") else ["system", "user"])
    again = chat.with_system(tokenizer, told, "Rhyme.")
    assert [m["role"] for m in again] == [m["role"] for m in told] and "Rhyme.\n\nBe brief." in again[0]["content"]
    assert ASKED == [{"role": "user", "content": "how are you"}] and chat.with_system(tokenizer, ASKED, "") is ASKED


def test_a_template_that_ends_no_turn_is_given_an_eos():
    tokenizer = tokenizer_of()
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    row = chat.encode(tokenizer, ASKED, "fine")
    assert tokenizer.decode(row.response) == "fine</s>" and tokenizer.bos_token_id not in row.ids


def test_strings_get_the_tokenizer_s_tokens_once():
    tokenizer = tokenizer_of()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert chat.prompt_ids(tokenizer, "ab") == [bos, 97, 98] == chat.prompt_ids(tokenizer, "<s>ab")
    assert chat.encode(tokenizer, "ab", "c").ids == [bos, 97, 98, 99, eos]
    assert chat.encode(tokenizer, "ab", "c</s>").ids == [bos, 97, 98, 99, eos], "an EOS that is there is not doubled"
    adding = tokenizer_of(adds_eos=True)
    assert chat.prompt_ids(adding, "ab") == [bos, 97, 98], "a prompt to be answered has not ended"
    assert chat.encode(adding, "ab", "c") == chat.Encoded([bos, 97, 98, 99, eos], 3)
    assert chat.encode(tokenizer, "abcd", "efg").cut(2, 3) == chat.Encoded([99, 100, 101, 102, 103], 2)


def test_a_token_across_the_border_leaves_the_prompt_as_generation_has_it():
    from tokenizers import Tokenizer, models

    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [2]
    assert chat.encode(tokenizer, "a", "b") == chat.Encoded([0, 1, 3], 1)


def test_rows_in_the_forms_that_people_have():
    tokenizer = tokenizer_of("smollm2")
    expected = chat.encode(tokenizer, ASKED, "fine")
    turns = [*ASKED, {"role": "assistant", "content": "fine"}]
    shared = [{"from": "human", "value": "how are you"}, {"from": "gpt", "value": "fine"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "how are you"}]}, turns[1]]
    for row in (
        {"messages": turns}, {"conversations": shared}, {"messages": parts},
        {"prompt": ASKED, "completion": "fine"}, {"prompt": ASKED, "response": turns[1:]},
    ):  # fmt: skip
        assert chat.encode_row(tokenizer, row) == expected
    assert chat.encode_row(tokenizer, {"q": ASKED, "a": "fine"}, columns=("q", "a")) == expected
    other = [*ASKED, {"role": "assistant", "content": "bad"}]
    pair = (expected, chat.encode(tokenizer, ASKED, "bad"))
    assert chat.encode_preference(tokenizer, {"prompt": ASKED, "chosen": "fine", "rejected": other[1:]}) == pair
    assert chat.encode_preference(tokenizer, {"chosen": turns, "rejected": other}) == pair
    longer = [*turns, ASKED[0], {"role": "assistant", "content": "still fine"}]
    assert [t[-1]["content"] for t in chat.split_turns(longer)] == ["fine", "still fine"]
    assert chat.as_messages("how are you") == ASKED


BAD = [
    ({"messages": ASKED}, "row 4, column 'messages': there is no assistant turn"),
    ({"messages": []}, r"row 4, column 'messages': found \[\]"),
    ({"messages": [ASKED[0], ASKED[0]]}, r"roles out of order \(user, user\), expected assistant as turn 2"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "roles out of order"),
    (
        {"messages": [*ASKED, {"role": "judge", "content": "x"}]},
        "row 4, column 'messages', message 1: the role is 'judge'",
    ),
    ({"messages": [*ASKED, {"role": "assistant", "content": " "}]}, "message 1: the content is ' '"),
    ({"prompt": ASKED, "response": ""}, "row 4, column 'response': the response is ''"),
    ({"prompt": ASKED}, r"row 4: there is no column 'response' \(found prompt\)"),
    ({"prompt": "", "response": "a"}, "row 4, column 'response': the prompt has no token"),
    ({"text": "x"}, r"row 4: there is no column 'prompt' \(found text\)"),
    ("text", "row 4: found 'text', expected an object"),
]


@pytest.mark.parametrize("row, said", BAD)
def test_a_bad_row_is_named(row, said):
    with pytest.raises(ValueError, match=said):
        chat.encode_row(tokenizer_of("smollm2"), row, 4)


def test_bad_preferences_and_a_tokenizer_without_template():
    tokenizer = tokenizer_of("smollm2")
    with pytest.raises(ValueError, match=r"row 2: there is no column 'rejected' \(found prompt, chosen\)"):
        chat.encode_preference(tokenizer, {"prompt": "a", "chosen": "b"}, 2)
    asked = [[{"role": "user", "content": c}, {"role": "assistant", "content": "x"}] for c in "ab"]
    with pytest.raises(ValueError, match="row 2: chosen and rejected answer different conversations"):
        chat.encode_preference(tokenizer, {"chosen": asked[0], "rejected": asked[1]}, 2)
    with pytest.raises(ValueError, match="has no chat template, and these are messages"):
        chat.encode(tokenizer_of(), ASKED, "fine")
    with pytest.raises(ValueError, match="so there is nothing to answer"):
        chat.prompt_ids(tokenizer, [*ASKED, {"role": "assistant", "content": "fine"}])


def test_files_of_rows(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d\u2028e"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "r.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.tsv").write_text("prompt\tresponse\na\tb\nc\td\u2028e\n", encoding="utf-8")
    (tmp_path / "r.csv").write_text("prompt,response\na,b\nc,d\u2028e\n", encoding="utf-8")
    names = ["r.jsonl", "r.json", "r.tsv", "r.csv"]
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for name in (*names, "r.parquet"):
        assert read_rows(tmp_path / name) == rows, name
    (tmp_path / "bad.jsonl").write_text(lines + "\n{", encoding="utf-8")
    (tmp_path / "bad.json").write_text('["a"]')
    (tmp_path / "bad.parquet").write_text("not parquet")
    (tmp_path / "empty.jsonl").write_text("")
    for name, said in (
        ("bad.jsonl", "line 3 of .* is not JSON"), ("bad.json", "row 1 of .* is 'a'"), ("bad.parquet", "no Parquet file"),
        ("empty.jsonl", "has no rows"), ("rows.xml", "is none of .jsonl, .json"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read_rows(tmp_path / name)
