"""A sampler that writes with vLLM (arXiv 2309.06180), and checks that the engine has the policy's weights.

On-policy training holds only while the engine has the policy's weights and the policy's distribution. So after each
sync, and before the next optimizer step:

  - columns of every weight that the engine has loaded are compared with the policy's, bit for bit
    (:mod:`rolltune.samplers.fingerprints`): a tensor that was dropped, swapped, old or left out by a reload is named;
  - the engine must not know keys and values of the probe, a fixed prompt that it has read at the last sync too;
  - the probe's continuation is scored by the trainer: log-probs of one distribution, within the precision of both;
  - and every completion, the probe's too, carries the version of the weights that wrote it as the engine reports it.

Log-probs are of the distribution that is sampled from (vLLM's "processed" ones): logits / temperature, top-k and top-p
applied, renormalised. Under top-k the tokens that were kept come back with each token, for the trainer to take
its softmax over the same ones. vLLM does not tell them for top-p alone, which is refused.
"""

from __future__ import annotations

import itertools
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
from rolltune.samplers.engine import Engine, EngineOutput, EngineRequest
from rolltune.samplers.fingerprints import differences, weight_fingerprint
from rolltune.samplers.native import eos_token_ids
from rolltune.samplers.ranks import first_message, from_rank_0
from rolltune.types import Completion, SampleRequest, SamplingParams

T = TypeVar("T")
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1024  # candidates of a token that vLLM is asked for
MIN_TEMPERATURE = 0.01  # which vLLM takes for anything between it and 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What a sync took.

    Attributes:
        load_seconds: until the weights were in the engine.
        check_seconds: of fingerprints and probe.
        probe_gap: mean |dlogp| of the probe, engine against trainer.
    """

    load_seconds: float
    check_seconds: float
    probe_gap: float


class VLLMSampler:
    """Samples from a vLLM engine that is given the policy's weights.

    Configs name a function of :mod:`rolltune.samplers.vllm`, which makes one.

    Attributes:
        last_sync: what it took; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        is_sender: bool = True,
    ):
        """
        Args:
            model: whose weights are sent; never changed.
            tokenizer: decodes completions. Its EOS token ends them, as do those of the model's generation config.
            engine: has a model of the same architecture, of any weights.
            dtype: of the engine's weights.
            max_model_len: tokens that the engine takes, prompt and completion.
            is_sender: False where another rank gives its weights to the engine.
        """
        self.last_sync: SyncReport | None = None
        self._model = model
        self._causal_lm = causal_lm = unwrapped(model)
        self._tokenizer = tokenizer
        self._engine = engine
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._is_sender = is_sender
        self._eos = sorted(eos_token_ids(causal_lm, tokenizer))
        self._prompt = probe.probe_prompt(tokenizer, max_model_len)
        self._version = -1  # that the engine has for certain
        self._calls = itertools.count()
        # Part of the weights' name in the engine: another run that gives its weights to the same server has another.
        self._run = from_rank_0(uuid.uuid4().hex[:8])

    def sync(self, version: int) -> None:
        """See :class:`rolltune.samplers.Sampler`. Nothing is sent where the engine has this version already."""
        if version == self._version:
            return
        self._version, self.last_sync = -1, None
        started = time.perf_counter()
        expected = self._together(version, lambda: self._load(version))
        loaded = time.perf_counter()
        gap = self._together(version, lambda: self._check(expected, version))
        self.last_sync = SyncReport(
            load_seconds=loaded - started, check_seconds=time.perf_counter() - loaded, probe_gap=gap
        )
        self._version = version

    def _together(self, version: int, stage: Callable[[], T]) -> T:
        """A stage of a sync; where it fails on one rank, all raise. No rank goes on before the others."""
        result, wrong = None, ""
        try:
            result = stage()
        except (SyncError, EngineError) as error:
            wrong = str(error)
        if wrong := first_message(wrong):
            raise SyncError(f"the weights after {version} optimizer steps did not reach the sampler: {wrong}")
        return result  # pyright: ignore[reportReturnType]  there is one where nothing is wrong

    def _load(self, version: int) -> dict[str, str]:
        """Send the weights; returns the fingerprints that the engine's should have."""
        expected: dict[str, str] = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in policy_weights(self._model, self._dtype):
                expected[name] = weight_fingerprint(tensor, version)
                yield name, tensor

        self._engine.wake()
        if self._is_sender:
            if self._engine.is_asleep():
                raise SyncError("the engine is asleep: what it is given now would be lost when it wakes")
            self._engine.load(noted(), self._name(version))
            if not self._engine.reset_cache():
                raise SyncError("the engine cannot drop its keys and values, which are of the old weights")
        return expected

    def _check(self, expected: dict[str, str], version: int) -> float:
        """Compare weights and probe; returns the mean |dlogp| of the probe's new tokens."""
        if not self._is_sender:
            return 0.0  # the rank that does looks for all
        if (found := self._engine.fingerprints(version)) is not None:
            self._check_weights(expected, found)
        return max(self._check_probe(output, version) for output in self._probe(version))

    def _check_weights(self, expected: dict[str, str], found: dict[str, str]) -> None:
        # A tied head is one module with the embeddings in some of vLLM's models, a module of its own in others.
        tied = {head: expected[name] for head, name in tied_names(self._model).items() if name in expected}
        expected = expected | {head: value for head, value in tied.items() if head in found}
        if lines := differences(expected, found):
            more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
            raise SyncError("\n  ".join(["it has other weights than the policy", *lines[:10], *more]))

    def _check_probe(self, output: EngineOutput, version: int) -> float:
        if self._version_of(output) != version:
            raise SyncError(
                f"it says that it writes with the weights {', '.join(output.versions) or '(none)'}; does another run "
                "give its weights to the same server?"
            )
        if output.cached_tokens:
            raise SyncError(
                f"it knows keys and values of {output.cached_tokens} of the probe's tokens, made by older weights: its "
                "prefix cache was not reset"
            )
        theirs = [c[t] for c, t in zip(output.candidates, output.token_ids, strict=True)]
        ours = probe.trainer_logprobs(self._model, self._prompt, output.token_ids)
        gap = (ours - torch.tensor(theirs)).abs().mean().item()
        tolerance = max(probe.TOLERANCE[dtype] for dtype in (self._dtype, self._causal_lm.dtype))
        if not gap <= tolerance:
            raise SyncError(
                f"its log-probs of the probe's {len(theirs)} new tokens are {gap:.3g} from the trainer's in the mean, "
                f"more than {tolerance:g}"
            )
        return gap

    def _probe(self, version: int) -> list[EngineOutput]:
        """What each replica writes after the probe."""
        params = SamplingParams(max_new_tokens=probe.NEW_TOKENS)
        # The same salt at every sync: what the cache was not rid of is found.
        salt = f"{self._run}:probe"
        request = EngineRequest(token_ids=self._prompt, params=self._params(params, seed=version), salt=salt)
        outputs: list[EngineOutput] = []
        self._engine.write([request] * self._engine.replicas, lambda _, output: outputs.append(output))
        return outputs

    def generate(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See :class:`rolltune.samplers.Sampler`.

        Raises:
            ValueError: params of a support that vLLM does not tell; an empty prompt, or one too long.
            EngineError: a server does not answer as it should.
        """
        assert self._version >= 0, "sync() comes first"
        if problem := sampling_problem(params.temperature, params.top_p, params.top_k):
            raise ValueError(problem)
        self._check_lengths(requests, params.max_new_tokens)
        self._engine.wake()
        places = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        written: dict[tuple[int, int], Completion] = {}

        def keep(number: int, output: EngineOutput) -> None:
            i, j = places[number]
            written[i, j] = self._completion(output, params, requests[i].prompt.prefill)
            if on_completion is not None:
                on_completion(i, j, written[i, j])
            if on_progress is not None:
                on_progress(len(written), len(places))

        # Keys and values of other weights would not be met even if the cache was not reset; nor are those of an earlier
        # call, which a resumed run has not made.
        salt = f"{self._name(self._version)}:{next(self._calls)}"
        wanted = [
            EngineRequest(
                token_ids=requests[i].prompt.token_ids, params=self._params(params, requests[i].seeds[j]), salt=salt
            )
            for i, j in places
        ]
        self._engine.write(wanted, keep)
        self._engine.sleep()
        return [tuple(written[i, j] for j in range(len(request.seeds))) for i, request in enumerate(requests)]

    def close(self) -> None:
        self._engine.close()

    def _name(self, version: int) -> str:
        return f"{self._run}:{version}"

    def _version_of(self, output: EngineOutput) -> int:
        """Of the weights that wrote a completion, as the engine has it; -1 for those of another run, or for several."""
        run, _, version = output.versions[0].partition(":") if len(set(output.versions)) == 1 else ("", "", "")
        return int(version) if run == self._run else -1

    def _params(self, params: SamplingParams, seed: int) -> dict:
        vocabulary = self._causal_lm.config.get_text_config().vocab_size
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_new_tokens,
            "seed": seed,
            # Besides the sampled token's. Of equally probable tokens at the border of a top-k vLLM keeps all.
            "logprobs": min(params.top_k + max(16, params.top_k // 4), vocabulary) if params.truncates else 0,
            "stop": list(params.stop),
            "stop_token_ids": self._eos,
            "ignore_eos": True,  # the model's EOS tokens are among those above
            "detokenize": bool(params.stop),
        }

    def _completion(self, output: EngineOutput, params: SamplingParams, prefill: str) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}")
        greedy = params.temperature == 0
        text = self._tokenizer.decode(list(output.token_ids), skip_special_tokens=True)
        return Completion(
            token_ids=output.token_ids,
            logprobs=tuple(0.0 if greedy else c[t] for c, t in zip(output.candidates, output.token_ids, strict=True)),
            finish_reason=output.finish_reason,
            policy_version=self._version_of(output),
            text=f"{prefill}{text}",
            support=tuple(map(_kept, output.candidates)) if params.truncates else None,
        )

    def _check_lengths(self, requests: Sequence[SampleRequest], max_new_tokens: int) -> None:
        lengths = [len(request.prompt.token_ids) for request in requests]
        if 0 in lengths:
            raise ValueError(f"prompt: request {lengths.index(0)} has no tokens; a prompt needs one at least")
        longest = max(lengths, default=0)
        if longest + max_new_tokens > self._max_model_len:
            raise ValueError(
                f"sampling.max_new_tokens: {max_new_tokens}; with a prompt of {longest} tokens that is more than "
                f"sampler.max_model_len, {self._max_model_len}"
            )


def sampling_problem(temperature: float, top_p: float, top_k: int) -> str | None:
    """Why completions cannot be sampled so; None where they can."""
    if temperature > MAX_TEMPERATURE or 0 < temperature < MIN_TEMPERATURE:
        return f"sampling.temperature: {temperature}; with vLLM it is 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
    if temperature > 0 and top_p < 1 and not top_k:
        return (
            f"sampling.top_p: {top_p}; vLLM does not tell which tokens it kept but under top-k: give sampling.top_k "
            f"too (up to {MAX_TOP_K}), or take rolltune.samplers.native.NativeSampler"
        )
    if temperature > 0 and top_k > MAX_TOP_K:
        return f"sampling.top_k: {top_k}; with vLLM it is {MAX_TOP_K} at most"
    return None


def _kept(candidates: dict[int, float]) -> tuple[int, ...]:
    """The tokens that top-k and top-p have kept; their probabilities have to add up to 1, or some were not told."""
    kept = sorted(token for token, logprob in candidates.items() if logprob > float("-inf"))
    mass = torch.tensor([candidates[token] for token in kept], dtype=torch.float64).exp().sum().item()
    if abs(mass - 1) > 1e-4:
        raise EngineError(
            f"the {len(kept)} tokens that vLLM says it kept have a probability of {mass:.5f} together: too many are "
            "equally probable at the border of the top-k; take a smaller sampling.top_k"
        )
    return tuple(kept)
