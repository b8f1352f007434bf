"""A fast tokenizer of words for tests: <s> in front, as Llama's, a chat template, no files."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = (
    "a", "the", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad", "very", "so", "i", "think", "yes", "no", "it", "is",
    "was", "big", "small", "red", ".", ",", "?",
)  # fmt: skip


def tokenizer(words=WORDS):
    """Ids: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, 4 to 6 the roles, then the words."""
    special, roles = ("<pad>", "<s>", "</s>", "<unk>"), ("<system>", "<user>", "<assistant>")
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *roles, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(special))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made
