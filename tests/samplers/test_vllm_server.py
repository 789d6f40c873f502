"""The vLLM sampler with a real server, named by its URL."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import adapter_faults
import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sync_faults import half_is_zero, layers_swapped, one_bit_is_wrong
from vllm_helpers import OPTIONS, requests, shake, trainer_logprobs

from rolltune.endpoints.serving import AdapterRoom, serve
from rolltune.errors import EngineError, SyncError
from rolltune.model.load import load_model
from rolltune.samplers import vllm_server
from rolltune.samplers.engine import EngineOutput
from rolltune.samplers.vllm import served
from rolltune.samplers.vllm_sampler import VLLMSampler
from rolltune.types import SamplingParams

pytestmark = pytest.mark.vllm

versions = iter(range(10**6))
ROOM = AdapterRoom(rank=4, targets=("q_proj", "v_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def url(vllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = {"dtype": "float32", "max_model_len": OPTIONS["max_model_len"], "kv_cache_gib": OPTIONS["kv_cache_gib"]}
    with (
        pytest.MonkeyPatch.context() as patch,
        serve(str(vllm_folder), log=log, takes_weights="files", adapters=ROOM, quiet=True, **options) as server,
    ):
        patch.setenv("VLLM_API_KEY", server.key)
        yield server.base_url


ROUTES = """
    POST /v1/completions, POST /v1/chat/completions, GET /v1/models, POST /inference/v1/generate, POST /tokenize,
    POST /detokenize, GET /metrics, GET /version, GET /server_info, GET /load, GET /openapi.json, GET /docs, POST
    /ping, POST /invocations, POST /init_weight_transfer_engine, POST /start_weight_update, POST /update_weights,
    POST /finish_weight_update, POST /update_weight_version, POST /weight_checker, GET /weight_info, POST /pause,
    POST /collective_rpc, POST /resume, POST /sleep, POST /wake_up, GET /is_sleeping, POST /reset_prefix_cache, POST
    /abort_requests, GET /get_world_size, OPTIONS /update_weights, HEAD /metrics, POST //update_weights, POST
    /v1/load_lora_adapter, POST /v1/unload_lora_adapter, POST /update_weights/, POST /health/../update_weights, POST
    /%75pdate_weights, GET /nothing
"""


def test_every_route_but_health_needs_the_key(url, monkeypatch):
    server, key = url.removesuffix("/v1"), os.environ["VLLM_API_KEY"]
    wrong = [None, "Bearer", "Bearer wrong", f"Bearer {key}x", f"Bearer {key[:-1]}", f"Basic {key}", key]
    with httpx.Client(trust_env=False) as client:
        for route in ROUTES.split(","):
            method, path = route.split()
            for value in wrong if path in ("/v1/completions", "/update_weights") else wrong[:1]:
                headers = {} if value is None else {"Authorization": value}
                assert client.request(method, server + path, headers=headers).status_code == 401, (route, value)
        assert client.get(f"{server}/health").status_code == 200
        allowed = {"Authorization": f"Bearer {key}"}
        assert client.get(f"{server}/get_world_size", headers=allowed).json() == {"world_size": 1}
        prompt = {"model": "judge", "prompt": "one", "max_tokens": 1}
        assert client.post(f"{server}/v1/completions", headers=allowed, json=prompt).status_code == 200


def test_a_sampler_without_the_key_is_refused(model, tokenizer, url, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "sk-0123456789")
    # A key that is in the environment goes nowhere unless the config names it.
    for variable, said in ((None, "wants a key"), ("OTHER_KEY", "refuses the key")):
        with pytest.raises(EngineError, match=rf"/init_weight_transfer_engine: 401: .*{said} in sampler\.api_key_env"):
            served(model, tokenizer, base_urls=[url], api_key_env=variable, **OPTIONS)
    with pytest.raises(ValueError, match=r"sampler\.api_key_env: NO_KEY is not set"):
        served(model, tokenizer, base_urls=[url], api_key_env="NO_KEY", **OPTIONS)
    monkeypatch.setenv("OTHER_KEY", "sk-\u00fc")
    with pytest.raises(ValueError, match=r"sampler\.api_key_env: the value of OTHER_KEY contains"):
        served(model, tokenizer, base_urls=[url], api_key_env="OTHER_KEY", **OPTIONS)


def test_weights_by_nccl_are_announced_with_the_key(model, tokenizer, monkeypatch):
    """The transfer itself needs GPUs."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            if self.path.startswith("/get_world_size"):
                self.wfile.write(b'{"world_size": 1}')

        do_GET = do_POST

        def log_message(self, *args): ...

    monkeypatch.setenv("VLLM_API_KEY", "sk-0123456789")
    monkeypatch.setattr(
        WeightTransferTrainerFactory,
        "trainer_init",
        lambda info, client, source: SimpleNamespace(send_weights=client.start_weight_update),
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        sampler = served(model, tokenizer, base_urls=[url], api_key_env="VLLM_API_KEY", transfer="nccl", **OPTIONS)
        sampler._engine.load_weights(iter(()), "1")
        sampler.close()
        server.shutdown()
    assert ("/start_weight_update", "Bearer sk-0123456789") in seen
    assert {key for _, key in seen} == {"Bearer sk-0123456789"}


def make_policy(folder: Path, seed: int) -> PeftModel:
    """A policy with an adapter that has been trained a little."""
    torch.manual_seed(seed)
    policy = load_model(str(folder), dtype="float32", device="cpu")
    policy = get_peft_model(policy, LoraConfig(r=4, target_modules=list(ROOM.targets))).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    return policy


@pytest.fixture
def sampler(model, tokenizer, url) -> Iterator[VLLMSampler]:
    sampler = served(model, tokenizer, base_urls=[url], api_key_env="VLLM_API_KEY", **OPTIONS)
    yield sampler
    sampler.close()


def test_logprobs_are_the_trainers_after_each_sync(sampler, model, tokenizer):
    wanted = requests(tokenizer, "one", "two and two make " * 12)
    for seed in range(2):
        shake(model, seed)
        sampler.sync(version := next(versions))
        written = sampler.generate(wanted, SamplingParams(temperature=0.6, max_new_tokens=30))
        for request, completions in zip(wanted, written, strict=True):
            for completion in completions:
                assert completion.policy_version == version
                expected = trainer_logprobs(model, request, completion, 0.6)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)


def test_supports_are_reported(sampler, tokenizer):
    sampler.sync(next(versions))
    params = SamplingParams(top_k=5, top_p=0.8, max_new_tokens=20)
    (group,) = sampler.generate(requests(tokenizer, "one"), params)
    for completion in group:
        assert completion.support is not None
        assert all(token in kept for token, kept in zip(completion.token_ids, completion.support, strict=True))
        assert 1 <= min(map(len, completion.support)) <= max(map(len, completion.support)) <= 5


def test_a_tensor_lost_in_transfer_is_named(sampler, model, monkeypatch):
    sampler.sync(next(versions))
    save = vllm_server.save_file

    def lossy(tensors, path):
        save({name: t for name, t in tensors.items() if name != "model.layers.0.mlp.up_proj.weight"}, path)

    monkeypatch.setattr(vllm_server, "save_file", lossy)
    shake(model, 2)
    with pytest.raises(SyncError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        sampler.sync(next(versions))
    monkeypatch.undo()
    sampler.sync(next(versions))


def test_completions_are_reported_as_they_finish(sampler, tokenizer):
    sampler.sync(next(versions))
    seen = []
    written = sampler.generate(
        requests(tokenizer, "one", "two"), SamplingParams(max_new_tokens=9), on_completion=lambda *d: seen.append(d)
    )
    assert sorted(seen, key=lambda d: d[:2]) == [
        (i, j, c) for i, group in enumerate(written) for j, c in enumerate(group)
    ]


def test_an_update_that_a_killed_run_left_open_is_closed(sampler, model, url):
    sampler._engine._post_all("start_weight_update")
    shake(model, 3)
    sampler.sync(next(versions))


def test_an_update_by_another_run_shows_in_the_completions(sampler, model, tokenizer, url):
    sampler.sync(version := next(versions))
    other_run = served(model, tokenizer, base_urls=[url], api_key_env="VLLM_API_KEY", **OPTIONS)
    other_run.sync(version)
    (group,) = sampler.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=4))
    assert {completion.policy_version for completion in group} == {-1}
    other_run.close()


def test_runs_with_one_base_model_share_a_server(vllm_folder, tokenizer, url):
    """Each with its own adapter; the second finds the base model there, and closing one leaves the other's."""
    at = {"base_urls": [url], "api_key_env": "VLLM_API_KEY", "lora": "adapter"}
    policies = [make_policy(vllm_folder, seed) for seed in range(2)]
    runs = [(policy, served(policy, tokenizer, **OPTIONS | at)) for policy in policies]
    for version in range(2):
        for policy, sampler in runs:
            shake(policy, version)
            sampler.sync(version)
            adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
            assert (sampler.last_sync.num_bytes == adapter) == (version > 0 or sampler is runs[1][1])
    for policy, sampler in [*runs, runs[0]]:
        (request,) = requests(tokenizer, "two and two make " * 12)
        ((completion, *_),) = sampler.generate([request], SamplingParams(max_new_tokens=20))
        assert completion.policy_version == 1
        expected = trainer_logprobs(policy, request, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)
    (_, first), (_, second) = runs
    _, file = first._engine._adapter
    body = {"lora_name": "x", "lora_path": str(vllm_folder)}
    with pytest.raises(EngineError, match=r"/v1/load_lora_adapter: 500: .*adapter x: "):
        first._engine._request("POST", url.removesuffix("/v1"), "v1/load_lora_adapter", body)
    assert file.exists()
    first.close()
    assert not file.exists()
    second.sync(2)
    models = second._engine._request("GET", url.removesuffix("/v1"), "v1/models")["data"]
    assert [model["id"] for model in models] == ["judge", second._weights.name(2)]
    second.close()


def test_an_adapter_is_not_sent_by_nccl(model, tokenizer, url):
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    try:
        with pytest.raises(ValueError, match=r"^sampler\.lora: adapter; needs sampler\.transfer files, not nccl"):
            served(policy, tokenizer, base_urls=[url], transfer="nccl", lora="adapter", **OPTIONS)
        wide = LoraConfig(r=32, target_modules=["k_proj"])
        with pytest.raises(ValueError, match=r"^sampler\.lora: adapter; .* rank 8 at most, not 32; .* lora_rank=32"):
            options = OPTIONS | {"base_urls": [url], "api_key_env": "VLLM_API_KEY", "lora": "adapter"}
            served(get_peft_model(policy.unload(), wide), tokenizer, **options)
    finally:
        policy.unload()


def test_no_files_are_left(sampler):
    sampler.sync(next(versions))
    assert list(sampler._engine._folder.iterdir()) == []
    sampler.close()
    assert not sampler._engine._folder.exists()


def test_a_server_that_accepts_no_weights_is_refused(model, tokenizer):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(EngineError, match=r"/init_weight_transfer_engine.*takes_weights"):
            served(model, tokenizer, base_urls=[url], api_key_env="VLLM_API_KEY", **OPTIONS)
        server.shutdown()
    with pytest.raises(EngineError, match=rf"{url}: .*ConnectError"):
        served(model, tokenizer, base_urls=[url], api_key_env="VLLM_API_KEY", **OPTIONS)


def test_minus_infinity_survives_json():
    content = {"token_id": 3, "logprob": -0.5, "top_logprobs": [{"token_id": 4, "logprob": -9999.0}]}
    choice = {"token_ids": [3], "finish_reason": "stop", "logprobs": {"content": [content]}, "weight_versions": None}
    assert vllm_server._output({"choices": [choice]}) == EngineOutput(
        token_ids=(3,),
        logprobs=({4: float("-inf"), 3: -0.5},),
        finish_reason="stop",
        weight_versions=(),
        cached_tokens=None,
    )


def test_the_data_parallel_engines_of_a_server_are_compared_with_each_other():
    """vLLM's RPC asks only the first of them."""
    engine = vllm_server.ServerEngine.__new__(vllm_server.ServerEngine)
    engine._urls, engine._replicas = ["http://a", "http://b"], [("http://a", 0), ("http://a", 1), ("http://b", 0)]
    checksums = {"dp0:pp0:pcp0:tp0:norm.weight": "1", "dp1:pp0:pcp0:tp0:norm.weight": "1"}
    asked = []

    def answer(method, url, path, body=None):
        asked.append((url, path))
        return {"results": [{}]} if path == "collective_rpc" else {"checksums": checksums}

    engine._request = answer
    assert engine.num_replicas == 3
    assert engine.fingerprints(0, {}) == [[{}], [{}]]
    assert [url for url, path in asked if path == "weight_checker"] == ["http://a"]
    checksums["dp1:pp0:pcp0:tp0:norm.weight"] = "2"
    with pytest.raises(
        EngineError, match=r"http://a: the data-parallel engines have different weights: .*norm\.weight"
    ):
        engine.fingerprints(0, {})


@pytest.mark.slow
def test_tensor_parallel_workers_are_compared_by_their_slices(vllm_folder, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if os.cpu_count() != 1 else "0|0")
    options = {"dtype": "float32", "max_model_len": OPTIONS["max_model_len"], "kv_cache_gib": OPTIONS["kv_cache_gib"]}
    options["options"] = ["--tensor-parallel-size", "2"]
    options |= {"takes_weights": "files", "adapters": ROOM, "quiet": True}
    with serve(str(vllm_folder), log=tmp_path / "server.log", **options) as server:
        monkeypatch.setenv("VLLM_API_KEY", server.key)
        sampler = served(model, tokenizer, base_urls=[server.base_url], api_key_env="VLLM_API_KEY", **OPTIONS)
        sampler.sync(next(versions))
        assert sampler.last_sync.probe_gap < 1e-4
        for fault in (half_is_zero, layers_swapped, one_bit_is_wrong):
            with pytest.MonkeyPatch.context() as patch:
                message = fault(sampler._engine, patch, model)
                shake(model, 4)
                with pytest.raises(SyncError, match=message):
                    sampler.sync(next(versions))
        sampler.sync(next(versions))
        sampler.close()
        policy = make_policy(vllm_folder, seed=0)
        at = {"base_urls": [server.base_url], "api_key_env": "VLLM_API_KEY", "lora": "adapter"}
        apart = served(policy, tokenizer, **OPTIONS | at)
        for fault in (adapter_faults.half_is_zero, adapter_faults.half_loaded, None):
            with pytest.MonkeyPatch.context() as patch:
                if fault is None:
                    apart.sync(next(versions))
                    assert apart.last_sync.probe_gap < 1e-4
                    break
                message = fault(apart._engine, patch, policy)
                with pytest.raises(SyncError, match=message):
                    apart.sync(next(versions))
        apart.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_urls": []}, r"sampler\.base_urls: \[\]"),
        ({"base_urls": ["http://me:pass-word@h"]}, r"sampler\.base_urls\[0\]: contains a user name"),
        ({"base_urls": ["http://a", "http://h/v1?key=pass-word"]}, r"sampler\.base_urls\[1\]: contains a .*query"),
        ({"base_urls": ["me:pass-word@h:8000"]}, r"sampler\.base_urls\[0\]: contains a user name"),
        ({"base_urls": ["127.0.0.1:8123"]}, r"sampler\.base_urls\[0\]: '127.0.0.1:8123'; must be an address"),
        ({"transfer": "pigeon", "base_urls": ["http://a"]}, r"sampler\.transfer: pigeon; .*files, nccl"),
        ({"transfer": "nccl", "base_urls": ["http://a", "http://b"]}, r"sampler\.base_urls: 2 servers"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        served(model, tokenizer, **OPTIONS | options)
    assert "pass-word" not in str(refused.value)
