"""Tiny random models of many families, as configs of transformers: 2 to 4 layers, hidden size 64, a byte tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedModel

from rolltune.model.load import auto_class

VOCAB = 264
BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
SL, FU, LI = "sliding_attention", "full_attention", "linear_attention"
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
HYB = dict(linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
           linear_num_value_heads=4, head_dim=16, layer_types=[LI, FU])  # fmt: skip
TEXT = BASE | dict(head_dim=16)
VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Limits of a model and lengths of the sequences that are tried on it, in tokens.

    Attributes:
        window: sliding window, or chunk.
        positions: positions that RoPE was first trained on.
        prompts: of two prompts.
    """

    window: int
    positions: int
    prompts: tuple[int, int]


# Completions have up to 16 tokens. "short" is within all limits. "long" is beyond limits that the check at load sees,
# "beyond" is beyond limits that it cannot see, since they are longer than its made-up prompts. In both, one sequence is
# within RoPE's limit and the other is not.
LENGTHS = {
    "short": Lengths(window=64, positions=64, prompts=(9, 14)),
    "long": Lengths(window=20, positions=24, prompts=(7, 37)),
    "beyond": Lengths(window=90, positions=100, prompts=(30, 110)),
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in BASE.items() if name not in names}


def rope(kind: str, positions: int, dim: int = 16, **more: Any) -> dict[str, Any]:
    extra: dict[str, dict[str, Any]] = {
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "longrope": {
            "short_factor": [1.0 + 0.05 * i for i in range(dim // 2)],
            "long_factor": [2.0 + 0.5 * i for i in range(dim // 2)],
            "factor": 256 / positions,
        },
    }
    given = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": positions}
    return given | extra[kind] | more


def families(window: int, positions: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the name of the config class and its arguments, by family."""
    # fmt: off
    return {
        "llama": ("LlamaConfig", BASE | dict(tie_word_embeddings=True)),
        "llama3.x": ("LlamaConfig", BASE | dict(rope_parameters=rope("llama3", positions), tie_word_embeddings=True)),
        "llama-yarn": ("LlamaConfig", BASE | dict(rope_parameters=rope("yarn", positions))),
        "llama-dynamic": ("LlamaConfig", BASE | dict(
            rope_parameters=rope("dynamic", positions), max_position_embeddings=positions,
        )),
        "llama-bias": ("LlamaConfig", BASE | dict(attention_bias=True, mlp_bias=True, attention_dropout=0.1)),
        "mistral": ("MistralConfig", BASE | dict(sliding_window=window)),
        "ministral": ("MinistralConfig", BASE | dict(sliding_window=window, layer_types=[SL, FU], head_dim=16)),
        "ministral3": ("Ministral3Config", BASE | dict(
            sliding_window=None, head_dim=16, rope_parameters=rope("yarn", positions, llama_4_scaling_beta=0.1),
        )),
        "mixtral": ("MixtralConfig", BASE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=window)),
        "qwen2": ("Qwen2Config", BASE | dict(use_sliding_window=True, sliding_window=window, max_window_layers=1)),
        "qwen2.5": ("Qwen2Config", BASE | dict(tie_word_embeddings=True)),
        "qwen2-moe": ("Qwen2MoeConfig", BASE | dict(**MOE, shared_expert_intermediate_size=48)),
        "qwen3": ("Qwen3Config", BASE | dict(head_dim=16, tie_word_embeddings=True)),
        "qwen3-moe": ("Qwen3MoeConfig", BASE | dict(**MOE, head_dim=16)),
        "qwen3-next": ("Qwen3NextConfig", BASE | dict(**HYB, **MOE, shared_expert_intermediate_size=48)),
        "qwen3.5-text": ("Qwen3_5TextConfig", BASE | dict(**HYB)),
        "gemma": ("GemmaConfig", BASE | dict(head_dim=16)),
        "gemma2": ("Gemma2Config", BASE | dict(
            head_dim=16, query_pre_attn_scalar=16, sliding_window=window, layer_types=[SL, FU],
        )),
        "gemma3-text": ("Gemma3TextConfig", BASE | dict(
            head_dim=16, query_pre_attn_scalar=16, sliding_window=window, layer_types=[SL, FU],
        )),
        "gemma3n-text": ("Gemma3nTextConfig", BASE | dict(
            head_dim=16, sliding_window=window, num_hidden_layers=4, layer_types=[SL, FU, SL, FU],
            vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, laurel_rank=8, num_kv_shared_layers=2,
            intermediate_size=96, activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
        )),
        "gemma4-text": ("Gemma4TextConfig", BASE | dict(
            head_dim=16, global_head_dim=16, sliding_window=window, num_hidden_layers=4, layer_types=[SL, FU, SL, FU],
            vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, num_kv_shared_layers=2,
        )),
        "phi(1,2)": ("PhiConfig", BASE | dict(partial_rotary_factor=0.5, num_key_value_heads=4)),
        "phi3": ("Phi3Config", BASE | dict(sliding_window=window)),
        "phi3-longrope": ("Phi3Config", BASE | dict(
            original_max_position_embeddings=positions, rope_parameters=rope("longrope", positions),
        )),
        "phi4-mini": ("Phi3Config", BASE | dict(
            original_max_position_embeddings=positions, tie_word_embeddings=True,
            rope_parameters=rope("longrope", positions, dim=12, partial_rotary_factor=0.75),
        )),
        "phimoe": ("PhimoeConfig", BASE | dict(
            num_local_experts=4, num_experts_per_tok=2, sliding_window=window, attention_bias=True, lm_head_bias=True,
        )),
        "phimoe-nobias": ("PhimoeConfig", BASE | dict(num_local_experts=4, num_experts_per_tok=2, lm_head_bias=False)),
        "smollm3": ("SmolLM3Config", BASE | dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])),
        "olmo": ("OlmoConfig", BASE | dict(clip_qkv=8.0)),
        "olmo2": ("Olmo2Config", BASE),
        "olmo3": ("Olmo3Config", BASE | dict(sliding_window=window, num_hidden_layers=4, layer_types=[SL, SL, SL, FU])),
        "olmoe": ("OlmoeConfig", BASE | dict(num_experts=4, num_experts_per_tok=2)),
        "flex-olmo": ("FlexOlmoConfig", BASE | dict(num_experts=4, num_experts_per_tok=2)),
        "gpt2": ("GPT2Config", dict(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0,
        )),
        "gpt-bigcode": ("GPTBigCodeConfig", dict(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0,
        )),
        "gpt-neo": ("GPTNeoConfig", dict(
            vocab_size=VOCAB, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=window, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        )),
        "gpt-neox/pythia": ("GPTNeoXConfig", without("num_key_value_heads")),
        "gptj": ("GPTJConfig", dict(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8, bos_token_id=0,
            eos_token_id=0,
        )),
        "opt": ("OPTConfig", dict(
            vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, word_embed_proj_dim=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )),
        "opt-proj": ("OPTConfig", dict(
            vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, word_embed_proj_dim=32, do_layer_norm_before=False, bos_token_id=0,
            eos_token_id=0, pad_token_id=1,
        )),
        "bloom": ("BloomConfig", dict(
            vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )),
        "falcon": ("FalconConfig", without("num_key_value_heads", "intermediate_size")),
        "falcon-alibi": ("FalconConfig", without("num_key_value_heads", "intermediate_size") | dict(alibi=True)),
        "mpt": ("MptConfig", dict(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4, max_seq_len=256)),
        "stablelm": ("StableLmConfig", BASE | dict(use_qkv_bias=True, partial_rotary_factor=0.5)),
        "cohere": ("CohereConfig", BASE | dict(logit_scale=0.0625)),
        "cohere2": ("Cohere2Config", BASE | dict(
            logit_scale=0.25, sliding_window=window, num_hidden_layers=4, layer_types=[SL, SL, SL, FU], head_dim=16,
        )),
        "deepseek-v2": ("DeepseekV2Config", BASE | dict(
            num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=24, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
            first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=16,
        )),
        "deepseek-v3": ("DeepseekV3Config", BASE | dict(
            num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=24, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
            first_k_dense_replace=1, n_group=2, topk_group=1, head_dim=16,
            rope_parameters=rope("yarn", positions, mscale=1.0, mscale_all_dim=1.0),
        )),
        "glm": ("GlmConfig", BASE | dict(head_dim=16, partial_rotary_factor=0.5)),
        "glm4": ("Glm4Config", BASE | dict(head_dim=16, partial_rotary_factor=0.5)),
        "glm4-moe": ("Glm4MoeConfig", BASE | dict(
            head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
            first_k_dense_replace=1, n_group=1, topk_group=1, use_qk_norm=True,
        )),
        "granite": ("GraniteConfig", BASE | dict(
            embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0,
        )),
        "granite-noscale": ("GraniteConfig", BASE | dict(
            embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=1.0,
        )),
        "granitemoe": ("GraniteMoeConfig", BASE | dict(
            num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=6.0, logits_scaling=1.0,
        )),
        "granitemoe-hybrid": ("GraniteMoeHybridConfig", BASE | dict(
            num_local_experts=4, num_experts_per_tok=2, layer_types=["mamba", "attention"], mamba_n_heads=8,
            mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, shared_intermediate_size=48,
            logits_scaling=1.0,
        )),
        "gpt-oss": ("GptOssConfig", BASE | dict(
            num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=window, layer_types=[SL, FU],
            rope_parameters=rope("yarn", positions, beta_fast=32.0, beta_slow=1.0, truncate=False),
        )),
        "lfm2": ("Lfm2Config", BASE | dict(layer_types=["conv", FU], conv_L_cache=3)),
        "lfm2-moe": ("Lfm2MoeConfig", BASE | dict(layer_types=["conv", FU], conv_L_cache=3, **MOE, num_dense_layers=1)),
        "mamba": ("MambaConfig", dict(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )),
        "mamba2": ("Mamba2Config", dict(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=16,
            n_groups=1, bos_token_id=0, eos_token_id=0, pad_token_id=0, chunk_size=16,
        )),
        "falcon-mamba": ("FalconMambaConfig", dict(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )),
        "jamba": ("JambaConfig", BASE | dict(
            num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
        )),
        "bamba": ("BambaConfig", BASE | dict(
            attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
            mamba_expand=2,
        )),
        "falcon-h1": ("FalconH1Config", BASE | dict(
            mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16, mamba_n_groups=1, head_dim=16,
            lm_head_multiplier=0.5,
        )),
        "zamba2": ("Zamba2Config", BASE | dict(
            layers_block_type=["mamba", "hybrid"], mamba_d_state=16, n_mamba_heads=8, mamba_headdim=16,
            mamba_ngroups=1, num_mem_blocks=1, use_mem_rope=True, num_key_value_heads=4,
        )),
        "nemotron-h": ("NemotronHConfig", without("num_hidden_layers") | dict(
            layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16,
            n_groups=1, head_dim=16,
        )),
        "recurrent-gemma": ("RecurrentGemmaConfig", BASE | dict(
            attention_window_size=window, block_types=["recurrent", "attention"], lru_width=64, head_dim=16,
        )),
        "rwkv": ("RwkvConfig", dict(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, context_length=256, attention_hidden_size=64,
            bos_token_id=0, eos_token_id=0,
        )),
        "minimax": ("MiniMaxConfig", BASE | dict(
            layer_types=[LI, FU], num_local_experts=4, num_experts_per_tok=2, head_dim=16, block_size=16,
        )),
        "minimax-m2": ("MiniMaxM2Config", BASE | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16)),
        "kimi-linear": ("KimiLinearConfig", BASE | dict(
            layer_types=[LI, FU], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, kv_lora_rank=32,
            qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4,
        )),
        "nemotron": ("NemotronConfig", BASE | dict(head_dim=16)),
        "starcoder2": ("Starcoder2Config", BASE | dict(sliding_window=window, use_bias=True)),
        "minicpm3": ("MiniCPM3Config", BASE | dict(
            num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=16, dim_model_base=16, scale_emb=6, scale_depth=1.4,
        )),
        "ernie4.5": ("Ernie4_5Config", BASE | dict(head_dim=16, use_bias=True)),
        "ernie4.5-moe": ("Ernie4_5_MoeConfig", BASE | dict(
            moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1, moe_layer_start_index=1,
            moe_layer_end_index=1,
        )),
        "hunyuan-dense": ("HunYuanDenseV1Config", BASE | dict(head_dim=16)),
        "hunyuan-moe": ("HunYuanMoEV1Config", BASE | dict(head_dim=16, num_experts=4, moe_topk=[2, 2])),
        "exaone4": ("Exaone4Config", BASE | dict(
            sliding_window=window, num_hidden_layers=4, layer_types=[SL, SL, SL, FU],
        )),
        "seed-oss": ("SeedOssConfig", BASE | dict(head_dim=16, attention_bias=True)),
        "apertus": ("ApertusConfig", BASE),
        "arcee": ("ArceeConfig", BASE),
        "helium": ("HeliumConfig", BASE | dict(head_dim=16)),
        "dots1": ("Dots1Config", BASE | dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1, topk_group=1,
            n_shared_experts=1, first_k_dense_replace=1, sliding_window=window, layer_types=[SL, FU],
        )),
        "dbrx": ("DbrxConfig", dict(
            vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=2, max_seq_len=256,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        )),
        "diffllama": ("DiffLlamaConfig", BASE),
        "nanochat": ("NanoChatConfig", BASE),
        "afmoe": ("AfmoeConfig", BASE | dict(
            head_dim=16, sliding_window=window, layer_types=[SL, FU], num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=48, num_dense_layers=1,
        )),
        "bitnet": ("BitNetConfig", BASE),
        "jetmoe": ("JetMoeConfig", without("num_attention_heads") | dict(
            num_local_experts=4, num_experts_per_tok=2, kv_channels=16,
        )),
        "longcat-flash": ("LongcatFlashConfig", without("num_hidden_layers", "intermediate_size") | dict(
            q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, head_dim=16,
            n_routed_experts=4, zero_expert_num=2, moe_topk=2, num_layers=1, ffn_hidden_size=96,
            expert_ffn_hidden_size=48, num_key_value_heads=4,
        )),
        "llama4-text": ("Llama4TextConfig", BASE | dict(
            head_dim=16, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1,
            attention_chunk_size=window, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
            layer_types=["chunked_attention"] * 3 + [FU], moe_layers=[1, 3], floor_scale=positions, attn_scale=0.5,
        )),
        "gemma3-vl": ("Gemma3Config", dict(
            text_config=TEXT | dict( query_pre_attn_scalar=16, sliding_window=window, layer_types=[SL, FU]),
            vision_config=VIT, mm_tokens_per_image=4, image_token_index=263, boi_token_index=262, eoi_token_index=261,
            eos_token_id=0, pad_token_id=0,
        )),
        "qwen2.5-vl": ("Qwen2_5_VLConfig", dict(
            text_config=BASE | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3,
                3])),
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
                patch_size=14, fullatt_block_indexes=[0]),
            image_token_id=263, video_token_id=262, vision_start_token_id=261, vision_end_token_id=260,
            eos_token_id=0,
        )),
        "qwen3.5-vl": ("Qwen3_5Config", dict(
            text_config=BASE | HYB,
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
                patch_size=14),
            image_token_id=263, video_token_id=262, vision_start_token_id=261, vision_end_token_id=260,
            eos_token_id=0,
        )),
        "llama4-vl": ("Llama4Config", dict(
            text_config=TEXT | dict( intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1,
                attention_chunk_size=window, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
                layer_types=["chunked_attention"] * 3 + [FU], moe_layers=[1, 3]),
            vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                image_size=28, patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
            image_token_index=263, boi_token_index=262, eoi_token_index=261, eos_token_id=0,
        )),
        "mistral3-vl": ("Mistral3Config", dict(
            text_config=TEXT | dict(model_type="mistral", sliding_window=None),
            vision_config=dict(model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=2, image_size=28, patch_size=14, head_dim=16),
            image_token_index=263, eos_token_id=0,
        )),
    }
    # fmt: on


FAMILIES = tuple(families(20, 24))


def save_model(family: str, lengths: Lengths, folder: Path) -> PreTrainedModel:
    """Write a model of the family with its tokenizer, and return it as plain transformers loads it, in eager mode."""
    name, arguments = families(lengths.window, lengths.positions)[family]
    config = getattr(transformers, name)(**arguments)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, attn_implementation="eager")
    _randomize(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_plain(folder)


def load_plain(folder: Path) -> PreTrainedModel:
    """Load a model as plain transformers does, with eager attention, in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Move every parameter away from 0 and 1, so that whatever is left out of a computation shows."""
    generator = torch.Generator().manual_seed(0)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wide = {id(module.weight) for module in ends if module is not None}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if any(key in name for key in ("A_log", "dt_bias", ".D", "time_", "a_param", "recurrent_param")):
            parameter.add_(0.1 * noise)
        elif parameter.dim() < 2:
            parameter.add_(0.2 * noise)
        elif parameter.shape[-1] <= 8 and parameter.dim() == 3:  # a short convolution
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_((0.2 if id(parameter) in wide else 0.13) * noise)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
