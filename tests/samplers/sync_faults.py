"""Faults of a weight sync, injected into a real vLLM engine: seen in vLLM, or possible after a change of code.

Each takes (engine, monkeypatch, model), and returns a pattern of the message that must name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rolltune.model.load import unwrapped
from rolltune.model.weights import policy_weights
from rolltune.samplers import vllm_local, vllm_sync
from rolltune.samplers.engine import EngineOutput

# --- weights ----------------------------------------------------------------------------------------------------------


def loads(engine, monkeypatch, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """The engine loads ``change(name, tensor)`` in place of each weight; None leaves it out."""
    load = engine.load_weights
    changed = lambda weights: ((n, c) for n, t in weights if (c := change(n, t)) is not None)  # noqa: E731
    monkeypatch.setattr(engine, "load_weights", lambda weights, version: load(changed(weights), version))


def weight(model, part: str) -> str:
    """A weight's name in the policy's second layer."""
    return next(name for name, _ in policy_weights(model, torch.float32) if ".1." in name and part in name)


def dropped(engine, monkeypatch, model):
    """A tensor is left out, which vLLM does not report."""
    name = weight(model, "down_proj")
    loads(engine, monkeypatch, lambda n, t: None if n == name else t)
    return r"layers\.1\.mlp\.down_proj\.weight: has other values"


def swapped(engine, monkeypatch, model):
    names = [weight(model, "k_proj"), weight(model, "v_proj")]
    other = dict(zip(names, reversed(names), strict=True))
    load = engine.load_weights
    monkeypatch.setattr(engine, "load_weights", lambda w, v: load(((other.get(n, n), t) for n, t in w), v))
    return r"k_proj\.weight.*: has the values of .*v_proj\.weight"


def layers_swapped(engine, monkeypatch, model):
    """Two layers have each other's MLP."""
    old = {n: t.clone() for n, t in policy_weights(model, unwrapped(model).dtype)}
    other = {"0": "1", "1": "0"}

    def change(name, tensor):
        layer = name.split(".")[2] if ".mlp." in name else ""
        return old[name.replace(f".{layer}.", f".{other[layer]}.", 1)] if layer in other else tensor

    loads(engine, monkeypatch, change)
    return r"layers\.0\.mlp\.\w+\.weight.*: has"


def stale(engine, monkeypatch, model):
    """The weights of the version before are sent under the new name."""
    old = {n: t.clone() for n, t in policy_weights(model, unwrapped(model).dtype)}
    loads(engine, monkeypatch, lambda n, t: old[n])
    return r"other weights than the policy\n.*embed_tokens"


def skipped(engine, monkeypatch, model):
    monkeypatch.setattr(engine, "load_weights", lambda w, v: list(w) and None)
    return "other weights than the policy"


def skipped_without_a_change(engine, monkeypatch, model):
    """The same weights, so that only the version that the engine reports can show it."""
    monkeypatch.setattr(engine, "load_weights", lambda w, v: list(w) and None)
    return r"reports weights \w+:\d+"


def head_left_old(engine, monkeypatch, model):
    """vLLM 0.32 on CPUs: a reload does not repack a tied head."""
    rpc = engine._llm.collective_rpc
    monkeypatch.setattr(
        engine._llm, "collective_rpc", lambda m, *a, **k: None if m == "repack_tied_head" else rpc(m, *a, **k)
    )
    return r"lm_head\.weight \(packed\): has other values than the policy"


def some_columns_are_noise(engine, monkeypatch, model):
    """200 neighbouring columns of one matrix."""
    name = weight(model, "down_proj")

    def change(n, t):
        if n == name:
            t = t.clone()
            t[:, 1 : t.shape[1] // 8] = t.std() * torch.randn_like(t[:, 1 : t.shape[1] // 8])
        return t

    loads(engine, monkeypatch, change)
    return r"layers\.1\.mlp\.down_proj\.weight: has other values"


def all_matrices_are_a_little_off(engine, monkeypatch, model):
    """5 % of the columns of every matrix, by 0.05 standard deviations."""

    def change(n, t):
        if t.ndim == 2:
            t = t.clone()
            t[:, 7::20] += 0.05 * t.std()
        return t

    loads(engine, monkeypatch, change)
    return r"up_proj\.weight: has other values"


def one_bit_is_wrong(engine, monkeypatch, model):
    name = weight(model, "o_proj")

    def change(n, t):
        if n == name:
            t = t.clone()
            t.view(torch.int16 if t.element_size() == 2 else torch.int32)[3, 5] ^= 1
        return t

    loads(engine, monkeypatch, change)
    return r"layers\.1\.self_attn\.o_proj\.weight: has other values"


def negated(engine, monkeypatch, model):
    name = weight(model, "up_proj")
    loads(engine, monkeypatch, lambda n, t: -t if n == name else t)
    return r"layers\.1\.mlp\.up_proj\.weight: has other values"


def half_is_zero(engine, monkeypatch, model):
    """The rows that one of two tensor-parallel workers would hold."""
    name = weight(model, "up_proj")
    loads(engine, monkeypatch, lambda n, t: torch.cat([t[: len(t) // 2], 0 * t[len(t) // 2 :]]) if n == name else t)
    return r"layers\.1\.mlp\.up_proj\.weight: has other values"


def not_a_number(engine, monkeypatch, model):
    name = weight(model, "norm.weight")
    loads(engine, monkeypatch, lambda n, t: t * torch.nan if n == name else t)
    return r"layers\.1\.\w*norm\.weight: has other values"


# --- what computes with the right weights -----------------------------------------------------------------------------


def stale_kernels(engine, monkeypatch, model, is_stale: Callable[[str], bool] = lambda name: True):
    """The parameters are new, but the kernels compute with old copies."""
    old = {n: t.clone() for n, t in policy_weights(model, unwrapped(model).dtype)}
    load, fingerprints = engine.load_weights, engine.fingerprints
    sent: dict[str, Any] = {}

    def remember(weights, version):
        sent.update(version=version, weights=[(n, t.clone()) for n, t in weights])
        load(iter(sent["weights"]), version)

    def then_go_back(version, shapes):
        found = fingerprints(version, shapes)
        load(((n, old[n] if is_stale(n) else t) for n, t in sent["weights"]), sent["version"])
        engine.reset_cache()
        return found

    monkeypatch.setattr(engine, "load_weights", remember)
    monkeypatch.setattr(engine, "fingerprints", then_go_back)
    return r"older weights|log-probs of the probes' .* differ"


def half_of_the_kernels_are_stale(engine, monkeypatch, model):
    return stale_kernels(engine, monkeypatch, model, lambda name: "mlp" in name)


def cache_in_fp8(engine, monkeypatch, model):
    """The engine keeps keys and values in fp8."""
    from vllm.model_executor.layers.attention import Attention

    forward = Attention.forward

    def rounded(self, query, key, value, *args, **kwargs):
        key, value = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (key, value))
        return forward(self, query, key, value, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", rounded)
    return "log-probs of the probes' .* differ"


def merged_wrongly(engine, monkeypatch, model):
    """Sent and compared weights are wrong in the same way, so that only the trainer's own pass can show it."""
    weights = vllm_sync.policy_weights
    monkeypatch.setattr(
        vllm_sync,
        "policy_weights",
        lambda m, dtype: ((n, t * 1.05 if "o_proj" in n else t) for n, t in weights(m, dtype)),
    )
    return r"log-probs of the probes' .* differ"


# --- requests ---------------------------------------------------------------------------------------------------------


def generates(engine, monkeypatch, *, params: dict | None = None, answer: Callable[..., EngineOutput] | None = None):
    """The engine samples with other parameters, or changes its outputs."""
    generate = engine.generate

    def faulty(requests, on_output):
        requests = [replace(request, params=request.params | (params or {})) for request in requests]
        generate(requests, lambda number, output: on_output(number, answer(output) if answer else output))

    monkeypatch.setattr(engine, "generate", faulty)


def repetition_penalty(engine, monkeypatch, model):
    """The server has a default repetition penalty."""
    generates(engine, monkeypatch, params={"repetition_penalty": 1.05})
    return "log-probs of the probes' .* differ"


def temperature_ignored(engine, monkeypatch, model):
    generates(engine, monkeypatch, params={"temperature": 1.0})
    return "log-probs of the probes' .* differ"


def top_k_ignored(engine, monkeypatch, model):
    generates(engine, monkeypatch, params={"top_k": 0, "top_p": 1.0})
    return "total probability"


def answers_swapped(engine, monkeypatch, model):
    generate = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda requests, on_output: generate(requests, lambda n, output: on_output(n ^ 1, output))
    )
    return "mixes up"


def cached_tokens_unknown(engine, monkeypatch, model):
    generates(engine, monkeypatch, answer=lambda output: replace(output, cached_tokens=None))
    return "does not report how many"


def two_versions_in_an_answer(engine, monkeypatch, model):
    generates(engine, monkeypatch, answer=lambda output: replace(output, weight_versions=("a:1", "a:2")))
    return "reports weights a:1, a:2"


# --- state ------------------------------------------------------------------------------------------------------------


def asleep(engine, monkeypatch, model):
    engine._llm.sleep(level=1)
    monkeypatch.setattr(vllm_local.LocalEngine, "close", lambda self: None)  # keep the module's engine
    return "the engine is asleep"


def cache_not_reset(engine, monkeypatch, model):
    """Keys and values of the old weights stay."""
    monkeypatch.setattr(engine, "reset_cache", lambda: True)
    return r"keys and values of 32 of a probe's tokens"


def cache_in_use(engine, monkeypatch, model):
    monkeypatch.setattr(engine, "reset_cache", lambda: False)
    return "cannot drop its keys and values"


def of_another_run(engine, monkeypatch, model):
    load = engine.load_weights
    monkeypatch.setattr(engine, "load_weights", lambda w, v: load(w, "f00:" + v.partition(":")[2]))
    return r"reports weights f00:\d+"


FAULTS = {
    "weights": [
        *(dropped, swapped, layers_swapped, stale, skipped, skipped_without_a_change, head_left_old),
        *(some_columns_are_noise, all_matrices_are_a_little_off, one_bit_is_wrong, negated, half_is_zero, not_a_number),
    ],
    "kernels": [stale_kernels, half_of_the_kernels_are_stale, cache_in_fp8, merged_wrongly],
    "requests": [
        *(repetition_penalty, temperature_ignored, top_k_ignored, answers_swapped, cached_tokens_unknown),
        two_versions_in_an_answer,
    ],
    "state": [asleep, cache_not_reset, cache_in_use, of_another_run],
}
UNCHANGED = (skipped_without_a_change,)  # the policy must not change before it
