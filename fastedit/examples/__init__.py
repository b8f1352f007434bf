"""Small texts written for this project: sentences in two moods, neutral prompts, words that tell the moods
apart, pairs of a helpful and a rude answer, and what a farmer of the year 1750 can and cannot answer, line by line.

The command line's examples and the demo use them. The files are beside this one.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
HAPPY, SAD, PROMPTS, MOODS = (FOLDER / name for name in ("happy.txt", "sad.txt", "prompts.txt", "moods.json"))
PREFERENCES = FOLDER / "preferences.jsonl"
LABELED = FOLDER / "moods.tsv"  # the sentences of HAPPY and SAD, shuffled, with columns text and label
CAN, CANNOT = FOLDER / "can.txt", FOLDER / "cannot.txt"


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def preferences():
    """[{"prompt", "chosen", "rejected"}], 24 of them"""
    return [json.loads(line) for line in lines(PREFERENCES)]


def moods():
    """{"happy": frozenset of words, "sad": frozenset of words}"""
    return {mood: frozenset(words) for mood, words in json.loads(MOODS.read_text(encoding="utf-8")).items()}


def tally(text, words):
    """{mood: how many of the text's words are among the mood's}"""
    found = re.findall(r"[a-z]+", text.lower())
    return {mood: sum(word in known for word in found) for mood, known in words.items()}
