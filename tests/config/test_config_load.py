"""Loading: types, overrides, interpolations, saved configs, and messages about keys and types."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rolltune import config
from rolltune.config import schema
from rolltune.config.tree import parse_yaml
from rolltune.errors import ConfigError
from rolltune.run import checks


def test_a_valid_config_loads_typed(grpo_yaml: Path):
    cfg = checks.validate(schema.GRPOConfig, grpo_yaml)
    assert isinstance(cfg, schema.GRPOConfig) and isinstance(cfg.sampling, schema.SamplingConfig)
    assert cfg.optimizer == {"_component_": "torch.optim.AdamW", "lr": 1e-6, "betas": [0.9, 0.95]}
    assert cfg.loss["kl_coef"] == 1e-3 and isinstance(cfg.loss["kl_coef"], float)
    assert cfg.sampling.stop == ["</answer>"] and cfg.sampling.temperature == 1.0
    assert cfg.lora is None and cfg.num_steps == 10


@pytest.mark.parametrize("recipe", ["sft", "evaluate", "audit_rewards"])
def test_valid_configs_of_other_recipes(recipe: str, request: pytest.FixtureRequest):
    assert request.getfixturevalue(recipe)() == []


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-06"])
def test_small_floats_are_numbers_everywhere(grpo_yaml: Path, text: str):
    cfg = config.load(schema.GRPOConfig, grpo_yaml, [f"optimizer.lr={text}", f"max_grad_norm={text}"])
    assert cfg.optimizer["lr"] == cfg.max_grad_norm == 1e-6


def test_overrides(grpo_yaml: Path):
    cfg = config.load(
        schema.GRPOConfig,
        grpo_yaml,
        [
            "num_steps=3",
            "lora.rank=4",
            "lora.alpha=8",
            'sampling.stop=["a","b"]',
            "sampling.stop.1=c",
            "prompt.system=a=b c",
            "prompt.prefill=",
            "loss=rolltune.losses.dapo.DAPOLoss",
            "~loss.kl_coef",
            "advantage={_component_: rolltune.advantages.group_mean}",
            "batch={minibatches: 2}",
            "lr_scheduler=null",
            "dry_run=true",
        ],
    )
    assert cfg.num_steps == 3 and cfg.dry_run is True
    assert cfg.lora == schema.LoRAConfig(rank=4, alpha=8.0, dropout=0.0) and repr(cfg.lora).count("alpha=8.0") == 1
    assert cfg.sampling.stop == ["a", "c"] and cfg.prompt.system == "a=b c" and cfg.prompt.prefill == ""
    assert cfg.loss == {"_component_": "rolltune.losses.dapo.DAPOLoss"}
    assert cfg.advantage == {"_component_": "rolltune.advantages.group_mean"}
    assert cfg.batch.minibatches == 2 and cfg.batch.prompts_per_step == 8
    assert cfg.lr_scheduler is None


def test_interpolations_and_environment(grpo_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROLLTUNE_STEPS", "7")
    monkeypatch.setenv("ROLLTUNE_LR", "3e-5")
    cfg = config.load(
        schema.GRPOConfig,
        grpo_yaml,
        [
            "num_steps=${oc.env:ROLLTUNE_STEPS}",
            "optimizer.lr=${oc.decode:${oc.env:ROLLTUNE_LR}}",
            "eval.max_new_tokens=${sampling.max_new_tokens}",
            "eval.max_problems=${batch.prompts_per_step}",
            "logging.wandb_project=${output_dir}/x",
        ],
    )
    assert cfg.num_steps == 7 and cfg.optimizer["lr"] == 3e-5
    assert cfg.eval.max_new_tokens == 64
    assert cfg.eval.max_problems == 8, "a default can be referred to"
    assert cfg.logging.wandb_project == "outputs/test/x"


def test_escaped_interpolation_stays_text(grpo_yaml: Path):
    assert config.load(schema.GRPOConfig, grpo_yaml, [r"prompt.system=say \${x}"]).prompt.system == "say ${x}"


def test_a_saved_config_is_read_back(grpo_yaml: Path, tmp_path: Path):
    folder = tmp_path / "new/run"
    assert config.read_saved(folder) is None
    cfg = config.load(schema.GRPOConfig, grpo_yaml, ["prompt.system='1e-3'"])  # text that looks like a number
    config.save(cfg, folder)
    config.save(cfg, folder)
    assert config.read_saved(folder) == dataclasses.asdict(cfg)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: \xff\n", b"seed: 0\nmodel: [\n"])
def test_a_broken_saved_config_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    line = ", line 3" if b"seed" in content else ""
    with pytest.raises(ConfigError, match=f"^{tmp_path}/config.yaml{line}: .*output_dir"):
        config.read_saved(tmp_path)


def test_a_dump_loads_to_the_same(grpo_yaml: Path, tmp_path: Path):
    cfg = config.load(schema.GRPOConfig, grpo_yaml, ["lora.rank=4", "prompt.few_shot=[{user: a, assistant: 'b: c'}]"])
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(cfg))
    assert config.load(schema.GRPOConfig, again) == cfg


@pytest.mark.parametrize("text", ["${x}", "${", "a \\${seed}", "\\\\${seed}", "b\\", "$5 {x}", "${oc.env:HOME}", "\\"])
def test_text_that_looks_like_an_interpolation_survives_a_dump(grpo_yaml: Path, tmp_path: Path, text: str):
    cfg = config.load(schema.GRPOConfig, grpo_yaml)
    cfg.prompt.system = cfg.data.train["x"] = text
    config.save(cfg, tmp_path / "run")
    assert config.load(schema.GRPOConfig, tmp_path / "run/config.yaml") == cfg
    assert config.read_saved(tmp_path / "run") == dataclasses.asdict(cfg)


def test_json_is_read_whatever_it_is_indented_by(grpo_yaml: Path):
    cfg = config.load(schema.GRPOConfig, grpo_yaml)
    for indent in (None, 2, "\t"):
        grpo_yaml.write_text(json.dumps(dataclasses.asdict(cfg), indent=indent))
        assert config.load(schema.GRPOConfig, grpo_yaml) == cfg


def test_sampling_params_of_both_recipes():
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 11}
    for section in (schema.SamplingConfig, schema.EvaluateSamplingConfig):
        params = section(**values, stop=["x", "y"]).params()
        assert dataclasses.asdict(params) == values | {"stop": ("x", "y")}


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    # keys
    ("sampling.temprature=1", "sampling.temprature: no such key; did you mean sampling.temperature?"),
    ("smpling={}", "smpling: no such key; did you mean sampling?"),
    ("group_size=8", "group_size: no such key; did you mean sampling.group_size?"),
    ("lr=1e-5", "lr: no such key; did you mean optimizer.lr?"),
    ("max_steps=3", "max_steps: no such key; did you mean num_steps?"),
    ("lora.rnk=3", "lora.rnk: no such key; did you mean lora.rank?"),
    ("checkpoint.zzz=3", "checkpoint.zzz: no such key; keys here: every_n_steps, keep_last"),
    ("prompt.few_shot=[{user: a, assistant: b, sistant: c}]", "prompt.few_shot[0].sistant: no such key; did you mean"),
    # types
    ("num_steps=ten", "num_steps: 'ten' (a string); must be an integer"),
    ("num_steps=1.5", "num_steps: 1.5; must be an integer"),
    ("seed=true", "seed: true; must be an integer"),
    ("seed=null", "seed: null; must be an integer"),
    ("seed.x=1", "seed: a mapping (x); must be an integer"),
    ("resume=maybe", "resume: 'maybe' (a string); must be true or false"),
    ("eval.max_new_tokens=None", "must be an integer or null (null, not None)"),
    ("sampling.stop=x", "sampling.stop: 'x' (a string); must be a list of strings"),
    ("sampling.stop=[1]", "sampling.stop[0]: 1; must be a string"),
    ("sampling.group_size=[4]", "sampling.group_size: a list of 1; must be an integer"),
    ("max_grad_norm=.nan", "max_grad_norm: nan; must be a number"),
    ("model.dtype=float8", "model.dtype: 'float8'; must be one of float32, bfloat16, float16"),
    ("device=gpu", "device: 'gpu'; must be one of auto, cpu, cuda"),
    ("model=gpt", "model: 'gpt' (a string); must be a mapping with keys of path, dtype"),
    ("loss=3", "loss: 3; must be a component"),
    ("output_dir=???", "output_dir: missing; give a string"),
    # overrides and interpolations
    ("nonsense", "nonsense: must have the form key=value"),
    ("num_steps=[1", "num_steps: [1 is not a YAML value"),
    ("~nothing.here", "~nothing.here: the config has no nothing.here"),
    ("sampling.stop.5=x", "sampling.stop.5: the list has 1 items"),
    ("num_steps=${nope}", "num_steps: interpolation key 'nope' not found"),
    ("num_steps=${oc.env:ROLLTUNE_NOT_SET}", "num_steps: environment variable 'ROLLTUNE_NOT_SET' not found"),
    ("loss.kl_coef=${oc.env:ROLLTUNE_NOT_SET}", "loss.kl_coef: environment variable"),
]


@pytest.mark.parametrize(("override", "fragment"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_one_mistake_is_one_message(grpo, override: str, fragment: str):
    (found,) = grpo(override)
    assert fragment in found


def test_all_mistakes_are_reported_at_once(grpo):
    found = grpo(
        "smpling.x=1",
        "num_steps=ten",
        "~output_dir",
        "loss.beta=1",
        "loss.clip_low=x",
        "optimizer.lr=-1",
        "sampling.group_size=1",
        "eval.max_problems=${nope}",
    )
    assert sorted(problem.partition(":")[0] for problem in found) == [
        "eval.max_problems",
        "loss.beta",
        "loss.clip_low",
        "num_steps",
        "optimizer.lr",
        "output_dir",
        "sampling.group_size",
        "smpling",
    ]


def test_a_wrong_value_is_not_checked_against_others(grpo):
    (found,) = grpo("batch.prompts_per_step=x", "batch.minibatches=3")
    assert found.startswith("batch.prompts_per_step: 'x'")


def test_everything_that_is_missing_is_named(problems):
    found = problems(schema.GRPOConfig, "seed: 1\n")
    assert [problem.partition(":")[0] for problem in found] == [
        "output_dir",
        "model.path",
        "data.train",
        "data.heldout",
        "sampler",
        "advantage",
        "loss",
        "optimizer",
        "num_steps",
        "rewards",
    ]


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "bad.yaml: empty"),
        ("- 1\n", "bad.yaml: a list of 1"),
        ("a: [1\nb: 2\n", "bad.yaml, line 2: "),
        ("a: 1\n\tb: 2\n", "bad.yaml, line 2: "),
        ("a: 1\nb: 2\na: 3\n", "bad.yaml, line 3: a: repeated"),
        ("loss:\n  kl_coef: 1\n  kl_coef: 2\n", "bad.yaml, line 3: kl_coef: repeated"),
        (f"a: {'9' * 5000}\n", "bad.yaml: Exceeds the limit"),
        (f"a: {'[' * 5000}{']' * 5000}\n", "bad.yaml: brackets are nested too deeply"),
        ("a: &x [1, *x]\n", "bad.yaml: an alias stands inside of its own anchor"),
        ("a0: &a0 {b: 1}\n" + ALIASES, "bad.yaml: aliases stand for more than 100000 values"),
        ("a: !!python/object/apply:os.system [ls]\n", "bad.yaml, line 1: could not determine a constructor"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, fragment: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(schema.GRPOConfig, path)
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="none.yaml: no such file or directory"):
        config.load(schema.GRPOConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        config.load(schema.GRPOConfig, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary.yaml: not UTF-8"):
        config.load(schema.GRPOConfig, tmp_path / "binary.yaml")


# --- overrides change one key, to the text that was typed -------------------------------------------------------------


def test_an_override_changes_no_alias_of_its_key(grpo_yaml: Path):
    text = grpo_yaml.read_text()
    text = (
        text.replace("loss: {", "loss: &loss {")
        .replace("train: {", "train: &train {")
        .replace(
            "sampling: {group_size: 4, max_new_tokens: 64, stop: [",
            "sampling: {group_size: 4, max_new_tokens: 64, stop: &s [",
        )
    )
    text += (
        "correction: *loss\n"
        "mismatch: {<<: *loss, kl_coef: 2}\n"
        "eval: {overoptimization: {_component_: x.y, words: *s, inner: *train}}\n"
    )
    grpo_yaml.write_text(text)
    cfg = config.load(
        schema.GRPOConfig,
        grpo_yaml,
        ["loss.kl_coef=9", "correction.kl_coef=8", "sampling.stop.0=x", "eval.overoptimization.inner.count=3"],
    )
    assert cfg.correction is not None and cfg.mismatch is not None and cfg.eval.overoptimization is not None
    assert (cfg.loss["kl_coef"], cfg.correction["kl_coef"], cfg.mismatch["kl_coef"]) == (9, 8, 2)
    assert cfg.sampling.stop == ["x"] and cfg.eval.overoptimization["words"] == ["</answer>"]
    assert cfg.data.train["count"] == 40 and cfg.eval.overoptimization["inner"]["count"] == 3


def test_merge_keys_at_several_depths():
    """PyYAML merges in place, which must not look like a key that is given twice."""
    tree = parse_yaml("base: &a {lr: 1}\nx:\n  y: &b\n    <<: *a\n    lr: 2\nz: {<<: *b, k: 3}\n")
    assert tree == {"base": {"lr": 1}, "x": {"y": {"lr": 2}}, "z": {"lr": 2, "k": 3}}


def test_what_an_interpolation_gives_has_no_keys_to_override(grpo):
    found = grpo("data.heldout=${data.train}", "data.heldout.split=heldout")
    assert found[0].startswith("data.heldout.split: heldout is ${data.train}")


@pytest.mark.parametrize(
    "text",
    [
        "# be brief",
        "a # b",
        "~",
        "~/x",
        "  lead",
        "trail \t",
        "",
        "a: b",
        "- a",
        "[1, 2]",
        "{solution}",
        "{a: 1}",
        "{",
        "@x",
        "%x",
        "*x",
        "&x",
        "!x",
        "`x",
        "| a",
        "> a",
        "=",
        "<<",
        "a:",
        "'",
        "it's",
        '"x" y',
        "null # x",
        "None",
        "007",
        "1e3",
        "1.5",
        ".inf",
        "yes",
        "no",
        "true",
        "2024-01-01",
        "12:30",
        "é\n x",
        "\t",
        "a=b",
        "<think>",
        "???x",
    ],
)
def test_a_key_that_holds_text_takes_what_was_typed(grpo_yaml: Path, text: str):
    cfg = config.load(schema.GRPOConfig, grpo_yaml, [f"prompt.system={text}", f"sampling.stop.0={text}"])
    assert cfg.prompt.system == cfg.sampling.stop[0] == text


def test_quotes_null_and_interpolations_in_a_key_that_holds_text(grpo_yaml: Path):
    def system(*texts: str) -> str | None:
        return config.load(schema.GRPOConfig, grpo_yaml, [f"prompt.system={text}" for text in texts]).prompt.system

    assert [system("'a # b'"), system('"a\\n"'), system("'null'"), system("null")] == ["a # b", "a\n", "null", None]
    assert system("seed ${seed} # x") == "seed 0 # x"
    assert system("a", "b") == "b", "the last one wins"
    assert config.load(schema.GRPOConfig, grpo_yaml, ["prompt.prefill=null"]).prompt.prefill == "null"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a # b", "a # b"),
        ("# a", "# a"),
        ("3 # x", "3 # x"),
        ("@x", "@x"),
        ("*x", "*x"),
        ("&x", "&x"),
        ("- a", "- a"),
        ("~/x", "~/x"),
        ("  a ", "  a "),
        ("a: b", "a: b"),
        ("3", 3),
        ("1e-6", 1e-06),
        ("yes", True),
        ("~", None),
        ("null", None),
        ("'3'", "3"),
        ("[a, 'b # c']", ["a", "b # c"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_an_argument_of_a_component_is_a_yaml_value_or_the_text(grpo_yaml: Path, text: str, value: object):
    assert config.load(schema.GRPOConfig, grpo_yaml, [f"data.train.x={text}"]).data.train["x"] == value


@pytest.mark.parametrize("text", ["[1, 2] # x", "'a' # b", "[1", '"a', "{a: 1} b"])
def test_text_behind_a_bracket_or_quote_is_an_error(grpo, text: str):
    (found,) = grpo(f"data.train.count={text}")
    assert found.startswith(f"data.train.count: {text} is not a YAML value")


def test_text_from_the_environment_is_not_resolved_again(grpo_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROLLTUNE_TEXT", "${seed} # ~")
    cfg = config.load(schema.GRPOConfig, grpo_yaml, ["prompt.system=${oc.env:ROLLTUNE_TEXT}"])
    assert cfg.prompt.system == "${seed} # ~"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", "0100"),
        ("017", "017"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0o17", "0o17"),
        ("08", "08"),
        ("1__0", "1__0"),
        ("1_", "1_"),
        ("0", 0),
        ("1_000", 1000),
        ("-7", -7),
        ("+1", 1),
        ("0x1F", 31),
        (".5", 0.5),
        ("1.", 1.0),
        ("5.e-6", 5e-06),
        ("1e3", 1000.0),
    ],
)
def test_numbers_of_yaml(text: str, value: object):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


# --- the home folder --------------------------------------------------------------------------------------------------


def test_a_path_may_start_at_the_home_folder(grpo_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jinja").write_text("x")
    overrides = ["output_dir=~/run", "model.path=~/m", "prompt.chat_template=~/t.jinja", "prompt.system=~/x"]
    cfg = config.load(schema.GRPOConfig, grpo_yaml, overrides)
    assert (cfg.output_dir, cfg.model.path) == (f"{tmp_path}/run", f"{tmp_path}/m")
    assert cfg.prompt.chat_template == f"{tmp_path}/t.jinja" and cfg.prompt.system == "~/x"
    grpo_yaml.write_text("models: [{name: a, path: ~/m}]\ndata: {}\nsampler: {}\n")
    evaluated = config.load(schema.EvaluateConfig, grpo_yaml, ["output_dir=~"])
    assert evaluated.output_dir == str(tmp_path) and evaluated.models[0].path == f"{tmp_path}/m"


@pytest.mark.parametrize("key", ["output_dir", "model.path", "prompt.chat_template"])
def test_a_home_folder_that_does_not_exist_is_named(grpo, key: str):
    (found,) = grpo(f"{key}=~nobody-of-this-name/x")
    assert found.startswith(f"{key}: ~nobody-of-this-name/x: there is no such home folder")
