"""What shrinking by name does not know: sizes that hang together, and which layers a hybrid is made of."""

LAYERS = 4
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
OVERRIDES = {
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "LongcatFlashConfig": {"head_dim": 8, "qk_head_dim": 16},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "DoryConfig": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "NemotronHConfig": {"n_groups": 2, "mamba_num_heads": 4},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 8], "lsh_attn_chunk_length": 8,
                       "local_attn_chunk_length": 8},
    "XmodConfig": {"default_language": "en_XX"},
    "BlenderbotConfig": {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
    "ZambaConfig": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "xLSTMConfig": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "PerceiverConfig": {
        "num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 4, "num_self_attention_heads": 4, "qk_channels": 32,
        "v_channels": 32, "num_cross_attention_heads": 4,
    },
    "NeoMMEConfig": {"head_dim": 16},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1},
    "EsmcConfig": {"num_key_value_heads": 4},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Gemma4AssistantConfig": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4},
    },
}  # fmt: skip
