"""The configs of newer model families: their memory on the GPU that they name, and dry runs on tiny models."""

import re
from io import StringIO

import pytest
import transformers
from byte_tokenizer import byte_tokenizer
from model_families import families
from repo import ROOT
from rich.console import Console
from tiny_run import load_recipe

from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.run import checks, estimates

# Short versions of what the families' chat templates do.
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BLOCK = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "qwen3": TURNS
    + GENERATION.replace(
        "{% endif", "{% if enable_thinking is defined and not enable_thinking %}" + BLOCK + "{% endif %}{% endif"
    ),
    "qwen3.5-text": TURNS
    + GENERATION.replace(
        "{% endif",
        "{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}" + BLOCK + "{% endif %}{% endif",
    ),
    "gemma3-text": "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ first if loop.first else '' }}{{ m.content }}<|end|>{% endfor %}" + GENERATION,
    "smollm3": "<|system|>Today Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: /think\n"
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<|end|>"
    + TURNS.replace("messages %}", "messages if m.role != 'system' %}")
    + GENERATION,
    "llama3.x": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}<|system|>Today "
    "Date: {{ date_string }}\n{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<|end|>"
    + TURNS.replace("messages %}", "messages if m.role != 'system' %}")
    + GENERATION,
    "gpt-oss": "<|system|>Reasoning: {{ reasoning_effort or 'medium' }} {{ strftime_now('%Y-%m-%d') }}<|end|>"
    + TURNS.replace("{{ m.content", "{% if m.role == 'assistant' %}[final]{% endif %}{{ m.content")
    + GENERATION,
}
OPENED = {"qwen3.5-text": "<|assistant|><think>\n", "gpt-oss": "<|assistant|>[final]"}  # others end in <|assistant|>
FAMILIES = {
    "qwen3_0_6b": "qwen3",
    "qwen3_1_7b": "qwen3",
    "qwen3_4b_lora": "qwen3",
    "qwen3_5_2b": "qwen3.5-text",
    "gemma3_270m": "gemma3-text",
    "gemma3_1b": "gemma3-text",
    "smollm3_3b_lora": "smollm3",
    "llama3_1_8b_lora": "llama3.x",
    "gpt_oss_20b_lora": "gpt-oss",
}


def shape(kind: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more):
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = dict(zip(names.split(), (hidden, layers, heads, kv_heads, inner, vocab), strict=True))
    return getattr(transformers, kind)(**sizes, **more)


# Shapes of the released models. That of Qwen3.5-2B is not known here.
SHAPES = {
    "qwen3_0_6b": shape("Qwen3Config", 1024, 28, 16, 8, 3072, 151936, head_dim=128, tie_word_embeddings=True),
    "qwen3_1_7b": shape("Qwen3Config", 2048, 28, 16, 8, 6144, 151936, head_dim=128, tie_word_embeddings=True),
    "qwen3_4b_lora": shape("Qwen3Config", 2560, 36, 32, 8, 9728, 151936, head_dim=128, tie_word_embeddings=True),
    "gemma3_270m": shape("Gemma3TextConfig", 640, 18, 4, 1, 2048, 262144, head_dim=256),
    "gemma3_1b": shape("Gemma3TextConfig", 1152, 26, 4, 1, 6912, 262144, head_dim=256),
    "smollm3_3b_lora": shape("SmolLM3Config", 2048, 36, 16, 4, 11008, 128256),
    "llama3_1_8b_lora": shape("LlamaConfig", 4096, 32, 32, 8, 14336, 128256),
    "qwen3_4b_lora_24gb": shape("Qwen3Config", 2560, 36, 32, 8, 9728, 151936, head_dim=128, tie_word_embeddings=True),
    "llama3_2_3b_qlora_16gb": shape("LlamaConfig", 3072, 28, 24, 8, 8192, 128256, tie_word_embeddings=True),
    "llama3_1_8b_qlora_24gb": shape("LlamaConfig", 4096, 32, 32, 8, 14336, 128256),
    "gpt_oss_20b_lora": shape("GptOssConfig", 2880, 24, 64, 8, 2880, 201088, head_dim=64, num_local_experts=32),
}
PROMPT_TOKENS = 300  # system message, template, and a long question of GSM8K
CONTEXT_GB = 2.0  # CUDA context and fragments, which the estimate leaves out


@pytest.mark.parametrize("name", SHAPES)
def test_the_run_fits_the_gpu_that_the_config_names(name, tmp_path):
    SHAPES[name].save_pretrained(tmp_path)
    path = ROOT / "configs" / f"{name}.yaml"
    cfg = checks.validate(GRPOConfig, str(path), [f"model.path={tmp_path}"])
    completions = min(cfg.batch.prompts_per_step * cfg.sampling.group_size, cfg.sampler["max_num_seqs"])
    parts = estimates.estimate_memory(
        cfg.model,
        cfg.lora,
        microbatch_tokens=cfg.batch.microbatch_tokens,
        kv_tokens=completions * (cfg.sampling.max_new_tokens + PROMPT_TOKENS),
        with_reference=True,
        optimizer=cfg.optimizer["_component_"],
    )
    found = re.search(r"Meant for: one\s+(?:# )?GPU of (\d+) GB", path.read_text())
    assert found and estimates.peak(parts) * 2**30 / 1e9 + CONTEXT_GB < float(found[1]), parts


@pytest.mark.parametrize("name", FAMILIES)
def test_dry_runs_on_a_tiny_model_of_the_family(name, tmp_path, monkeypatch):
    kind, arguments = families(window=4096, positions=8192)[FAMILIES[name]]
    getattr(transformers, kind)(**(arguments | {"max_position_embeddings": 8192})).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[FAMILIES[name]]
    tokenizer.save_pretrained(tmp_path)
    overrides = [
        f"model.path={tmp_path}",
        "data.train={_component_: rolltune.data.sums.sums, count: 300, high: 9}",
        "data.heldout={_component_: rolltune.data.sums.sums, count: 9, high: 9, split: heldout}",
    ]
    for recipe, schema, config in (("grpo", GRPOConfig, name), ("sft", SFTConfig, f"{name}_sft")):
        said = StringIO()
        module = load_recipe(recipe)
        monkeypatch.setattr(module, "Console", lambda said=said: Console(file=said, width=1000))
        check = checks.check_grpo if recipe == "grpo" else checks.check_sft
        cfg = checks.validate(schema, str(ROOT / "configs" / f"{config}.yaml"), [*overrides, "dry_run=true"])
        assert list(check(cfg, 1)) == []
        module.run(cfg)
        text = said.getvalue()
        assert (
            "the config is complete and valid" in text and "Reason step by step between <think> and </think>." in text
        )
        assert OPENED.get(FAMILIES[name], "<|assistant|>") in text
