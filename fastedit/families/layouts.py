"""How fused projections order q, k and v: (groups, their widths in each group), for `family.Part`."""


def thirds(attention, columns):
    """All of q, all of k, all of v, equally wide: GPT-2, ModernBERT."""
    return 1, (columns // 3,) * 3


def interleaved(attention, columns):
    """Head by head q, k, v: GPT-NeoX, DeBERTa."""
    heads = getattr(attention, "num_attention_heads", None) or attention.config.num_attention_heads
    return heads, (columns // (3 * heads),) * 3


def grouped_queries(attention, columns):
    """All of q, all of k, all of v, with fewer heads in k and v: Phi-3."""
    query, shared = attention.config.num_attention_heads, attention.config.num_key_value_heads
    head = columns // (query + 2 * shared)
    return 1, (query * head, shared * head, shared * head)


def falcon(attention, columns):
    """Head by head q, k, v; or one k and v after all of q; or after each group's q (the 40B architecture)."""
    heads = attention.num_heads
    if attention.new_decoder_architecture:
        groups = attention.num_kv_heads
    else:
        groups = 1 if attention.multi_query else heads
    head = columns // (heads + 2 * groups)
    return groups, (heads // groups * head, head, head)
