"""Tokenizers of single characters with five published chat templates."""

from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT = (  # a system turn of its own, if there is none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {  # template, BOS, EOS, what ends a turn, whether the tokenizer adds a BOS
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", True),
    "qwen": (DEFAULT + CHATML, None, "<|im_end|>", "<|im_end|>", False),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>", True),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>", True),
    "smollm2": (DEFAULT + CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", False),
}
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|im_start|>", "[INST]", "[/INST]"]
ASKED = [{"role": "user", "content": "how are you"}]


def tokenizer_of(name=None, adds_eos=False):
    """Characters as tokens, the special tokens of a template, and what the tokenizer itself adds to a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    template, bos, eos, end, adds = TEMPLATES.get(name, (None, "<s>", "</s>", "</s>", True))
    special = list(dict.fromkeys(token for token in (bos, eos, end, *SPECIAL) if token))
    letters = {chr(n): n for n in range(128)}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if adds:
        around = f"{bos}:0 $A:0" + (f" {eos}:0" if adds_eos else "")
        known = [(token, made.token_to_id(token)) for token in (bos, eos)]
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=known)
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=eos)
    found.chat_template = template
    return found
