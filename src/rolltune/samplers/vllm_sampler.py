"""A sampler that generates with vLLM (arXiv 2309.06180).

:mod:`rolltune.samplers.vllm_sync` brings the weights into the engine and checks them.

Log-probs are those of the sampling distribution (vLLM's "processed" log-probs): logits / temperature, top-k and top-p
applied, renormalised. With top-k, vLLM reports the kept tokens of each sampled token, and the trainer takes its softmax
over the same ones. With only top-p it does not report them, so that is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.errors import EngineError
from rolltune.model.load import unwrapped
from rolltune.samplers.engine import Engine, EngineOutput, EngineRequest, engine_params
from rolltune.samplers.generation import Results, check_lengths, eos_token_ids, split_stop
from rolltune.samplers.vllm_adapter_sync import AdapterSync
from rolltune.samplers.vllm_sync import SyncReport, WeightSync
from rolltune.types import Completion, SampleRequest, SamplingParams

MAX_TEMPERATURE = 2.0
MIN_TEMPERATURE = 0.01  # vLLM raises any temperature between 0 and this to it
MAX_TOP_K = 1024  # log-probs of a token that vLLM is asked for


class VLLMSampler:
    """Samples from a vLLM engine with the policy's weights.

    Configs build one through a function of :mod:`rolltune.samplers.vllm`.

    Attributes:
        last_sync: measurements of the last sync; None before the first.
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
        only_adapter: bool = False,
    ):
        """
        Args:
            model: the policy, never changed.
            tokenizer: decodes completions. Its EOS token ends them, as do those of the model's generation config.
            engine: has a model of the same architecture, with any weights.
            dtype: dtype of the engine's weights.
            max_model_len: longest prompt with its completion, in tokens.
            is_sender: False if another rank sends its weights to the engine.
            only_adapter: whether only the policy's LoRA adapter is sent, to an engine with room for it.
        """
        self.last_sync: SyncReport | None = None
        causal_lm = unwrapped(model)
        self._tokenizer = tokenizer
        self._engine = engine
        self._max_model_len = max_model_len
        self._eos = sorted(eos_token_ids(causal_lm, tokenizer))
        self._vocab_size = causal_lm.config.get_text_config().vocab_size
        self._version = -1  # of the engine's weights, once checked
        self._calls = itertools.count()
        sync = AdapterSync if only_adapter else WeightSync
        self._weights = sync(
            model,
            tokenizer,
            engine,
            dtype=dtype,
            max_model_len=max_model_len,
            is_sender=is_sender,
        )

    def sync(self, version: int) -> None:
        """See :class:`rolltune.samplers.Sampler`. Does nothing if the engine has this version already."""
        if version == self._version:
            return
        self._version, self.last_sync = -1, None
        self.last_sync = self._weights.run(version)
        self._version = version

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
            ValueError: a parameter is not supported with vLLM, or a prompt is empty or too long.
            EngineError: the engine failed, or its answer is not usable.
        """
        assert self._version >= 0, "call sync() first"
        if problem := sampling_problem(params.temperature, params.top_p, params.top_k):
            raise ValueError(problem)
        check_lengths(requests, params.max_new_tokens, self._max_model_len, "sampler.max_model_len")
        strings, ids = split_stop(params.stop, self._tokenizer)
        asked, ends = replace(params, stop=strings), sorted({*self._eos, *ids})
        self._engine.wake()
        results = Results(requests, on_progress, on_completion)
        # The salt keeps requests apart from keys and values of other weights even if the cache was not reset, and from
        # those of an earlier call, which a resumed run would not have.
        salt = f"{self._weights.name(self._version)}:{next(self._calls)}"
        samples = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        engine_requests = [
            EngineRequest(
                token_ids=requests[i].prompt.token_ids,
                params=engine_params(asked, seed=requests[i].seeds[j], eos=ends, vocab_size=self._vocab_size),
                cache_salt=salt,
                adapter=self._weights.adapter(self._version),
            )
            for i, j in samples
        ]

        def on_output(number: int, output: EngineOutput) -> None:
            i, j = samples[number]
            results.add(i, j, self._completion(output, params, requests[i].prompt.prefill))

        self._engine.generate(engine_requests, on_output)
        self._engine.sleep()
        return results.by_request()

    def close(self) -> None:
        self._engine.close()

    def _completion(self, output: EngineOutput, params: SamplingParams, prefill: str) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion with finish reason {output.finish_reason!r}")
        text = self._tokenizer.decode(list(output.token_ids), skip_special_tokens=True)
        return Completion(
            token_ids=output.token_ids,
            logprobs=(0.0,) * len(output.token_ids) if params.temperature == 0 else output.token_logprobs,
            finish_reason=output.finish_reason,
            policy_version=self._weights.version_of(output),
            text=f"{prefill}{text}",
            support=output.support if params.truncates else None,
        )


def sampling_problem(temperature: float, top_p: float, top_k: int) -> str | None:
    """Return why vLLM does not support these sampling parameters; None if it does."""
    if temperature > MAX_TEMPERATURE or 0 < temperature < MIN_TEMPERATURE:
        return (
            f"sampling.temperature: {temperature}; with vLLM it must be 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
        )
    if temperature > 0 and top_p < 1 and not top_k:
        return (
            f"sampling.top_p: {top_p}; vLLM reports the kept tokens only with top-k, so set sampling.top_k too (up to "
            f"{MAX_TOP_K}), or use rolltune.samplers.native.NativeSampler"
        )
    if temperature > 0 and top_k > MAX_TOP_K:
        return f"sampling.top_k: {top_k}; with vLLM it must be at most {MAX_TOP_K}"
    return None
