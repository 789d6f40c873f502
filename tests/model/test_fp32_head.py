"""An fp32 head over a model in bf16 or fp16: the same logits for trainer, reference and sampler."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.fp32_head import FP32Head
from rolltune.model.load import DTYPES, load_for_sampling, load_model
from rolltune.model.policy import build_policy
from rolltune.samplers.native import NativeSampler
from rolltune.types import Prompt, SampleRequest, SamplingParams

CPU = torch.device("cpu")
HALF = ["bfloat16", "float16"]
PROMPT = Prompt(token_ids=tuple(range(40, 60)))


def build(path, dtype, lora=None, fp32_head=True):
    return build_policy(
        ModelConfig(path=str(path), dtype=dtype, fp32_head=fp32_head), lora, device=CPU, seed=0, with_reference=True
    )


def make_microbatch(completions):
    sequences = tuple(TrainSequence(token_ids=ids, logprobs=lps, advantage=1.0) for ids, lps in completions)
    (microbatch,) = pack([TrainGroup(prompt=PROMPT, sequences=sequences)], max_tokens=10_000)
    return microbatch


@pytest.fixture
def microbatch():
    ids = torch.randint(4, 250, (22,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_microbatch([(tuple(ids), (0.0,) * 22)])


def sample(model, tokenizer):
    """Eight completions of one prompt, as a microbatch."""
    sampler = NativeSampler(model, tokenizer)
    params = SamplingParams(temperature=1.0, max_new_tokens=32)
    (group,) = sampler.generate([SampleRequest(prompt=PROMPT, seeds=tuple(range(8)))], params)
    return make_microbatch([(completion.token_ids, completion.logprobs) for completion in group])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", HALF)
def test_trainer_by_hand(make_tiny_llama, tmp_path, microbatch, dtype, tied):
    policy = build(make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied), dtype)
    seen = []
    norm = policy.model.model.norm  # the last layer before the head
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    logprobs, _ = policy.logprobs(microbatch, temperature=0.7)
    hidden = seen[0][microbatch.predictor_index].detach().float()
    head = policy.model.lm_head.weight.detach()
    assert head.dtype == DTYPES[dtype] and seen[0].dtype == DTYPES[dtype]
    expected = (
        torch.log_softmax(hidden @ head.float().T / 0.7, -1).gather(-1, microbatch.target_ids[:, None]).squeeze(-1)
    )
    torch.testing.assert_close(logprobs.detach(), expected, atol=1e-5, rtol=1e-5)
    rounded = torch.log_softmax((hidden.to(head.dtype) @ head.T).float() / 0.7, -1)
    assert (rounded.gather(-1, microbatch.target_ids[:, None]).squeeze(-1) - expected).abs().max() > 1e-4, (
        "the head makes a difference"
    )

    torch.testing.assert_close(
        policy.reference_logprobs(microbatch, temperature=0.7), logprobs.detach(), rtol=0, atol=0
    )
    assert (policy.model.lm_head.weight is policy.model.model.embed_tokens.weight) == tied
    logprobs.sum().backward()
    assert policy.model.lm_head.weight.grad.dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_plain_forward_gives_fp32_logits(tiny_llama, microbatch, dtype):
    model = load_model(str(tiny_llama), dtype=dtype, device=CPU, fp32_head=True)
    ids = microbatch.input_ids[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.float()
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.float().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("dtype", HALF)
def test_sampler_by_hand(tiny_llama, tokenizer, dtype, pack_weights):
    model = load_for_sampling(str(tiny_llama), dtype=dtype, device=CPU, fp32_head=True)
    head, seen = model.get_output_embeddings(), []
    sampler = NativeSampler(model, tokenizer, pack_weights=pack_weights)
    head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    params = SamplingParams(temperature=1.0, max_new_tokens=4)
    ((completion,),) = sampler.generate([SampleRequest(prompt=PROMPT, seeds=(3,))], params)
    assert type(head) is FP32Head and "forward" not in head.__dict__, "sampling restores it"
    steps = seen[-len(completion.token_ids) :]
    for (hidden, _), token, logprob in zip(steps, completion.token_ids, completion.logprobs, strict=True):
        assert hidden.dtype == DTYPES[dtype]
        expected = torch.log_softmax(hidden[0, -1].float() @ head.weight.float().T, -1)[token]
        assert logprob == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_sampler_and_trainer_are_nearer(make_tiny_llama, tmp_path, tokenizer, lora):
    """As in real models, logits are large compared with their differences, so that bf16 rounding shows."""
    path, gaps = make_tiny_llama(tmp_path / "model", tie_word_embeddings=False), {}
    for fp32_head in (False, True):
        policy = build(path, "bfloat16", lora, fp32_head=fp32_head)
        with torch.no_grad():
            policy.causal_lm.get_output_embeddings().weight.add_(4.0)  # the same for every token: softmax is the same
        microbatch = sample(policy.model, tokenizer)
        gaps[fp32_head] = (
            (policy.logprobs(microbatch, temperature=1.0)[0] - microbatch.sampler_logprobs).abs().mean().item()
        )
    assert gaps[True] < 0.5 * gaps[False], gaps


def test_saved_folders_have_a_plain_head(tiny_llama, tokenizer, tmp_path):
    for name, lora in (("full", None), ("lora", LoRAConfig(rank=4, alpha=8.0))):
        policy = build(tiny_llama, "bfloat16", lora)
        policy.save(tmp_path / name, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    before = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).state_dict()
    after = plain.state_dict()
    assert type(plain.get_output_embeddings()) is torch.nn.Linear
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any("lm_head" in name for name in policy.model.state_dict() if "lora" in name), "the head is not adapted"
