"""The check of evaluate's config."""

import pytest

MISTAKES = [
    ("models=[]", "models: none"),
    ("models.1.name=base", "models[1].name: base; must differ from the name of models[0]"),
    ("models.1.name=a/b", "models[1].name: 'a/b'; must be a file name"),
    ("models.0.name=..", "models[0].name: '..'"),
    ("models.0.name=", "models[0].name: ''"),
    ("models.0.path=gpt2", "models[0].path: gpt2: no such folder"),
    ("models.1.path=./nowhere", "models[1].path: ./nowhere: no such folder"),
    ("models=[{name: x}]", "models[0].path: missing"),
    ("models.1.pth=x", "models[1].pth: no such key; did you mean models[1].path?"),
    ("dtype=half", "dtype: 'half'; must be one of float32, bfloat16, float16"),
    ("max_problems=0", "max_problems: 0; must be >= 1"),
    ("sampling.samples=0", "sampling.samples: 0; must be >= 1"),
    ("sampling.temperature=-1", "sampling.temperature: -1.0; must be >= 0"),
    ("sampling.temperature=0", "sampling.temperature: 0; must be > 0 with 8 samples"),
    ("sampling={samples: 1, temperature: 0, top_k: 5}", "sampling.temperature: 0; top_p and top_k have no effect"),
    ("sampling.top_p=0", "sampling.top_p: 0.0; must be in (0, 1]"),
    ("sampling.top_k=-1", "sampling.top_k: -1; must be >= 0"),
    ("sampling.max_new_tokens=0", "sampling.max_new_tokens: 0; must be >= 1"),
    ("sampling.stop=['']", "sampling.stop: holds an empty string"),
    ("ks=[1, 9]", "ks[1]: 9; must be in 1 .. sampling.samples, 8"),
    ("ks=[0]", "ks[0]: 0; must be in 1 .. sampling.samples, 8"),
    ("ks=[2, 1, 2]", "ks[2]: 2; is in the list twice"),
    ("ks=[1.5]", "ks[0]: 1.5; must be an integer"),
    ("resamples=99", "resamples: 99; must be >= 100"),
    ("classified_samples=7", "classified_samples: 7; has no effect while classifier is null"),
    ("classified_samples=0", "classified_samples: 0; has no effect while classifier is null"),
    ("classifier={_component_: rolltune.nothing.Classifier}", "rolltune has no nothing"),
    (
        "classifier={_component_: rolltune.losses.grpo.GRPOLoss}",
        "classifier._component_: rolltune.losses.grpo.GRPOLoss;",
    ),
    (
        "classifier={_component_: rolltune.behaviours.BehaviourClassifier, endpoint: {base_url: nowhere, model: m}}",
        "classifier.endpoint.base_url: 'nowhere'",
    ),
    ("correct={_component_: rolltune.rewards.answer.answer_rewrd}", "has no answer_rewrd; did you mean answer_reward?"),
    ("lenient={_component_: rolltune.losses.grpo.GRPOLoss}", "GRPOLoss takes 0 positional arguments"),
    (
        "format={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9}",
        "format._component_: rolltune.rewards.length.cosine_length_reward; must be a reward without the argument",
    ),
    (
        "sampler.max_num_seq=3",
        "sampler.max_num_seq: NativeSampler takes no such argument; did you mean sampler.max_num",
    ),
    (
        "sampler={_component_: rolltune.samplers.vllm.served, transfer: carrier_pigeon}",
        "sampler.transfer: 'carrier_pigeon'; must be one of files, nccl",
    ),
    ("sampler={_component_: rolltune.samplers.vllm.colocated, max_num_seq: 3}", "did you mean sampler.max_num_seqs?"),
    ("data.cuont=1", "data.cuont: sums takes no such argument; did you mean data.count?"),
    ("prompt.chat_template=no.jinja", "prompt.chat_template: no.jinja: no such file"),
    ("seed=-1", "seed: -1; must be >= 0"),
]


@pytest.mark.parametrize(("override", "fragment"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_one_mistake_is_one_message(evaluate, override: str, fragment: str):
    (found,) = evaluate(override)
    assert fragment in found


@pytest.mark.parametrize(
    "override",
    ["sampling={samples: 1, temperature: 0}", "ks=[8, 1]", "sampling.top_p=0.9", "sampling.top_k=50", "resamples=100"],
)
def test_an_evaluation_may(evaluate, override: str):
    assert evaluate(override) == []
