"""The policy and its frozen reference model: full or LoRA training, log-probs, saving in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.batch_invariant import make_batch_invariant
from rolltune.model.checkpointing import recompute_activations
from rolltune.model.forward import packed_logprobs
from rolltune.model.load import adapter_base, load_model, resolve_model, unwrapped
from rolltune.model.parts import text_decoder
from rolltune.seeding import derive_seed
from rolltune.types import Microbatch

REFERENCE_ADAPTER = "reference"
# peft refuses adapters on out_proj of these: Mamba's kernels read its weight without calling the layer.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


class Policy:
    """A causal LM under training, with its frozen reference model.

    The reference is the model before the first step:
      - full training: a second, frozen copy of the weights;
      - LoRA on a full model: the same weights with the adapter disabled;
      - LoRA that continues an SFT adapter: a frozen copy of that adapter. Disabling the adapter would give the base
        model instead.

    All modules are in eval mode: sampler, old policy, reference and trainer run the same network. Dropout that the
    config asks for is on within :meth:`with_dropout` only, where gradients are computed.

    Attributes:
        model: the causal LM that is trained and sampled from, wrapped by peft if LoRA is used.
        version: optimizer steps taken.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | None,
        *,
        dropout_modules: Sequence[nn.Module] = (),
    ):
        """
        Args:
            model: the model to train.
            reference: the frozen copy of full training.
            dropout_modules: the modules that are in training mode within :meth:`with_dropout`.
        """
        self.model = model.eval()
        self.version = 0
        self._reference = reference
        self._dropout_modules = dropout_modules

    @property
    def causal_lm(self) -> PreTrainedModel:
        return unwrapped(self.model)

    @property
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def saved_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that :meth:`save` writes: the adapter's, for LoRA, and otherwise all."""
        return self.trainable_parameters if isinstance(self.model, PeftModel) else list(self.model.parameters())

    @property
    def has_dropout(self) -> bool:
        """Whether the gradient is computed with dropout, so that the log-probs there are not those of the sampler."""
        return bool(self._dropout_modules)

    @contextmanager
    def with_dropout(self) -> Iterator[None]:
        """Turn on the dropout that the config asks for. Backward passes belong inside: they may run layers again."""
        for module in self._dropout_modules:
            module.train()
        try:
            yield
        finally:
            self.model.eval()

    def logprobs(self, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Return (log-probs, entropy) of the trained tokens, float32 [N]; only the log-probs carry a gradient.

        If top-k or top-p truncated the sampler's distribution, the softmax runs over the tokens that they kept.
        """
        return packed_logprobs(self.causal_lm, microbatch, temperature=temperature)

    @torch.no_grad()
    def reference_logprobs(self, microbatch: Microbatch, *, temperature: float) -> Tensor:
        """Return log-probs of the trained tokens under the frozen reference, float32 [N].

        They are renormalised over S, the tokens that top-k and top-p left to the policy, like the policy's own. Tokens
        are drawn from pi_S, so k3 is an unbiased estimate of KL(pi_S || ref_S): never negative, and 0 at the start.
        With the reference over the full vocabulary (as in NeMo-RL) the mean ratio would be ref(S) < 1, and a policy
        that never moved would have a KL. Drawback: the KL term ignores tokens outside S, so the reference does not
        bring back a token that has left the policy's nucleus.
        """
        with self._as_reference() as reference:
            return packed_logprobs(reference, microbatch, temperature=temperature)[0]

    @contextmanager
    def _as_reference(self) -> Iterator[PreTrainedModel]:
        if not isinstance(self.model, PeftModel):
            assert self._reference is not None, "built without a reference"
            yield self._reference
        elif REFERENCE_ADAPTER in self.model.peft_config:
            self.model.set_adapter(REFERENCE_ADAPTER)
            try:
                yield self.causal_lm
            finally:
                self.model.set_adapter("default")
                _freeze_reference_adapter(self.model)
        else:
            with self.model.disable_adapter():
                yield self.causal_lm

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write weights (the adapter, for LoRA) and tokenizer to a folder that transformers (or peft) loads."""
        if isinstance(self.model, PeftModel):
            # Absolute, or a Hub id. The adapter that a run started from may name its base by an older place.
            self.model.peft_config["default"].base_model_name_or_path = self.causal_lm.name_or_path
            self.model.save_pretrained(str(folder), selected_adapters=["default"])
        else:
            self.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)


def build_policy(
    config: ModelConfig,
    lora: LoRAConfig | None,
    *,
    device: torch.device,
    seed: int,
    with_reference: bool,
    resume_from: Path | None = None,
) -> Policy:
    """Load the policy, and its frozen reference if the loss needs one.

    Args:
        config: path and precision of the weights.
        lora: the adapter to train; None trains all weights. If ``config.path`` is an adapter folder, training continues
            that adapter.
        device: device of both models.
        seed: seed of the adapter's initialisation.
        with_reference: whether :meth:`Policy.reference_logprobs` will be called.
        resume_from: a checkpoint's policy folder. Its weights replace those at ``config.path`` in the policy, never in
            the reference.

    Raises:
        ValueError: the model cannot be loaded, or ``lora`` does not fit it or the adapter at ``config.path``; or the
            config asks for dropout or gradient checkpointing, which the model does not have.
    """
    start = resolve_model(config.path)
    load = partial(
        load_model,
        dtype=config.dtype,
        device=device,
        fp32_head=config.fp32_head,
        batch_invariant=config.batch_invariant,
    )
    reference = None
    if lora is not None:
        model = _load_with_lora(load, start, config, lora, seed, with_reference, resume_from)
    elif adapter_base(start) is not None:
        raise ValueError(f"lora: {config.path} is a LoRA adapter; give a `lora:` section with its rank to train it")
    else:
        model = load(str(resume_from) if resume_from else start)
        if with_reference:
            reference = load(start).requires_grad_(False).eval()
    if config.gradient_checkpointing:
        recompute_activations(unwrapped(model))
    return Policy(model, reference, dropout_modules=_dropout_modules(model, config, lora))


def _dropout_modules(
    model: PreTrainedModel | PeftModel, config: ModelConfig, lora: LoRAConfig | None
) -> Sequence[nn.Module]:
    """Return the modules to put into training mode for the dropout that the config asks for."""
    if config.dropout:
        if not _dropout_rates(unwrapped(model)):
            raise ValueError(f"model.dropout: true; the config of {config.path} has no dropout; leave it out")
        return [model]  # the adapters' dropout is 0 unless lora.dropout says otherwise
    if lora is not None and lora.dropout > 0:
        return [m.lora_dropout["default"] for m in model.modules() if _is_adapted(m)]  # pyright: ignore
    return []


def _dropout_rates(model: PreTrainedModel) -> dict[str, float]:
    """Return the settings of a model's config that only act in training mode: dropout and router jitter, by name."""
    settings = model.config.get_text_config().to_dict()
    return {
        name: value
        for name, value in settings.items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    }


def _load_with_lora(
    load: Callable[[str], PreTrainedModel],
    start: str,
    config: ModelConfig,
    lora: LoRAConfig,
    seed: int,
    with_reference: bool,
    resume_from: Path | None,
) -> PeftModel:
    base = adapter_base(start)
    model = load(base or start)
    wanted = lora_modules(model, lora.target_modules)
    if base is not None or resume_from is not None:
        model = PeftModel.from_pretrained(model, str(resume_from) if resume_from else start, is_trainable=True)
        _check_adapter(model, lora, wanted, config.path)
        _set_dropout(model, lora.dropout)
    else:
        torch.manual_seed(derive_seed(seed, "lora"))
        model = get_peft_model(model, _lora_config(lora, model, wanted))
    assert isinstance(model, PeftModel)
    if base is not None and with_reference:
        model.load_adapter(start, REFERENCE_ADAPTER)
        model.set_adapter("default")
        _freeze_reference_adapter(model)
    if config.batch_invariant:
        make_batch_invariant(model)  # again, for the adapters' layers
    return model


def lora_modules(model: PreTrainedModel, target_modules: str) -> list[str]:
    """Return the names of the modules that ``lora.target_modules`` stands for.

    Args:
        model: without adapters; may be on the meta device.
        target_modules: "all-linear", for all linear layers of the text model but the LM head and routers, or ends of
            module names, split by commas.

    Raises:
        ValueError: a name is the end of no module's name, or that of the LM head.
    """
    head = model.get_output_embeddings()
    if target_modules == "all-linear":
        text = {id(module) for module in text_decoder(model).modules()}
        return [
            name
            for name in _linear_layers(model)
            if id(m := model.get_submodule(name)) in text and _can_adapt(name, m, model)
        ]
    found = []
    for target in (name.strip() for name in target_modules.split(",")):
        modules = {name: m for name, m in model.named_modules() if f".{name}".endswith(f".{target}")}
        if not modules:
            leaves = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
            raise ValueError(f"lora.target_modules: {target}; the model has {', '.join(sorted(leaves))}")
        if any(m is head for m in modules.values()):
            raise ValueError(f"lora.target_modules: {target}; an adapter on the LM head is not supported; leave it out")
        found += modules
    return found


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that peft calls all-linear."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _can_adapt(name: str, layer: nn.Module, model: PreTrainedModel) -> bool:
    """Whether LoRA fits a linear layer: not a router, which returns more than a product, nor what peft refuses."""
    if model.config.model_type in MAMBA_TYPES and name.endswith(".out_proj"):
        return False
    if type(layer) in (nn.Linear, Conv1D):
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(1, layer.weight.shape[1])), Tensor)  # pyright: ignore


def _lora_config(lora: LoRAConfig, model: PreTrainedModel, wanted: Sequence[str]) -> LoraConfig:
    """Translate the config section ``lora`` into peft's class; ``wanted`` are the names of the layers."""
    names = [name.strip() for name in lora.target_modules.split(",")]
    if names == ["all-linear"]:
        names = "all-linear" if list(wanted) == _linear_layers(model) else list(wanted)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  peft divides it by the rank, so a float works
        lora_dropout=lora.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )


def _check_adapter(model: PeftModel, lora: LoRAConfig, wanted: Sequence[str], path: str) -> None:
    """Raise ValueError unless a loaded adapter has the rank, alpha and layers that the config gives."""
    loaded = model.peft_config["default"]
    if (loaded.r, float(loaded.lora_alpha)) != (lora.rank, float(lora.alpha)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"lora: rank {lora.rank}, alpha {lora.alpha}; the adapter at {path} has rank {loaded.r}, "  # pyright: ignore[reportAttributeAccessIssue]
            f"alpha {loaded.lora_alpha}; give the same values"  # pyright: ignore[reportAttributeAccessIssue]
        )
    adapted = {name for name, module in unwrapped(model).named_modules() if _is_adapted(module)}
    if adapted != set(wanted):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
        raise ValueError(
            f"lora.target_modules: {lora.target_modules}; stands for {len(wanted)} layers of the model, but the "
            f"adapter at {path} is on {len(adapted)} ({names}); name the same layers"
        )


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and "default" in module.lora_dropout


def _set_dropout(model: PeftModel, probability: float) -> None:
    """Give a loaded adapter the config's dropout: how it was trained before says nothing about this run."""
    model.peft_config["default"].lora_dropout = probability  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if _is_adapted(module):
            module.lora_dropout["default"] = nn.Dropout(probability) if probability > 0 else nn.Identity()  # pyright: ignore


def _freeze_reference_adapter(model: PeftModel) -> None:
    """Make only the policy's adapter trainable: peft makes whichever adapter becomes active trainable."""
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
        elif ".default." in name:
            parameter.requires_grad_(True)
