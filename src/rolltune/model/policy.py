"""The trained model and its frozen reference: full or LoRA, log-probs of packed rows, saving in Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterator
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
from rolltune.model.load import adapter_base, load_model, resolve_model
from rolltune.model.logprobs import selected_logprobs
from rolltune.model.packed_attention import packed_layout
from rolltune.seeding import derive_seed
from rolltune.types import Microbatch

REFERENCE_ADAPTER = "reference"
# A mask of four dimensions is passed on as it is; packed attention looks at the layout instead. Without it transformers
# would build a [T, T] mask of its own from the positions.
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class Policy:
    """A causal LM under training, and what it is held to.

    The frozen reference is the model as it stood before the first step:
      - full training: a second, frozen copy of the weights;
      - LoRA on a full model: the same weights with the adapter switched off;
      - LoRA that goes on from an SFT adapter: a frozen copy of that adapter, never the bare base model (which is what
        a switched-off adapter would give).

    Attributes:
        model: what is sampled from and trained: the causal LM, wrapped by peft where LoRA is used.
        version: optimizer steps taken; completions carry it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, reference: PreTrainedModel | None):
        self.model = model
        self.version = 0
        self._reference = reference

    @property
    def causal_lm(self) -> PreTrainedModel:
        model = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model  # pyright: ignore[reportReturnType]

    @property
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logprobs(self, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy) of the trained tokens, float32 [N]; the log-probs carry a gradient.

        Of the distribution that was sampled from: where top-k or top-p left tokens out, of the softmax over the rest.
        """
        return packed_logprobs(self.causal_lm, microbatch, temperature=temperature)

    @torch.no_grad()
    def reference_logprobs(self, microbatch: Microbatch, *, temperature: float) -> Tensor:
        """Log-probs of the trained tokens under the frozen reference, float32 [N].

        Renormalised over what top-k and top-p left to the *policy*, S, like the policy's own. The tokens come from
        pi_S, so k3 is unbiased for KL(pi_S || ref_S): at least 0, and 0 at the start. With the reference over the full
        vocabulary (as in NeMo-RL) the mean of its ratio would be ref(S) < 1, and a policy that never moved would have a
        KL. The price: what goes on outside of S is not seen, so a token that the policy's nucleus has lost is not
        brought back by the reference.
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
        """A folder that plain transformers (or peft, for LoRA) loads, the tokenizer beside the weights."""
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), selected_adapters=["default"])
        else:
            self.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)


def packed_logprobs(model: PreTrainedModel, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of a packed row's trained tokens; the LM head runs on those tokens alone.

    Args:
        model: a causal LM loaded by :func:`rolltune.model.load.load_model`, which gives it packed attention.
        microbatch: T tokens, N of them trained.
        temperature: the one that was sampled with; logits are divided by it.

    Returns:
        float32 [N], float32 [N]; of the softmax over the row's support where it has one.
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
    """Load the policy, and its frozen reference where the loss needs one.

    Args:
        config: where the weights come from, and their precision.
        lora: None trains every weight. A ``config.path`` that is an adapter folder goes on training that adapter.
        device: where both live.
        seed: of the adapter's initialisation.
        with_reference: whether :meth:`Policy.reference_logprobs` will be called.
        resume_from: a checkpoint's policy folder, whose weights take the place of those at ``config.path`` in the
            policy, never in the reference.
    """
    start = resolve_model(config.path)
    base = adapter_base(start)
    if base is not None and lora is None:
        raise ValueError(
            f"lora: {config.path} is a LoRA adapter; give a `lora:` section with its rank to go on training it"
        )
    trained = str(resume_from) if resume_from else start
    load = partial(
        load_model,
        dtype=config.dtype,
        device=device,
        fp32_head=config.fp32_head,
        batch_invariant=config.batch_invariant,
    )
    if lora is None:
        model = load(trained)
        reference = load(start) if with_reference else None
        if reference is not None:
            reference.requires_grad_(False).eval()
    else:
        reference = None
        model = load(base or start)
        if base is not None or resume_from is not None:
            model = PeftModel.from_pretrained(model, trained, is_trainable=True)
            _check_rank(model, lora, config.path)
        else:
            torch.manual_seed(derive_seed(seed, "lora"))
            model = get_peft_model(model, lora_config(lora))
        assert isinstance(model, PeftModel)
        if base is not None and with_reference:
            model.load_adapter(start, REFERENCE_ADAPTER)
            model.set_adapter("default")
            _freeze_reference_adapter(model)
        if config.batch_invariant:
            make_batch_invariant(model)  # the adapters' layers
    if config.gradient_checkpointing:
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal_lm, PreTrainedModel)
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Policy(model, reference)


def lora_config(lora: LoRAConfig) -> LoraConfig:
    modules = (
        lora.target_modules
        if lora.target_modules == "all-linear"
        else [name.strip() for name in lora.target_modules.split(",")]
    )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  peft divides by the rank: any number does
        lora_dropout=lora.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def _check_rank(model: PeftModel, lora: LoRAConfig, path: str) -> None:
    loaded = model.peft_config["default"]
    if (loaded.r, float(loaded.lora_alpha)) != (lora.rank, float(lora.alpha)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"lora: rank {lora.rank}, alpha {lora.alpha}: the adapter at {path} has rank {loaded.r}, "  # pyright: ignore[reportAttributeAccessIssue]
            f"alpha {loaded.lora_alpha}; give the same"  # pyright: ignore[reportAttributeAccessIssue]
        )


def _freeze_reference_adapter(model: PeftModel) -> None:
    """peft makes the active adapter trainable whenever it is switched; the reference never is."""
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
        elif ".default." in name:
            parameter.requires_grad_(True)
