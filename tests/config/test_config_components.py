"""Components: finding, building, and checking arguments against signatures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from repo import ROOT

from rolltune.config.components import check_component, component, component_or_object, instantiate, locate
from rolltune.errors import ConfigError


def test_instantiate_and_component():
    loss = instantiate({"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": 0.5})
    assert loss.kl_coef == 0.5
    node = {"_component_": "rolltune.advantages.group_zscore", "eps": 1.0, "weight": 3}
    advantage = component(node, ignore=("weight",))
    assert advantage([0.0, 0.0]) == [0.0, 0.0] and advantage([1.0, 3.0])[1] == pytest.approx(1 / (2**0.5 + 1))
    with pytest.raises(ConfigError, match=r"rolltune.losses.grpo.GRPOLoss: kl_coef"):
        instantiate({"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": -1})
    with pytest.raises(ConfigError, match=r"rolltune.advantages has no nope"):
        component({"_component_": "rolltune.advantages.nope"})


def test_modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, on_path = tmp_path / "here", tmp_path / "on_path"
    here.mkdir()
    on_path.mkdir()
    (here / "my_test_rewards.py").write_text("def fixed(problem, text, *, value: float = 0.5):\n    return value\n")
    (on_path / "my_test_other.py").write_text("def fixed(problem, text):\n    return 1\n")
    (here / "my_test_broken.py").write_text("import torch\n\n1 / 0\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(on_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(on_path)])
    assert locate("my_test_rewards.fixed")(None, "") == 0.5
    assert locate("my_test_other.fixed")(None, "") == 1
    (found,) = check_component({"_component_": "my_test_rewards.fixed", "value": "x"}, "rewards.mine", positional=2)
    assert found.startswith("rewards.mine.value: 'x'")
    (found,) = check_component({"_component_": "my_test_broken.fixed"}, "sampler")
    assert "import failed: ZeroDivisionError" in found and "my_test_broken.py:3" in found
    with pytest.raises(ValueError, match="yaml.safe_load: yaml is neither"):
        locate("yaml.safe_load")


def test_own_folders_of_the_repository_keep_their_name(monkeypatch: pytest.MonkeyPatch):
    """From the repository's root ``rewards`` would import a second time under another name."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"did you mean rolltune.rewards.answer.answer_reward\?"):
        locate("rewards.answer.answer_reward")


def test_positional_arguments_are_counted():
    node = {"_component_": "rolltune.advantages.group_zscore"}
    assert check_component(node, "advantage", positional=1) == []
    (found,) = check_component(node, "advantage", positional=2)
    assert "advantage._component_: group_zscore takes 1 positional arguments" in found and "passes 2" in found
    assert check_component(node, "advantage") == ["advantage.rewards: missing; group_zscore needs it"]


MISTAKES = [
    ("loss=GRPOLoss", "loss._component_: GRPOLoss: not a dotted path"),
    ("loss=rolltune.losses.grpo.GRPOLos", "rolltune.losses.grpo has no GRPOLos; did you mean GRPOLoss?"),
    ("loss=rolltune.losses.grp.GRPOLoss", "rolltune.losses has no grp; did you mean grpo?"),
    ("loss=roltune.losses.grpo.GRPOLoss", "no module roltune in this folder"),
    ("loss=losses.grpo.GRPOLoss", "did you mean rolltune.losses.grpo.GRPOLoss?"),
    (
        "loss=os.system",
        "os is neither one of rolltune, torchtune, torch, transformers, bitsandbytes, torchao nor a module",
    ),
    ("loss=rolltune.losses.grpo", "loss._component_: rolltune.losses.grpo is a module"),
    ("~loss._component_", "loss: has no _component_"),
    ("loss.beta=0.1", "loss.beta: GRPOLoss takes no such argument; it takes clip_high, clip_low, dual_clip, kl_coef"),
    ("loss.klcoef=0.1", "loss.klcoef: GRPOLoss takes no such argument; did you mean loss.kl_coef?"),
    ("loss.kl_coef=0.1x", "loss.kl_coef: '0.1x' (a string); must be a number"),
    ("loss.kl_coef='0.1'", "must be a number (without quotes; from the environment: ${oc.decode"),
    ("loss.kl_coef=true", "loss.kl_coef: true; must be a number"),
    ("loss=rolltune.losses.dr_grpo.DrGRPOLoss", "loss.max_completion_tokens: missing; DrGRPOLoss needs it"),
    ("data.train.count=1.5", "data.train.count: 1.5; must be an integer"),
    ("data.train.cuont=1", "data.train.cuont: sums takes no such argument; did you mean data.train.count?"),
    ("optimizer.betas=3", "optimizer.betas: 3; must be a list of 2"),
    ("optimizer.lr=0.1x", "optimizer.lr: '0.1x'"),
    ("optimizer.params=[]", "optimizer.params: the recipe passes it to AdamW"),
    ("lr_scheduler.num_training_steps=5", "lr_scheduler.num_training_steps: the recipe passes it"),
    (
        "lr_scheduler={_component_: torch.optim.lr_scheduler.ConstantLR}",
        "lr_scheduler._component_: ConstantLR takes no num_training_steps",
    ),
    ("advantage=rolltune.rewards.answer.answer_reward", "advantage.text: missing"),
    ("rewards.answer.completion=1", "rewards.answer.completion: answer_reward takes no such argument"),
    (
        "rewards.length={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9, completion: 1}",
        "rewards.length.completion: the recipe passes it to cosine_length_reward",
    ),
]


@pytest.mark.parametrize(("override", "fragment"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_one_mistake_in_a_component_is_one_message(grpo, override: str, fragment: str):
    (found,) = grpo(override)
    assert fragment in found


# --- mappings for dataclasses -----------------------------------------------------------------------------------------

SETTINGS = """\
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    max_calls: int = 10

    def __post_init__(self):
        if self.max_calls < 1:
            raise ValueError(f"max_calls: {self.max_calls}; must be >= 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    url: str
    timeout: float = 1.0
    caps: Caps = field(default_factory=Caps)


class Judge:
    def __init__(self, *, endpoint: Settings, spare: Settings | None = None, options: dict[str, int] | None = None):
        self.endpoint, self.spare, self.options = endpoint, spare, options


def reward(problem, text, *, endpoint: Settings):
    return endpoint.url
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A node of a class that takes settings, with further arguments."""
    (tmp_path / "my_test_settings.py").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # locate() adds the folder
    monkeypatch.delitem(sys.modules, "my_test_settings", raising=False)
    return lambda **arguments: {"_component_": "my_test_settings.Judge", **arguments}


def test_a_mapping_becomes_the_dataclass_of_the_signature(judge):
    node = judge(endpoint={"url": "u", "caps": {"max_calls": 3}}, spare={"url": "v"}, options={"a": 1})
    assert check_component(node, "judge") == []
    built = instantiate(node)
    assert (built.endpoint.url, built.endpoint.caps.max_calls, built.endpoint.timeout) == ("u", 3, 1.0)
    assert built.spare.url == "v" and built.options == {"a": 1}
    assert instantiate(judge(endpoint={"url": "u"}, spare=None)).spare is None
    assert node["endpoint"] == {"url": "u", "caps": {"max_calls": 3}}, "the config stays as it is"
    bound = component_or_object({"_component_": "my_test_settings.reward", "endpoint": {"url": "u"}})
    assert bound(None, "") == "u"


@pytest.mark.parametrize(
    ("endpoint", "fragment"),
    [
        (
            {"url": "u", "timeuot": 1},
            "judge.endpoint.timeuot: Settings takes no such argument; did you mean judge.endpo",
        ),
        ({"url": 3}, "judge.endpoint.url: 3; must be a string"),
        ({}, "judge.endpoint.url: missing; Settings needs it"),
        ("u", "judge.endpoint: 'u' (a string); must be a mapping with keys of url, timeout, caps"),
        (None, "judge.endpoint: null; must be a mapping"),
        ({"url": "u", "caps": {"max_cals": 3}}, "judge.endpoint.caps.max_cals: Caps takes no such argument"),
        ({"url": "u", "caps": {"max_calls": 1.5}}, "judge.endpoint.caps.max_calls: 1.5; must be an integer"),
    ],
)
def test_a_mapping_is_checked_against_the_dataclass(judge, endpoint, fragment: str):
    (found,) = check_component(judge(endpoint=endpoint), "judge")
    assert fragment in found


def test_an_argument_that_moved_into_a_mapping_is_refused_with_its_new_name(judge):
    assert check_component(judge(endpoint={"url": "u"}, base_url="u"), "judge") == [
        "judge.base_url: was renamed; use judge.endpoint.base_url"
    ]


def test_a_value_that_a_dataclass_refuses_is_named_in_full(judge):
    node = judge(endpoint={"url": "u", "caps": {"max_calls": 0}})
    with pytest.raises(ConfigError, match=r"^my_test_settings.Judge: endpoint\.caps\.max_calls: 0"):
        instantiate(node)


@pytest.mark.parametrize(
    "path",
    ["torch.os.system", "rolltune.files.os.system", "torch.utils.data.dataloader.os.system", "torch.sys.exit",
     "rolltune.config.components.importlib.import_module", "transformers.utils.os.system", "torch.builtins.exec",
     "rolltune.files.contextlib.suppress", "rolltune.rewards.symbolic.subprocess.run"],
)  # fmt: skip
def test_a_module_that_another_only_imports_is_not_walked_through(path: str):
    with pytest.raises(ValueError, match=rf"^{path}: .*(only imports|has no )"):
        locate(path)


@pytest.mark.parametrize(
    "path", ["rolltune.files.take_lock.__globals__", "torch.__builtins__.get", "torch.Tensor.__class__"]
)
def test_internals_are_not_components(path: str):
    with pytest.raises(ValueError, match="two leading underscores"):
        locate(path)


def test_nor_is_a_function_that_a_library_only_imports():
    with pytest.raises(ValueError, match=r"get_type_hints: is typing.get_type_hints, which rolltune only imports"):
        locate("rolltune.config.components.get_type_hints")


def test_the_same_holds_in_modules_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_walk.py").write_text("import os\nfrom os.path import join\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="own_walk.os is the module os, which own_walk only imports"):
        locate("own_walk.os.system")
    assert locate("own_walk.join")("a", "b") == "a/b"  # which a user may import there on purpose
