"""What shrinking by name does not know: sizes that hang together, and which layers a hybrid is made of."""

LAYERS = 4
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
OVERRIDES = {
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "LongcatFlashConfig": {"head_dim": 16, "qk_head_dim": 16},
    "Dots1Config": {"n_routed_experts": 4},
    "ReformerConfig": {"is_decoder": True},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 1},
}
