"""Bring the policy's weights into a vLLM engine, and check that they have arrived.

Training is on-policy only while the engine has the policy's weights and distribution. So each sync checks, before the
next optimizer step:

  - Weights: columns of every weight in the engine are compared with the policy's, bit for bit
    (:mod:`rolltune.samplers.fingerprints`). This names a tensor that was dropped, swapped, stale or not reloaded.
  - Cache: the engine must have no keys and values of the probe, a fixed prompt that it also read at the last sync.
  - Distribution: the trainer scores the probe's continuation. Log-probs must agree within the precision of both.
  - Version: every completion, the probe's included, carries the version of the weights that generated it, as the engine
    reports it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.errors import EngineError, SyncError
from rolltune.model.load import unwrapped
from rolltune.model.weights import policy_weights, tied_names
from rolltune.samplers import probe
from rolltune.samplers.engine import Engine, EngineOutput, EngineRequest, engine_params
from rolltune.samplers.fingerprints import differences, weight_fingerprint
from rolltune.samplers.ranks import broadcast, first_error
from rolltune.types import SamplingParams

T = TypeVar("T")
LISTED_DIFFERENCES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """Measurements of a sync.

    Attributes:
        load_seconds: time to load the weights into the engine.
        check_seconds: time of fingerprints and probe.
        probe_gap: mean |dlogp| of the probe, engine against trainer.
    """

    load_seconds: float
    check_seconds: float
    probe_gap: float


class WeightSync:
    """Loads the policy's weights into an engine and checks them."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        eos: Sequence[int],
        is_sender: bool,
    ):
        """
        Args:
            model: the policy, never changed.
            tokenizer: encodes the probe.
            engine: has a model of the same architecture, with any weights.
            dtype: dtype of the engine's weights.
            max_model_len: longest prompt with its completion, in tokens.
            eos: tokens that end a completion.
            is_sender: False if another rank sends its weights to the engine.
        """
        self._model = model
        self._causal_lm = unwrapped(model)
        self._engine = engine
        self._dtype = dtype
        self._eos = eos
        self._is_sender = is_sender
        self._prompt = probe.probe_prompt(tokenizer, max_model_len)
        # Part of the weights' name in the engine, to tell them from those of another run that uses the same server.
        self._run = broadcast(uuid.uuid4().hex[:8])

    def name(self, version: int) -> str:
        """Return the name of a version's weights in the engine."""
        return f"{self._run}:{version}"

    def version_of(self, output: EngineOutput) -> int:
        """Return the version of the weights that generated an output; -1 for another run's, or for several versions."""
        names = set(output.weight_versions)
        run, _, version = names.pop().partition(":") if len(names) == 1 else ("", "", "")
        return int(version) if run == self._run else -1

    def run(self, version: int) -> SyncReport:
        """Load and check the current weights, as version ``version``.

        Raises:
            SyncError: loading or a check failed on some rank. All ranks raise it.
        """
        started = time.perf_counter()
        expected = self._on_all_ranks(version, lambda: self._load(version))
        loaded = time.perf_counter()
        gap = self._on_all_ranks(version, lambda: self._check(expected, version))
        return SyncReport(load_seconds=loaded - started, check_seconds=time.perf_counter() - loaded, probe_gap=gap)

    def _on_all_ranks(self, version: int, stage: Callable[[], T]) -> T:
        """Run a stage and wait for the other ranks; if it fails on one rank, raise on all."""
        result, error = None, ""
        try:
            result = stage()
        except (SyncError, EngineError) as failure:
            error = str(failure)
        if error := first_error(error):
            raise SyncError(f"the weights after {version} optimizer steps did not reach the sampler: {error}")
        return result  # pyright: ignore[reportReturnType]  set if there is no error

    def _load(self, version: int) -> dict[str, str]:
        """Send the weights, and return the fingerprints that the engine's should have."""
        expected: dict[str, str] = {}

        def recorded() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in policy_weights(self._model, self._dtype):
                expected[name] = weight_fingerprint(tensor, version)
                yield name, tensor

        self._engine.wake()
        if self._is_sender:
            if self._engine.is_asleep():
                raise SyncError("the engine is asleep, and would lose new weights when it wakes up")
            self._engine.load_weights(recorded(), self.name(version))
            if not self._engine.reset_cache():
                raise SyncError("the engine cannot drop its keys and values, which are of the old weights")
        return expected

    def _check(self, expected: dict[str, str], version: int) -> float:
        """Check weights and probe, and return the largest replica's mean |dlogp| of the probe's new tokens."""
        if not self._is_sender:
            return 0.0  # the sender checks for all ranks
        if (found := self._engine.fingerprints(version)) is not None:
            self._check_weights(expected, found)
        return max(self._check_probe(output, version) for output in self._generate_probe(version))

    def _check_weights(self, expected: dict[str, str], found: dict[str, str]) -> None:
        # Some of vLLM's models share one module between a tied head and the embeddings, others have two.
        tied = {head: expected[name] for head, name in tied_names(self._model).items() if name in expected}
        expected = expected | {head: value for head, value in tied.items() if head in found}
        if lines := differences(expected, found):
            more = len(lines) - LISTED_DIFFERENCES
            listed = [*lines[:LISTED_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
            raise SyncError("\n  ".join(["the engine has other weights than the policy", *listed]))

    def _generate_probe(self, version: int) -> list[EngineOutput]:
        """Return each replica's continuation of the probe."""
        params = engine_params(
            SamplingParams(max_new_tokens=probe.NEW_TOKENS),
            seed=version,
            eos=self._eos,
            vocab_size=self._causal_lm.config.get_text_config().vocab_size,
        )
        # The same salt at every sync, so that keys and values left from the last sync are found.
        request = EngineRequest(token_ids=self._prompt, params=params, cache_salt=f"{self._run}:probe")
        outputs: list[EngineOutput] = []
        self._engine.generate([request] * self._engine.num_replicas, lambda _, output: outputs.append(output))
        return outputs

    def _check_probe(self, output: EngineOutput, version: int) -> float:
        if self.version_of(output) != version:
            raise SyncError(
                f"the engine reports weights {', '.join(output.weight_versions) or '(none)'} instead of "
                f"{self.name(version)}; does another run send its weights to the same server?"
            )
        if output.cached_tokens:
            raise SyncError(
                f"the engine has keys and values of {output.cached_tokens} of the probe's tokens, computed by older "
                "weights: its prefix cache was not reset"
            )
        ours = probe.trainer_logprobs(self._model, self._prompt, output.token_ids)
        gap = (ours - torch.tensor(output.token_logprobs)).abs().mean().item()
        tolerance = max(probe.TOLERANCE[dtype] for dtype in (self._dtype, self._causal_lm.dtype))
        if not gap <= tolerance:
            raise SyncError(
                f"log-probs of the probe's {len(ours)} new tokens differ by {gap:.3g} on average between engine and "
                f"trainer; at most {tolerance:g} is accepted"
            )
        return gap
