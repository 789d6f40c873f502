"""Faults of a sync of only the LoRA adapter, injected into a real vLLM engine.

Each takes (engine, monkeypatch, model), and returns a pattern of the message that must name it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rolltune.model.adapter import adapted_layers, adapter_weights
from rolltune.model.load import unwrapped
from rolltune.samplers import vllm_adapter_sync

# --- the adapter ------------------------------------------------------------------------------------------------------


def loads(engine, monkeypatch, change) -> None:
    """The engine loads ``change(name, tensor)`` in place of each matrix; None leaves it out."""
    load = engine.load_adapter

    def faulty(tensors: dict[str, Tensor], name: str) -> None:
        load({n: c for n, t in tensors.items() if (c := change(n, t)) is not None}, name)

    monkeypatch.setattr(engine, "load_adapter", faulty)


def current(model) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in adapter_weights(adapted_layers(model), unwrapped(model).dtype)}


def stale(engine, monkeypatch, model):
    """The adapter of the version before is sent under the new name."""
    old = current(model)
    loads(engine, monkeypatch, lambda n, t: old[n])
    return r"other weights than the policy\n.*lora_A\.weight: has other values"


def half_loaded(engine, monkeypatch, model):
    """The second layer has no adapter."""
    loads(engine, monkeypatch, lambda n, t: None if ".1." in n else t)
    return r"layers\.1\..*lora_[AB]\.weight: has other values"


def half_is_zero(engine, monkeypatch, model):
    """The rows that one of two tensor-parallel workers would hold."""
    loads(
        engine, monkeypatch, lambda n, t: torch.cat([t[: len(t) // 2], 0 * t[len(t) // 2 :]]) if "up_proj" in n else t
    )
    return r"up_proj\.lora_A\.weight: has other values"


def one_bit_is_wrong(engine, monkeypatch, model):
    def change(n, t):
        if "1.mlp.down_proj.lora_B" in n:
            t = t.clone()
            t.view(torch.int16 if t.element_size() == 2 else torch.int32)[3, 1] ^= 1
        return t

    loads(engine, monkeypatch, change)
    return r"layers\.1\.mlp\.down_proj\.lora_B\.weight: has other values"


def swapped(engine, monkeypatch, model):
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    load = engine.load_adapter

    def faulty(tensors, name):
        swap = {n: next((n.replace(a, b) for a, b in other.items() if a in n and "lora_A" in n), n) for n in tensors}
        load({n: tensors[swap[n]] for n in tensors}, name)

    monkeypatch.setattr(engine, "load_adapter", faulty)
    return r"k_proj\.lora_A\.weight.*: has the values of .*q_proj\.lora_A"


def wrong_scale(engine, monkeypatch, model):
    """The engine scales by alpha / rank, the policy by alpha / sqrt(rank)."""
    loads(engine, monkeypatch, lambda n, t: t / 2 if "lora_B" in n else t)
    return r"lora_B\.weight: has other values"


def wrong_scale_on_both_sides(engine, monkeypatch, model):
    """What is sent and compared is wrong in the same way, so that only the trainer's own pass can show it."""
    weights = vllm_adapter_sync.adapter_weights
    monkeypatch.setattr(
        vllm_adapter_sync,
        "adapter_weights",
        lambda layers, dtype: ((n, t * 2 if "lora_B" in n else t) for n, t in weights(layers, dtype)),
    )
    return r"log-probs of the probes' .* differ|the adapter changes log-probs"


def leftover_of_a_larger_adapter(engine, monkeypatch, model):
    """The rows after the adapter's rank keep another's values."""
    manager = worker(engine).model_runner.lora_manager._adapter_manager
    load = engine.load_adapter

    def faulty(tensors, name):
        load(tensors, name)
        manager.modules["model.layers.0.mlp.down_proj"].lora_a_stacked[0][0, 0, -1, 5] = 1.0

    monkeypatch.setattr(engine, "load_adapter", faulty)
    return r"layers\.0\.mlp\.down_proj\.lora_A\.weight: has other values"


def skipped(engine, monkeypatch, model):
    monkeypatch.setattr(engine, "load_adapter", lambda tensors, name: None)
    return r"the engine has no adapter \w+:\d+"


# --- what computes with the right adapter -----------------------------------------------------------------------------


def ignored(engine, monkeypatch, model):
    """The adapter is loaded and reported, but not applied (as where a kernel skips it without a word)."""
    batch = type(worker(engine).model_runner.input_batch)
    make = batch.make_lora_inputs

    def without(*args):
        prompts, tokens, requests = make(*args)
        return (0,) * len(prompts), (0,) * len(tokens), requests

    monkeypatch.setattr(batch, "make_lora_inputs", without)
    return r"it does not apply the adapter|log-probs of the probes' .* differ"


def tiny_and_ignored(engine, monkeypatch, model):
    """So early in a run that the adapter's effect is far below the tolerance of the distributions."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B["default"].weight.mul_(1e-3 if unwrapped(model).dtype == torch.float32 else 0.03)
    ignored(engine, monkeypatch, model)
    return r"it does not apply the adapter"


def stale_kernels(engine, monkeypatch, model):
    """The slots are compared, and then an older adapter is in them."""
    old, load, fingerprints = current(model), engine.load_adapter, engine.adapter_fingerprints

    def then_go_back(name, shapes):
        found = fingerprints(name, shapes)
        load(old, name)
        return found

    monkeypatch.setattr(engine, "adapter_fingerprints", then_go_back)
    return r"older weights|log-probs of the probes' .* differ|does not apply the adapter"


def cache_of_the_last_adapter(engine, monkeypatch, model):
    """Keys and values of the last version are taken for those of this one, as if both adapters had one name."""
    from vllm.v1.core import kv_cache_utils

    keys, last = kv_cache_utils._gen_lora_extra_hash_keys, engine._adapter
    monkeypatch.setattr(
        kv_cache_utils,
        "_gen_lora_extra_hash_keys",
        lambda request: keys(request) and [("lora", last.lora_name, last.lora_path)],
    )
    return r"keys and values of 32 of a probe's tokens"


# --- names ------------------------------------------------------------------------------------------------------------


def reports(engine, monkeypatch, **changes) -> None:
    """The engine reports something else about the answers of requests with an adapter."""
    generate = engine.generate

    def faulty(requests, on_output):
        generate(
            requests, lambda n, output: on_output(n, replace(output, **changes) if requests[n].adapter else output)
        )

    monkeypatch.setattr(engine, "generate", faulty)


def reported_as_ignored(engine, monkeypatch, model):
    reports(engine, monkeypatch, adapter=None)
    return r"reports weights base:\w+ instead of \w+:\d+"


def of_another_run(engine, monkeypatch, model):
    reports(engine, monkeypatch, adapter="f00:7")
    return r"reports weights base:\w+ with adapter f00:7 instead of"


# --- the base model ---------------------------------------------------------------------------------------------------


def wrong_base(engine, monkeypatch, model):
    """Another run has sent its own base model to the engine."""
    weights = [(n, t * 1.01) for n, t in vllm_adapter_sync.base_weights(model, unwrapped(model).dtype)]
    engine.load_weights(iter(weights), "base:f00")
    return r"reports weights base:f00 with adapter"


def base_changed_in_place(engine, monkeypatch, model):
    """Without a new name for the weights, after they were compared."""
    norm = worker(engine).model_runner.get_model().model.norm.weight
    monkeypatch.setattr(norm, "data", norm.data * 1.2)
    return r"log-probs of the probes' .* differ"


# --- state ------------------------------------------------------------------------------------------------------------


def asleep(engine, monkeypatch, model):
    """As far as a CPU goes: an engine that is asleep would lose what it loads, and is refused."""
    engine._llm.sleep(level=1)
    return "the engine is asleep"


def lost(engine, monkeypatch, model):
    """As when the engine's memory was freed after the load: the slots are empty."""
    load = engine.load_adapter

    def faulty(tensors, name):
        load(tensors, name)
        worker(engine).model_runner.lora_manager.remove_all_adapters()

    monkeypatch.setattr(engine, "load_adapter", faulty)
    return r"the engine has no adapter \w+:\d+"


def worker(engine):
    return engine._llm.llm_engine.model_executor.driver_worker.worker


FAULTS = [
    *(stale, half_loaded, half_is_zero, one_bit_is_wrong, swapped, wrong_scale, wrong_scale_on_both_sides),
    *(leftover_of_a_larger_adapter, skipped, ignored, tiny_and_ignored, stale_kernels, cache_of_the_last_adapter),
    *(reported_as_ignored, of_another_run, wrong_base, base_changed_in_place, asleep, lost),
]
