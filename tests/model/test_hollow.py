"""Hollow models, filled by slices, are the models that transformers loads."""

import pytest
import torch
from model_families import FAMILIES, LENGTHS, save_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.distributed import close_world
from rolltune.errors import ConfigError
from rolltune.model import choose, parallel
from rolltune.model.forward import forward_of
from rolltune.model.hollow import first_rows, source_of
from rolltune.model.load import choose_sharded, load_model
from rolltune.model.policy import Policy, build_policy
from rolltune.run.agreement import weights_checksum
from rolltune.types import Prompt

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=4, alpha=8.0)
EXAMPLE = TrainGroup(prompt=Prompt(token_ids=(5, 6, 7)), sequences=(TokenSequence(token_ids=(8, 9, 10, 11)),))
(MICROBATCH,) = pack_examples([EXAMPLE], max_tokens=20)


@pytest.fixture(scope="module")
def mesh():
    yield parallel.make_mesh(CPU, None)
    close_world()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(expected, found) -> bool:
    a, b = dict(expected), dict(found)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(whole(a[name]), whole(b[name])) for name in a
    )


def build(path, mesh, lora=None, *, hollow, **options) -> Policy:
    config = ModelConfig(path=str(path), **options)
    policy = build_policy(config, lora, device=CPU, seed=0, with_reference=True, hollow=hollow)
    size = sum(parameter.untyped_storage().nbytes() for parameter in policy.causal_lm.parameters())
    assert (size < 20_000) == hollow  # adapters are real
    policy.shard(mesh, compute_dtype=torch.bfloat16 if config.master_weights else None, cpu_offload=False)
    policy.logprobs(MICROBATCH, temperature=0.7)[0].sum().backward()
    return policy


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (None, {"dtype": "bfloat16", "master_weights": True}),
        (None, {"fp32_head": True, "gradient_checkpointing": True}),
        (LORA, {"dtype": "bfloat16"}),
    ],
    ids=["master weights", "fp32 head, checkpointed", "lora"],
)
def test_policy_and_reference_have_the_bits_of_loaded_ones(make_tiny_llama, tmp_path, mesh, tied, lora, options):
    path = make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    GenerationConfig(eos_token_id=[3, 5]).save_pretrained(path)
    loaded, filled = (build(path, mesh, lora, hollow=hollow, **options) for hollow in (False, True))
    for a, b in zip((loaded.model, loaded._reference), (filled.model, filled._reference), strict=True):
        if a is not None:
            assert same(a.named_parameters(), b.named_parameters()) and same(a.named_buffers(), b.named_buffers())
            assert a.config.to_dict() == b.config.to_dict()
    gradients = [[parameter.grad for parameter in policy.trainable_parameters] for policy in (loaded, filled)]
    assert same(enumerate(gradients[0]), enumerate(gradients[1]))
    lm = filled.causal_lm
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    assert lm.name_or_path == loaded.causal_lm.name_or_path
    assert lm.generation_config.eos_token_id == [3, 5]


def test_a_checkpoint_is_resumed_and_the_reference_stays(make_tiny_llama, tmp_path, mesh):
    start, resumed = make_tiny_llama(tmp_path / "start"), make_tiny_llama(tmp_path / "resumed", seed=1)
    policy = build_policy(
        ModelConfig(path=str(start)), None, device=CPU, seed=0, with_reference=True, resume_from=resumed, hollow=True
    )
    policy.shard(mesh, compute_dtype=None, cpu_offload=False)
    expected = load_model(str(start), dtype="float32", device="cpu")
    assert same(expected.named_parameters(), policy._reference.named_parameters())
    expected = load_model(str(resumed), dtype="float32", device="cpu")
    assert same(expected.named_parameters(), policy.model.named_parameters())


def test_processes_compare_rows_of_hollow_models(make_tiny_llama, tmp_path):
    paths = [make_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (0, 0, 1)]
    models = [load_model(str(path), dtype="float32", device="cpu", hollow=True) for path in paths]
    first, again, other = (weights_checksum(first_rows(model)) for model in models)
    assert first == again != other


def with_tied_head(path):
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path / "model.safetensors")


def without_safetensors(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [with_tied_head, without_safetensors])
def test_other_checkpoints_are_loaded_whole(make_tiny_llama, tmp_path, mesh, change):
    path = make_tiny_llama(tmp_path / "model")
    expected = load_model(str(path), dtype="float32", device="cpu")
    change(path)
    model = load_model(str(path), dtype="float32", device="cpu", hollow=True)
    assert source_of(model) is None
    parallel.shard_model(model, mesh)
    assert same(expected.named_parameters(), model.named_parameters())


def test_models_that_cannot_be_sharded_are_refused_by_the_same_reason(tmp_path, mesh):
    save_model("gemma2", LENGTHS["long"], tmp_path / "model")
    choose._chosen.clear()
    policy = build_policy(
        ModelConfig(path=str(tmp_path / "model")), None, device=CPU, seed=0, with_reference=False, hollow=True
    )
    with pytest.raises(
        ConfigError, match="parallel.weights: fsdp; .*log-probs of Gemma2ForCausalLM go through its own"
    ):
        policy.shard(mesh, compute_dtype=None, cpu_offload=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_trained_in_the_same_way_or_loaded_whole(tmp_path, mesh, family):
    save_model(family, LENGTHS["long"], tmp_path / "model")
    choose._chosen.clear()
    try:
        expected = load_model(str(tmp_path / "model"), dtype="bfloat16", device="cpu")
    except ConfigError:
        pytest.skip("refused, sharded or not")
    model = load_model(str(tmp_path / "model"), dtype="bfloat16", device="cpu", hollow=True)
    if source_of(model) is None:
        return
    choose._chosen.clear()
    choose_sharded(model, mesh)
    assert forward_of(model) == forward_of(expected)
    if parallel.unshardable(model) is None:
        parallel.shard_model(model, mesh)
        assert same(expected.named_parameters(), model.named_parameters())
        assert same(expected.named_buffers(), model.named_buffers())
