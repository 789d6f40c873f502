"""The policy and its frozen reference model: full or LoRA training, log-probs, saving in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.batch_invariant import is_batch_invariant, make_batch_invariant
from rolltune.model.fp32_head import FP32Head
from rolltune.model.load import adapter_base, load_model, resolve_model, unwrapped
from rolltune.model.logprobs import selected_logprobs
from rolltune.model.packed_attention import packed_layout
from rolltune.seeding import derive_seed
from rolltune.types import Microbatch

REFERENCE_ADAPTER = "reference"
# transformers passes a four-dimensional mask on unchanged, and packed attention ignores it in favour of the layout.
# Without one, transformers would build a [T, T] mask from the positions.
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class Policy:
    """A causal LM under training, with its frozen reference model.

    The reference is the model before the first step:
      - full training: a second, frozen copy of the weights;
      - LoRA on a full model: the same weights with the adapter disabled;
      - LoRA that continues an SFT adapter: a frozen copy of that adapter. Disabling the adapter would give the base
        model instead.

    Attributes:
        model: the causal LM that is trained and sampled from, wrapped by peft if LoRA is used.
        version: optimizer steps taken.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, reference: PreTrainedModel | None):
        self.model = model
        self.version = 0
        self._reference = reference

    @property
    def causal_lm(self) -> PreTrainedModel:
        return unwrapped(self.model)

    @property
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

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


def packed_logprobs(model: PreTrainedModel, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropy of a microbatch's trained tokens. The LM head runs on these tokens only.

    Args:
        model: a causal LM loaded by :func:`rolltune.model.load.load_model`, which gives it packed attention.
        microbatch: T tokens, N of them trained.
        temperature: the sampling temperature, by which logits are divided.

    Returns:
        (log-probs, entropy), both float32 [N], under the softmax over the microbatch's support if it has one.
    """
    decoder = getattr(model, model.base_model_prefix)
    hidden = decoder(
        input_ids=microbatch.input_ids[None],
        position_ids=microbatch.position_ids[None],
        attention_mask=_NO_MASK,
        layout=packed_layout(microbatch),
        use_cache=False,
    ).last_hidden_state[0]  # [T, H]
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    hidden = hidden[microbatch.predictor_index]
    if isinstance(head, FP32Head):
        hidden = hidden.float()
    return selected_logprobs(
        hidden,
        head.weight,
        microbatch.target_ids,
        temperature,
        microbatch.support,
        batch_invariant=is_batch_invariant(model),
    )


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
        ValueError: the model cannot be loaded, or ``lora`` does not fit the adapter at ``config.path``.
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
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Policy(model, reference)


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
    if base is not None or resume_from is not None:
        model = PeftModel.from_pretrained(model, str(resume_from) if resume_from else start, is_trainable=True)
        _check_rank(model, lora, config.path)
    else:
        torch.manual_seed(derive_seed(seed, "lora"))
        model = get_peft_model(model, _lora_config(lora))
    assert isinstance(model, PeftModel)
    if base is not None and with_reference:
        model.load_adapter(start, REFERENCE_ADAPTER)
        model.set_adapter("default")
        _freeze_reference_adapter(model)
    if config.batch_invariant:
        make_batch_invariant(model)  # again, for the adapters' layers
    return model


def _lora_config(lora: LoRAConfig) -> LoraConfig:
    """Translate the config section ``lora`` into peft's class."""
    modules = (
        lora.target_modules
        if lora.target_modules == "all-linear"
        else [name.strip() for name in lora.target_modules.split(",")]
    )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  peft divides it by the rank, so a float works
        lora_dropout=lora.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def _check_rank(model: PeftModel, lora: LoRAConfig, path: str) -> None:
    loaded = model.peft_config["default"]
    if (loaded.r, float(loaded.lora_alpha)) != (lora.rank, float(lora.alpha)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"lora: rank {lora.rank}, alpha {lora.alpha}; the adapter at {path} has rank {loaded.r}, "  # pyright: ignore[reportAttributeAccessIssue]
            f"alpha {loaded.lora_alpha}; give the same values"  # pyright: ignore[reportAttributeAccessIssue]
        )


def _freeze_reference_adapter(model: PeftModel) -> None:
    """Make only the policy's adapter trainable: peft makes whichever adapter becomes active trainable."""
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
        elif ".default." in name:
            parameter.requires_grad_(True)
