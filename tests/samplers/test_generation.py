"""What the samplers share, and what vLLM's is asked for."""

import torch

from rolltune.samplers.engine import EngineOutput
from rolltune.samplers.vllm_sampler import VLLMSampler
from rolltune.types import Prompt, SampleRequest, SamplingParams


class RecordingEngine:
    """Answers every request with one token, and keeps the requests."""

    def __init__(self):
        self.asked = []

    def generate(self, requests, on_output):
        self.asked += requests
        for number in range(len(requests)):
            on_output(
                number,
                EngineOutput(
                    token_ids=(0,), logprobs=({0: -0.5},), finish_reason="stop", weight_versions=("0",), cached_tokens=0
                ),
            )

    def wake(self):
        pass

    def sleep(self):
        pass


def test_vllm_stops_at_special_tokens_by_their_ids(llama, letter_tokenizer, monkeypatch):
    engine = RecordingEngine()
    sampler = VLLMSampler(llama, letter_tokenizer, engine, dtype=torch.float32, max_model_len=64)  # pyright: ignore
    monkeypatch.setattr(sampler, "_version", 0)
    monkeypatch.setattr(sampler._weights, "version_of", lambda output: 0)
    request = SampleRequest(prompt=Prompt(token_ids=(1, 2)), seeds=(0,))
    sampler.generate([request], SamplingParams(max_new_tokens=4, stop=("<pad>", "the end")))
    (asked,) = engine.asked
    assert asked.params["stop"] == ["the end"] and asked.params["stop_token_ids"] == [27, 28]
