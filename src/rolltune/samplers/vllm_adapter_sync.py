"""Bring only the policy's LoRA adapter into a vLLM engine, and check that it has arrived.

The engine keeps the base model's weights, which are sent and compared once, and one adapter for each version, in slots
of its own. Each sync sends the adapter's matrices, megabytes in place of gigabytes, and is checked as a sync of all
weights is (:mod:`rolltune.samplers.vllm_sync`), with two differences:

  - Weights: checksums of all matrices in the engine's slots are compared, with their scale, and other slots must be
    empty.
  - Distribution: the engine has also answered the probes without an adapter. What the adapter changes in the engine's
    log-probs must be what it changes in the trainer's, so an adapter that is loaded but not applied is seen.

An adapter's name is that of the run and the version, and the base model's weights are named by their checksum. So
several runs with one base model can share a server.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from rolltune.errors import SyncError
from rolltune.model.adapter import adapted_layers, adapter_weights
from rolltune.model.weights import base_weights
from rolltune.samplers.engine import EngineOutput
from rolltune.samplers.fingerprints import PACKED, Fingerprint, Piece, Recorder, assemble
from rolltune.samplers.vllm_sync import SyncReport, WeightSync, checked_answer


class AdapterSync(WeightSync):
    """Loads the policy's adapter into an engine with the base model's weights, and checks it."""

    def __init__(self, model: PreTrainedModel | PeftModel, *args: Any, **kwargs: Any):
        """See :class:`~rolltune.samplers.vllm_sync.WeightSync`.

        Raises:
            ValueError: the model has no adapter, or one of a kind that vLLM does not serve.
        """
        super().__init__(model, *args, **kwargs)
        self._layers = adapted_layers(model)
        self._base = ""  # name of the base model's weights in the engine, once they are checked
        self._attempts = itertools.count()  # to load it

    def adapter(self, version: int) -> str | None:
        return self.name(version)

    def version_of(self, output: EngineOutput) -> int:
        if output.adapter is None or set(output.weight_versions) != {self._base}:
            return -1
        return self._version_in(output.adapter)

    def run(self, version: int) -> SyncReport:
        try:
            return super().run(version)
        except SyncError:
            self._base = ""  # the next sync starts from the base model again
            raise

    def _load(self, version: int) -> Recorder:
        self._wake()
        base = Recorder(0) if self._base else self._load_base()
        sent = Recorder(version)
        tensors = dict(sent.recorded(adapter_weights(self._layers, self._dtype)))
        if self._is_sender:
            self._engine.load_adapter(tensors, self.name(version))
        sent.num_bytes += base.num_bytes
        return sent

    def _fingerprints(self, version: int, sent: Recorder) -> list[list[dict[str, list[Piece]]]]:
        found = self._engine.adapter_fingerprints(self.name(version), sent.shapes)
        if not all(all(workers) for workers in found):
            raise SyncError(f"the engine has no adapter {self.name(version)}")
        return found

    def _load_base(self) -> Recorder:
        """Send the base model's weights unless the engine has them, and ask it for the probes without an adapter.

        Returns:
            The weights that were sent.
        """
        recorder = Recorder(0)
        for _ in recorder.recorded(base_weights(self._model, self._dtype)):
            pass
        expected = recorder.fingerprints()
        name, sent = _base_name(expected), Recorder(0)
        if self._is_sender:
            salt = f"base{next(self._attempts)}:"
            outputs = self._ask_probes(None, salt)
            if not self._has_base(name, outputs, expected, recorder):
                self._load_weights(sent.recorded(base_weights(self._model, self._dtype)), name)
                for workers in self._engine.fingerprints(0, recorder.shapes):
                    self._check_weights(expected, assemble(workers))
                outputs = self._ask_probes(None, salt)
            for output in (output for replica in outputs for output in replica):
                if output.adapter is not None or set(output.weight_versions) != {name}:
                    self._refuse(output, name)
            self._probe_check.set_base([list(map(checked_answer, self._probes, replica)) for replica in outputs])
        self._base = name
        return sent

    def _has_base(
        self, name: str, outputs: list[list[EngineOutput]], expected: dict[str, Fingerprint], recorder: Recorder
    ) -> bool:
        """Whether every engine already has the base model's weights, from another run or an earlier sync."""
        if any(set(output.weight_versions) != {name} for replica in outputs for output in replica):
            return False
        found = self._engine.fingerprints(0, recorder.shapes)
        return not any(self._differences(expected, assemble(workers)) for workers in found)


def _base_name(fingerprints: Mapping[str, Fingerprint]) -> str:
    """Return the same name for the same weights, whichever run sends them."""
    weights = sorted((key, str(value)) for key, value in fingerprints.items() if not key.endswith(PACKED))
    return f"base:{hashlib.sha256(repr(weights).encode()).hexdigest()[:16]}"
