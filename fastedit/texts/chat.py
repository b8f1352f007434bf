"""Rows of text or chat messages as token ids. The chat template is applied once.

Strings are taken as they are: the tokenizer adds its special tokens, and a string that begins with the BOS token gets
no second one. Messages go through the tokenizer's chat template, which writes every special token itself.

A row is {"messages": [...]}, {"conversations": [...]} (also from/value pairs), {"prompt", "response"} (or
"completion"), or for preferences {"prompt", "chosen", "rejected"}. Prompts and answers are strings or message lists.
Chosen and rejected may also be whole conversations without a prompt.
"""

from dataclasses import dataclass

__all__ = [
    "Encoded", "as_messages", "encode", "encode_preference", "encode_row", "prompt_ids", "read_conversation", "render",
    "split_turns", "with_system",
]  # fmt: skip

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # other people's names for them
ANSWERS = ("response", "completion", "answer", "output")
CHATS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Encoded:
    """ids: token ids, the prompt's first. prompt: how many of them are the prompt's.

    ids[prompt:] is the response, which ends with the token that ends a turn.
    """

    ids: list
    prompt: int

    @property
    def response(self):
        return self.ids[self.prompt :]

    def labels(self):
        """The ids with −100 over the prompt, as models take them."""
        return [-100] * self.prompt + self.ids[self.prompt :]

    def cut(self, prompt=None, response=None):
        """At most so many tokens of the prompt (it loses its beginning) and of the response (it loses its end, with its
        EOS)."""
        first = 0 if prompt is None else max(0, self.prompt - prompt)
        last = len(self.ids) if response is None else self.prompt + response
        return Encoded(self.ids[first:last], self.prompt - first)


# --- messages -----------------------------------------------------------------------------------------------------------


def read_conversation(value, where="the row", *, answered=False):
    """[{"role", "content"}] of a message list, checked: at most one system turn, then user and assistant in turns.

    where: its name in an error, such as "row 3, column 'messages'". answered: whether it must end with the assistant.

    Raises:
        ValueError: no messages, a role out of order or unknown, an empty content, no assistant turn.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: found {value!r:.60}, expected a list of messages with role and content")
    found = [_message(given, f"{where}, message {number}") for number, given in enumerate(value)]
    turns = found[1:] if found[0]["role"] == "system" else found
    for number, message in enumerate(turns):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if role != expected:
            order = ", ".join(m["role"] for m in found)
            raise ValueError(f"{where}: roles out of order ({order}), expected {expected} as turn {number + 1}")
    if answered and (not turns or turns[-1]["role"] != "assistant"):
        raise ValueError(f"{where}: there is no assistant turn at the end, so there is nothing to learn")
    if not turns:
        raise ValueError(f"{where}: there is a system turn alone, expected a user turn behind it")
    return found


def _message(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where}: found {given!r:.60}, expected role and content")
    role, content = (given.get(a, given.get(b)) for a, b in (("role", "from"), ("content", "value")))
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where}: the role is {role!r}, expected system, user or assistant")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: the content is {content!r:.60}, expected a text that is not empty")
    return {"role": role, "content": content}


def as_messages(prompt, where="the prompt"):
    """A prompt as messages: a string becomes one user turn."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return read_conversation(prompt, where)


def with_system(tokenizer, prompt, instruction, *, separator="\n\n"):
    """The prompt with an instruction in its system turn, before what is there. `instruction` "" changes nothing.

    If a template has no system turn (Gemma's), the first user turn begins with the instruction. A string begins with
    it.
    """
    if not instruction:
        return prompt
    if isinstance(prompt, str):
        return f"{instruction}{separator}{prompt}"
    messages = [dict(message) for message in prompt]
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{instruction}{separator}{messages[0]['content']}"
        return messages
    try:
        shown = render(tokenizer, [{"role": "system", "content": instruction}, *messages], prompt=True)
    except ValueError:
        shown = ""
    if instruction in shown:
        return [{"role": "system", "content": instruction}, *messages]
    messages[0]["content"] = f"{instruction}{separator}{messages[0]['content']}"
    return messages


def split_turns(messages):
    """One conversation for each assistant turn, up to and including it. Training learns the last turn of each."""
    return [messages[: n + 1] for n, message in enumerate(messages) if message["role"] == "assistant"]


def render(tokenizer, messages, *, prompt):
    """The template's text. prompt: end with the opening of the assistant's turn.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template, and these are messages: set tokenizer.chat_template, or "
            "give strings"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from None


# --- token ids ----------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer, prompt, where="the prompt"):
    """Token ids of a prompt to answer: a string as it is, messages through the template, ready for the answer.

    At most one BOS, and no EOS at the end, whatever the tokenizer adds.
    """
    if not isinstance(prompt, str):
        messages = read_conversation(prompt, where)
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"{where}: it ends with an assistant turn, so there is nothing to answer")
        return _plain(tokenizer, render(tokenizer, messages, prompt=True))
    ids = list(tokenizer(prompt)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos] and prompt.startswith(tokenizer.bos_token):
        ids = ids[1:]
    if eos is not None and ids and ids[-1] == eos and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def encode(tokenizer, prompt, response, where="the row"):
    """Encoded: the prompt's ids, then the response with the token that ends it.

    Args:
        prompt: a string, taken as it is, or messages. response: a string, or one assistant message (in a list or not).

    Raises:
        ValueError: an empty response, messages without a template or out of order. `where` names the row.
    """
    text = _response_text(response, where)
    before = prompt_ids(tokenizer, prompt, where)
    if not before:
        raise ValueError(
            f"{where}: the prompt has no token, and the first one of a response cannot be learned without one before"
        )
    if isinstance(prompt, str):
        ids = before + _behind(tokenizer, prompt, before, text)
        return _ended(tokenizer, ids, len(before), text.endswith(tokenizer.eos_token or "\0"))
    messages = [*read_conversation(prompt, where), {"role": "assistant", "content": text}]
    asked, whole = (render(tokenizer, m, prompt=p) for m, p in ((messages[:-1], True), (messages, False)))
    if not whole.startswith(asked):
        raise ValueError(
            f"{where}: the template writes a conversation with an answer otherwise than the prompt alone, so where the "
            "answer begins is not known; give strings, or a template that only adds the answer"
        )
    said = whole[len(asked) :].rstrip()
    at = said.rfind(text.strip())
    if at < 0:
        raise ValueError(f"{where}: the template does not write the response as it stands: found {said!r:.80}")
    ids = before + _behind(tokenizer, asked, before, said, special=False)
    return _ended(tokenizer, ids, len(before), len(said) > at + len(text.strip()))


def encode_row(tokenizer, row, number=None, columns=None):
    """Encoded of a row to learn: a conversation that ends with the assistant, or a prompt and its response.

    Args:
        row: a dict as at the top of this file. The last turn of a conversation is the response.
        number: of the row, for errors. columns: (prompt, response), names of the columns in place of the usual ones.
    """
    where = "the row" if number is None else f"row {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {row!r:.60}, expected an object with columns")
    chat = next((name for name in CHATS if name in row), None) if columns is None else None
    if chat is not None:
        messages = read_conversation(row[chat], f"{where}, column {chat!r}", answered=True)
        return encode(tokenizer, messages[:-1], messages[-1], f"{where}, column {chat!r}")
    prompt, answer = columns or ("prompt", next((name for name in ANSWERS if name in row), "response"))
    return encode(tokenizer, _column(row, prompt, where), _column(row, answer, where), f"{where}, column {answer!r}")


def encode_preference(tokenizer, row, number=None):
    """(chosen, rejected), each Encoded, of a row {"prompt", "chosen", "rejected"}.

    Without a prompt the two are whole conversations, which must agree up to their last turns.
    """
    where = "the row" if number is None else f"row {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {row!r:.60}, expected an object with prompt, chosen and rejected")
    answers = {name: _column(row, name, where) for name in ("chosen", "rejected")}
    if "prompt" in row:
        return tuple(encode(tokenizer, row["prompt"], v, f"{where}, column {n!r}") for n, v in answers.items())
    read = {n: read_conversation(v, f"{where}, column {n!r}", answered=True) for n, v in answers.items()}
    if read["chosen"][:-1] != read["rejected"][:-1]:
        raise ValueError(f"{where}: chosen and rejected answer different conversations; give a column 'prompt'")
    return tuple(encode(tokenizer, m[:-1], m[-1], f"{where}, column {n!r}") for n, m in read.items())


def _column(row, name, where):
    if row.get(name) is None:
        found = ", ".join(map(str, row)) or "none"
        raise ValueError(f"{where}: there is no column {name!r} (found {found})")
    return row[name]


def _response_text(response, where):
    if isinstance(response, (list, tuple)) and len(response) == 1:
        response = response[0]
    if isinstance(response, dict):
        message = _message(response, where)
        if message["role"] != "assistant":
            raise ValueError(f"{where}: the response's role is {message['role']}, expected assistant")
        response = message["content"]
    if not isinstance(response, str) or not response.strip():
        raise ValueError(f"{where}: the response is {response!r:.60}, expected a text that is not empty")
    return response


def _plain(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _behind(tokenizer, prompt, before, text, special=True):
    """Ids of `text` after a prompt's ids `before`: those of the two together, if that does not change the prompt's.

    If a token would span the border, they are those of the text alone. The model answers after the prompt's own tokens.
    """
    whole = prompt_ids(tokenizer, prompt + text) if special else _plain(tokenizer, prompt + text)
    if whole[: len(before)] == before and len(whole) > len(before):
        return whole[len(before) :]
    return _plain(tokenizer, text)


def _ended(tokenizer, ids, prompt, ended):
    """With an EOS, if nothing else ends the response."""
    eos = tokenizer.eos_token_id
    if not ended and eos is None:
        raise ValueError(f"{type(tokenizer).__name__} has no EOS token, so where a response ends cannot be learned")
    return Encoded(ids if ended or ids[-1] == eos else [*ids, eos], prompt)
