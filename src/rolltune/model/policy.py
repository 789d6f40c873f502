"""The policy and its frozen reference model: full or LoRA training, log-probs, saving in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.errors import ConfigError
from rolltune.model import parallel
from rolltune.model.batch_invariant import make_batch_invariant
from rolltune.model.checkpointing import recompute_activations
from rolltune.model.forward import forward_of
from rolltune.model.hollow import source_of
from rolltune.model.load import adapter_base, choose_sharded, load_model, resolve_model, unwrapped
from rolltune.model.lora import about_adapters, check_adapter, is_adapted, lora_config, lora_modules, set_dropout
from rolltune.model.quantized import check_quantization, is_quantized, note_quantization
from rolltune.model.router import load_balancing_loss, recorded_router_logits, routers
from rolltune.seeding import derive_seed
from rolltune.types import Microbatch

REFERENCE_ADAPTER = "reference"


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
        router_aux_loss: weight of the load-balancing loss of :meth:`trained_logprobs`; 0: there is none.
        notes: lines for the user about how the model is trained; empty if there is nothing unusual.
        mesh: the processes that the weights are sharded over; None: each has all of them.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | None,
        *,
        dropout_modules: Sequence[nn.Module] = (),
        router_aux_loss: float = 0.0,
        notes: Sequence[str] = (),
    ):
        """
        Args:
            model: the model to train.
            reference: the frozen copy of full training.
            dropout_modules: the modules that are in training mode within :meth:`with_dropout`.
            router_aux_loss: weight of the routers' load-balancing loss.
            notes: see the attribute.
        """
        self.model = model.eval()
        self.version = 0
        self.mesh: DeviceMesh | None = None
        self._device = model.device
        self._saved_dtype: torch.dtype | None = None  # of sharded weights; None: their own
        self._reference = reference
        self.router_aux_loss = router_aux_loss
        self.notes = notes
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

    def shard(self, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None, cpu_offload: bool) -> None:
        """Shard the model and its reference, and fill hollow ones; all ranks call this.

        Arguments: :func:`parallel.shard_model`.

        Raises:
            ConfigError: the model cannot be sharded.
        """
        for model in (self.causal_lm, self._reference):
            if model is not None and source_of(model):
                choose_sharded(model, mesh)
        if why := parallel.unshardable(self.causal_lm):
            raise ConfigError([f"parallel.weights: fsdp; {why}; set it to replicated"], on_all_ranks=True)
        dtypes = {parameter.dtype for parameter in self.trainable_parameters}
        if compute_dtype is not None and dtypes != {compute_dtype}:
            listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ConfigError(
                [
                    f"parallel.weights: fsdp; the model's weights are {listed}, and only one dtype can be sharded; "
                    "set model.dtype to float32, or parallel.weights to replicated"
                ],
                on_all_ranks=True,
            )
        parallel.shard_model(self.causal_lm, mesh, compute_dtype=compute_dtype, cpu_offload=cpu_offload)
        if self._reference is not None:
            parallel.shard_model(self._reference, mesh, cpu_offload=cpu_offload)
        self.mesh, self._saved_dtype, self._device = mesh, compute_dtype, torch.device(mesh.device_type)

    @contextmanager
    def gathered(self, *, with_reference: bool = False) -> Iterator[None]:
        """Hold whole weights on each rank, where they are sharded: for sampling, and passes of which ranks have
        different numbers. Without gradients only. All ranks enter together.

        Args:
            with_reference: also the reference's.
        """
        with ExitStack() as stack:
            stack.enter_context(parallel.gathered(self.causal_lm))
            if with_reference and self._reference is not None:
                stack.enter_context(parallel.gathered(self._reference))
            yield

    def idle_microbatches(self, phase: str, count: int) -> list[Microbatch]:
        """Return the microbatches to compute, to no effect, while other ranks have more than ``count``.

        Empty unless the weights are sharded: then all ranks must make the same passes. All ranks call this before the
        passes. ``phase`` names them.
        """
        return [] if self.mesh is None else parallel.idle_microbatches(phase, count, self._device)

    def idle_backward(self, microbatches: Sequence[Microbatch]) -> None:
        """Make the passes of :meth:`trained_logprobs` and their backward passes, and add nothing to the gradient."""
        for microbatch in microbatches:
            logprobs, _, balance = self.trained_logprobs(microbatch, temperature=1.0)
            ((logprobs.sum() if balance is None else logprobs.sum() + balance) * 0.0).backward()

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
        return parallel.logprobs(self.causal_lm, microbatch, temperature=temperature)

    def trained_logprobs(self, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (log-probs, entropy) as :meth:`logprobs` does, and the load-balancing loss of the microbatch's tokens.

        The loss is a scalar that carries a gradient, not yet weighted; None if ``router_aux_loss`` is 0.
        """
        if not self.router_aux_loss:
            return *self.logprobs(microbatch, temperature=temperature), None
        with recorded_router_logits(self.causal_lm) as logits:
            logprobs, entropy = self.logprobs(microbatch, temperature=temperature)
        top_k = self.causal_lm.config.get_text_config().num_experts_per_tok
        return logprobs, entropy, load_balancing_loss(logits, top_k)

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
            return parallel.logprobs(reference, microbatch, temperature=temperature)[0]

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

    def collect_weights(self) -> dict[str, Tensor] | None:
        """Return what :meth:`save` writes, on rank 0, where the weights are sharded; otherwise None.

        All ranks call this.
        """
        if self.mesh is None:
            return None
        every_name = dict(self.model.named_parameters(remove_duplicate=False))
        tied = every_name.keys() - dict(self.model.named_parameters())
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
        if isinstance(self.model, PeftModel):
            state = {name: tensor for name, tensor in state.items() if ".default." in name}
        weights = parallel.collect(state)
        if self._saved_dtype is None:
            return weights
        return {
            name: tensor.to(self._saved_dtype) if name in every_name else tensor for name, tensor in weights.items()
        }

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None = None) -> None:
        """Write weights (the adapter, for LoRA) and tokenizer to a folder that transformers (or peft) loads.

        Args:
            folder: is created.
            tokenizer: the policy's.
            weights: from :meth:`collect_weights`; None: those of the model, which is not sharded.
        """
        if isinstance(self.model, PeftModel):
            # Absolute, or a Hub id. The adapter that a run started from may name its base by an older place.
            self.model.peft_config["default"].base_model_name_or_path = self.causal_lm.name_or_path
            self.model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
            if any(map(is_quantized, self.model.modules())):
                note_quantization(folder)
        else:
            self.model.save_pretrained(str(folder), state_dict=weights)
            if self._saved_dtype is not None:  # transformers has written that of the slices
                self.model.config.dtype = self._saved_dtype
                self.model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def build_policy(
    config: ModelConfig,
    lora: LoRAConfig | None,
    *,
    device: torch.device,
    seed: int,
    with_reference: bool,
    resume_from: Path | None = None,
    hollow: bool = False,
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
        hollow: leave out the weights of models that can do without until they are sharded (:meth:`Policy.shard`).

    Raises:
        ValueError: the model cannot be loaded, or ``lora`` does not fit it or the adapter at ``config.path``; or the
            config asks for dropout or gradient checkpointing, which the model does not have.
    """
    start = resolve_model(config.path)
    load = partial(
        load_model,
        dtype=config.dtype,
        device=device,
        quantization=config.quantization,
        fp32_head=config.fp32_head,
        batch_invariant=config.batch_invariant,
        hollow=hollow,
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
    check_router_loss(unwrapped(model), config)
    notes = [forward_of(unwrapped(model)).note, "" if lora is None else about_adapters(model, lora)]
    return Policy(
        model,
        reference,
        dropout_modules=_dropout_modules(model, config, lora),
        router_aux_loss=config.router_aux_loss,
        notes=[note for note in notes if note],
    )


def check_router_loss(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raise ValueError if ``model.router_aux_loss`` does not fit the model."""
    if config.router_aux_loss < 0:
        raise ValueError(f"model.router_aux_loss: {config.router_aux_loss}; must be >= 0")
    if not config.router_aux_loss:
        return
    if not routers(model) or getattr(model.config.get_text_config(), "num_experts_per_tok", None) is None:
        problem = "has no routers to balance"
    elif not forward_of(model).packed:  # padding would count, and a prompt once for each of its completions
        problem = "is trained unpacked, where it is not supported"
    else:
        return
    value = config.router_aux_loss
    raise ValueError(f"model.router_aux_loss: {value}; {type(model).__name__} {problem}; leave it out")


def _dropout_modules(
    model: PreTrainedModel | PeftModel, config: ModelConfig, lora: LoRAConfig | None
) -> Sequence[nn.Module]:
    """Return the modules to put into training mode for the dropout that the config asks for."""
    if config.dropout:
        if not _dropout_rates(unwrapped(model)):
            raise ValueError(f"model.dropout: true; the config of {config.path} has no dropout; leave it out")
        return [model]  # the adapters' dropout is 0 unless lora.dropout says otherwise
    if lora is not None and lora.dropout > 0:
        return [m.lora_dropout["default"] for m in model.modules() if is_adapted(m)]  # pyright: ignore
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
    if base is not None:
        check_quantization(start, config.quantization)
    model = load(base or start)
    wanted = lora_modules(model, lora.target_modules)
    if base is not None or resume_from is not None:
        model = PeftModel.from_pretrained(model, str(resume_from) if resume_from else start, is_trainable=True)
        check_adapter(model, lora, wanted, config.path)
        set_dropout(model, lora.dropout)
    else:
        torch.manual_seed(derive_seed(seed, "lora"))
        model = get_peft_model(model, lora_config(lora, model, wanted))
    assert isinstance(model, PeftModel)
    if base is not None and with_reference:
        model.load_adapter(start, REFERENCE_ADAPTER)
        model.set_adapter("default")
        _freeze_reference_adapter(model)
    if config.batch_invariant:
        make_batch_invariant(model)  # again, for the adapters' layers
    return model


def _freeze_reference_adapter(model: PeftModel) -> None:
    """Make only the policy's adapter trainable: peft makes whichever adapter becomes active trainable."""
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
        elif ".default." in name:
            parameter.requires_grad_(True)
