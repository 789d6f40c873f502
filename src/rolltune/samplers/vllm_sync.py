"""Bring the policy's weights into a vLLM engine, and check that they have arrived.

Training is on-policy only while the engine has the policy's weights and distribution. So each sync checks, before the
next optimizer step:

  - Weights: checksums of all values of every weight in the engine are compared with the policy's
    (:mod:`rolltune.samplers.fingerprints`). This names a tensor that was dropped, swapped, stale or not reloaded.
  - Cache: the engine must have no keys and values of the probes, fixed prompts that it also read at the last sync.
  - Distribution: the trainer scores the engine's continuations of the probes (:mod:`rolltune.samplers.probe`).
  - Version: every completion, the probes' included, carries the version of the weights that generated it, as the engine
    reports it.

Every engine behind a server and every replica is checked. :mod:`rolltune.samplers.vllm_adapter_sync` brings only a LoRA
adapter.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.errors import EngineError, SyncError
from rolltune.model.load import unwrapped
from rolltune.model.weights import policy_weights, tied_names
from rolltune.samplers.engine import Engine, EngineOutput, EngineRequest, engine_params
from rolltune.samplers.fingerprints import PACKED, Fingerprint, Piece, Recorder, assemble, differences
from rolltune.samplers.probe import Answer, Probe, ProbeCheck, build_probes
from rolltune.samplers.ranks import broadcast, first_error

T = TypeVar("T")
LISTED_DIFFERENCES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """Measurements of a sync.

    Attributes:
        load_seconds: time to load the weights into the engine.
        check_seconds: time to compare weights and probes.
        probe_gap: mean |dlogp| of the probes, engine against trainer.
        num_bytes: size of the weights that were sent.
    """

    load_seconds: float
    check_seconds: float
    probe_gap: float
    num_bytes: int


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
        is_sender: bool,
    ):
        """
        Args:
            model: the policy, never changed.
            tokenizer: encodes the probes.
            engine: has a model of the same architecture, with any weights.
            dtype: dtype of the engine's weights.
            max_model_len: longest prompt with its completion, in tokens.
            is_sender: False if another rank sends its weights to the engine.
        """
        self._model = model
        self._causal_lm = unwrapped(model)
        self._engine = engine
        self._dtype = dtype
        self._is_sender = is_sender
        lower = min((dtype, self._causal_lm.dtype), key=lambda dtype: dtype.itemsize)
        self._probes = build_probes(tokenizer, max_model_len, lower)
        self._probe_check = ProbeCheck(model, self._probes, dtype)
        self._checked: dict[str, Fingerprint] = {}  # the weights of the last sync that was checked
        # Part of the weights' name in the engine, to tell them from those of another run that uses the same server.
        self._run = broadcast(uuid.uuid4().hex[:8])

    def name(self, version: int) -> str:
        """Return the name of a version's weights in the engine."""
        return f"{self._run}:{version}"

    def adapter(self, version: int) -> str | None:
        """Return the name of the adapter that requests for a version ask for."""
        return None

    def version_of(self, output: EngineOutput) -> int:
        """Return the version of the weights that generated an output; -1 for another run's, or for several versions."""
        names = set(output.weight_versions)
        return self._version_in(names.pop()) if len(names) == 1 else -1

    def _version_in(self, name: str) -> int:
        run, _, version = name.partition(":")
        return int(version) if run == self._run else -1

    def run(self, version: int) -> SyncReport:
        """Load and check the current weights, as version ``version``.

        Raises:
            SyncError: loading or a check failed on some rank. All ranks raise it.
        """
        started = time.perf_counter()
        sent = self._on_all_ranks(version, lambda: self._load(version))
        loaded = time.perf_counter()
        gap = self._on_all_ranks(version, lambda: self._check(sent, version))
        return SyncReport(
            load_seconds=loaded - started,
            check_seconds=time.perf_counter() - loaded,
            probe_gap=gap,
            num_bytes=sent.num_bytes,
        )

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

    def _load(self, version: int) -> Recorder:
        """Send the weights, and return the fingerprints that the engine's should have."""
        sent = Recorder(version)
        weights = policy_weights(self._model, self._dtype)
        self._wake()
        if self._is_sender:
            self._load_weights(sent.recorded(weights), self.name(version))
        return sent

    def _wake(self) -> None:
        self._engine.wake()
        if self._is_sender and self._engine.is_asleep():
            raise SyncError("the engine is asleep, and would lose new weights when it wakes up")

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]], name: str) -> None:
        self._engine.load_weights(weights, name)
        if not self._engine.reset_cache():
            raise SyncError("the engine cannot drop its keys and values, which are of the old weights")

    def _check(self, sent: Recorder, version: int) -> float:
        """Check weights and probes, and return the largest replica's mean |dlogp| of the probes' new tokens."""
        if not self._is_sender:
            return 0.0  # the sender checks for all ranks
        expected = sent.fingerprints()
        for workers in self._fingerprints(version, sent):
            self._check_weights(expected, assemble(workers))
        weights = {name: value for name, value in expected.items() if not name.endswith(PACKED)}
        replicas = [
            [self._answer(probe, output, version) for probe, output in zip(self._probes, outputs, strict=True)]
            for outputs in self._ask_probes(self.adapter(version))
        ]
        gap = self._probe_check.check(replicas, has_changed=weights != self._checked)
        self._checked = weights
        return gap

    def _fingerprints(self, version: int, sent: Recorder) -> list[list[dict[str, list[Piece]]]]:
        return self._engine.fingerprints(version, sent.shapes)

    def _check_weights(self, expected: dict[str, Fingerprint], found: dict[str, Fingerprint | None]) -> None:
        if lines := self._differences(expected, found):
            more = len(lines) - LISTED_DIFFERENCES
            listed = [*lines[:LISTED_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
            raise SyncError("\n  ".join(["the engine has other weights than the policy", *listed]))

    def _differences(self, expected: dict[str, Fingerprint], found: dict[str, Fingerprint | None]) -> list[str]:
        # Some of vLLM's models share one module between a tied head and the embeddings, others have two.
        for head, name in tied_names(self._model).items():
            for label in ("", PACKED):
                if head + label in found and name + label in expected:
                    expected = expected | {head + label: expected[name + label]}
        return differences(expected, found)

    def _ask_probes(self, adapter: str | None, salt: str = "probe") -> list[list[EngineOutput]]:
        """Return each replica's continuations of the probes."""
        replicas = self._engine.num_replicas
        vocab_size = self._causal_lm.config.get_text_config().vocab_size
        requests = [
            EngineRequest(
                token_ids=probe.prompt,
                # The same seed and salt at every sync: the same tokens again, and keys and values left from the last.
                params=engine_params(probe.params, seed=number, eos=(), vocab_size=vocab_size),
                cache_salt=f"{self._run}:{salt}{number}",
                adapter=adapter,
            )
            for number, probe in enumerate(self._probes)
            for _ in range(replicas)
        ]
        outputs: dict[int, EngineOutput] = {}
        self._engine.generate(requests, outputs.__setitem__)
        return [
            [outputs[number * replicas + replica] for number in range(len(self._probes))] for replica in range(replicas)
        ]

    def _answer(self, probe: Probe, output: EngineOutput, version: int) -> Answer:
        """Check version, cache and length of a probe's continuation."""
        if self.version_of(output) != version:
            self._refuse(output, self.name(version))
        return checked_answer(probe, output)

    def _refuse(self, output: EngineOutput, wanted: str) -> NoReturn:
        reported = ", ".join(output.weight_versions) or "(none)"
        if output.adapter is not None:
            reported += f" with adapter {output.adapter}"
        raise SyncError(
            f"the engine reports weights {reported} instead of {wanted}; does another run send its weights to the same "
            "server?"
        )


def checked_answer(probe: Probe, output: EngineOutput) -> Answer:
    """Check cache and length of a probe's continuation."""
    if output.cached_tokens is None:
        raise SyncError(
            "the engine does not report how many of a prompt's tokens were cached, so old keys and values would "
            "not be seen; start the server by `tune run serve`, or with --enable-prompt-tokens-details"
        )
    if output.cached_tokens:
        raise SyncError(
            f"the engine has keys and values of {output.cached_tokens} of a probe's tokens, computed by older "
            "weights: its prefix cache was not reset"
        )
    if len(output.token_ids) != probe.params.max_new_tokens:  # each probe has its own, and no token ends it early
        raise SyncError(
            f"the engine answered a request for {probe.params.max_new_tokens} tokens with "
            f"{len(output.token_ids)}: it mixes up the answers to its requests"
        )
    return Answer(
        token_ids=output.token_ids,
        logprobs=torch.tensor(output.token_logprobs),
        support=output.support if probe.params.truncates else None,
    )
