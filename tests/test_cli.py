"""``tune``, called from any folder, with bundled recipes and configs and with the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from repo import ROOT

from rolltune import cli
from rolltune.cli import catalog, launch
from rolltune.config import validate
from rolltune.config.components import locate

TUNE = Path(sys.executable).with_name("tune")

RECIPE = '''\
"""A tiny recipe, which says what it was given."""

import os
import sys

from dataclasses import dataclass
from rolltune import config


@dataclass(kw_only=True)
class TinyConfig:
    who: str = "default"
    status: int = 0
    dry_run: bool = False


def run(cfg):
    print(f"who={cfg.who} dry_run={cfg.dry_run} rank={os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}")
    print(f"cwd={os.getcwd()}")
    if cfg.who == "helper":
        import tiny_helper
    sys.exit(cfg.status)


if __name__ == "__main__":
    config.main(TinyConfig, run)
'''


def tune(*arguments: str, cwd: Path, command: tuple[str, ...] = (str(TUNE),)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with a recipe and its config in place of the real ones; the cwd is an empty folder."""
    for name in ("recipes", "configs", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipes" / "tiny.py").write_text(RECIPE)
    (tmp_path / "recipes" / "other.py").write_text('"""Another recipe."""\n')
    header = "# tune run tiny --config small.yaml\n#\n# The smallest, by Dr. Small. It has\n# two sentences.\n\n"
    (tmp_path / "configs" / "small.yaml").write_text(f"{header}who: bundled\n")
    (tmp_path / "configs" / "wide.yaml").write_text("# tune run --nproc_per_node 2 other --config wide.yaml\na: 1\n")
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def run_main(*arguments: str) -> int:
    """The exit status of ``tune`` with these arguments, in this process."""
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0


# --- the real command -------------------------------------------------------------------------------------------------


def test_tune_on_the_path_is_ours(tmp_path: Path):
    """torchtune's wheel also installs a bin/tune."""
    for name in ("tune", "rolltune"):
        done = tune("--version", cwd=tmp_path, command=(str(TUNE.with_name(name)),))
        assert (done.returncode, done.stdout) == (0, "rolltune 0.1.0\n"), done.stderr
    done = tune("--version", cwd=tmp_path, command=(sys.executable, "-m", "rolltune.cli"))
    assert (done.returncode, done.stdout) == (0, "rolltune 0.1.0\n"), done.stderr


def test_ls_and_help_import_no_torch(tmp_path: Path):
    code = "import sys; from rolltune.cli import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for arguments in (
        ["ls"],
        ["ls", "--all"],
        [],
        ["run", "--help"],
        ["run", "grpo", "--help"],
        ["cat", "--sort", "quickstart"],
    ):
        done = tune(*arguments, cwd=tmp_path, command=(sys.executable, "-c", code))
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "grpo" in done.stdout


def test_every_bundled_recipe_and_config_is_listed(tmp_path: Path):
    listed = tune("ls", cwd=tmp_path).stdout.split()
    for path in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "configs").glob("*.yaml")]:
        assert path.stem in listed, path


def test_every_bundled_config_opens_with_its_command():
    names = {recipe.name for recipe in catalog.recipes()}
    assert "grpo" in names
    for config in catalog.configs():
        with open(config.path) as file:
            first = file.readline()
        assert config.recipe in names, config.path
        assert first.startswith("# tune run ") and first.endswith(f"{config.recipe} --config {config.path.name}\n")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("earlier_stages")
def test_every_bundled_config_is_valid(path: Path):
    """Keys, types and values are valid, and the packages of components are installed, or the header names them."""
    recipe = next(recipe for recipe in catalog.recipes() if recipe.name == catalog.recipe_of(path))
    schema = catalog.schema_of(recipe.path)
    assert schema is not None
    validate(schema, path)
    extra = ("bitsandbytes",) if "rolltune[qlora]" in path.read_text() else ()
    for node in _components(yaml.safe_load(path.read_text())):
        assert node.split(".")[0] in ("rolltune", "torch", "transformers", *extra)
        locate(node)


def _components(node: object) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in _components(item)]
    if not isinstance(node, dict):
        return []
    return [node[key] for key in node if key == "_component_"] + _components(list(node.values()))


def test_every_recipe_names_its_schema():
    for recipe in catalog.recipes():
        assert catalog.schema_of(recipe.path) is not None, recipe.path


def test_a_mistake_is_no_traceback(tmp_path: Path):
    done = tune("run", "grpp", "--config", "x", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "tune run: no recipe grpp; did you mean grpo? (tune ls lists them)\n"


@pytest.mark.slow
def test_copied_recipe_runs(tmp_path: Path):
    assert tune("cp", "grpo", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "grpo.py").read_text() == (ROOT / "recipes" / "grpo.py").read_text()
    (tmp_path / "my.yaml").write_text("num_stps: 1\n")
    done = tune("run", "./grpo.py", "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "num_stps: no such key; did you mean num_steps?" in done.stderr and "Traceback" not in done.stderr
    assert "Skipping import" not in done.stderr, "torchao's warning"


@pytest.mark.slow
def test_torchtunes_recipes_and_configs(tmp_path: Path):
    listed = tune("ls", "--all", cwd=tmp_path).stdout.split()
    assert listed.index("grpo") < listed.index("lora_finetune_single_device")
    done = tune("cat", "llama3_2/1B_full_single_device", cwd=tmp_path)
    assert done.returncode == 0 and "torchtune.models.llama3_2.llama3_2_1b" in done.stdout
    done = tune("cp", "lora_finetune_single_device", "mine", cwd=tmp_path)
    assert done.returncode == 0 and "class LoRAFinetuneRecipe" in (tmp_path / "mine.py").read_text()


def test_torchtune_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchtune", None)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(catalog.UsageError, match='pip install "torchao<0.16" "peft<0.19"'):
        launch.run_torchtune(["run", "lora_finetune_single_device"])


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(RECIPE)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"who: {name}\n")
    launch = ("run", "--nproc_per_node", "2", "tiny.py", "--config")
    done = tune(*launch, "one.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"who=one dry_run=False rank={rank} of 2" in done.stdout
    assert f"cwd={tmp_path}" in done.stdout
    assert done.stdout.count("# ") == 1 and f"# {tmp_path}/one.yaml" in done.stdout, "only rank 0 prints the config"
    assert "OMP_NUM_THREADS" not in done.stderr
    done = tune(*launch, "two.yaml", "status=7", cwd=tmp_path)
    assert done.returncode == 7 and "failed with exit code 7" in done.stderr and "Traceback" not in done.stderr
    done = tune(*launch, "two.yaml", "whom=x", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("whom: no such key; did you mean who?") == 1


@pytest.mark.slow
def test_torchrun_checks_the_config_before_it_starts_processes(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("# tune run grpo --config my.yaml\nbatch: {prompts_per_step: 3}\n")
    done = tune("run", "--nproc_per_node", "2", "grpo", "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert "batch.prompts_per_step: 3; must be divisible by batch.minibatches (1) x 2 processes" in done.stderr
    assert done.stderr.startswith("grpo: ") and "torch/distributed" not in done.stderr
    done = tune("run", "--nproc_per_node", "many", "grpo", "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "tune run: Unsupported nproc_per_node value: many\n"
    done = tune("run", "--nnodes", "2", "--max_restarts", "1", "grpo", "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "restarts on several machines need --rdzv-backend c10d" in done.stderr


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "small.yaml"])
@pytest.mark.parametrize("recipe", ["tiny", "tiny.py"])
def test_bundled_config_by_name_from_another_folder(bundle: Path, capsys, recipe: str, name: str):
    assert run_main("run", recipe, "--config", name) == 0
    out = capsys.readouterr().out
    assert "who=bundled dry_run=False" in out and f"cwd={bundle / 'here'}" in out
    assert run_main("run", recipe, f"--config={name}", "who=me", "--dry-run") == 0
    assert "who=me dry_run=True" in capsys.readouterr().out


def test_local_file_wins_over_bundled_config(bundle: Path, capsys):
    Path("small.yaml").write_text("who: local\n")
    assert run_main("run", "tiny", "--config", "small.yaml") == 0
    out = capsys.readouterr().out
    assert "who=local" in out and out.startswith(f"# {bundle / 'here' / 'small.yaml'}\n")
    assert run_main("run", "tiny", "--config", "small") == 0
    assert "who=bundled" in capsys.readouterr().out, "the name without .yaml is the bundled config's"
    assert run_main("run", "tiny", "--config", str(bundle / "configs" / "small.yaml")) == 0
    assert "who=bundled" in capsys.readouterr().out


def test_local_recipe_wins_and_has_modules_beside_it(bundle: Path, capsys):
    Path("sub").mkdir()
    Path("sub/tiny.py").write_text(RECIPE.replace("who=", "local who="))
    Path("sub/tiny_helper.py").write_text("print('helped')\n")
    assert run_main("run", "sub/tiny.py", "--config", "small", "who=helper") == 0
    out = capsys.readouterr().out
    assert "local who=helper" in out and "helped" in out
    Path("tiny.py").write_text(RECIPE.replace("who=", "nearer who="))
    assert run_main("run", "tiny.py", "--config", "small") == 0
    assert "nearer who=bundled" in capsys.readouterr().out
    assert run_main("run", "tiny", "--config", "small") == 0
    assert "nearer" not in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 3])
def test_exit_code_of_a_recipe_passes_through(bundle: Path, status: int):
    assert run_main("run", "tiny", "--config", "small", f"status={status}") == status


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["run", "tinny", "--config", "small"], "tune run: no recipe tinny; did you mean tiny?"),
        (["run", "./tiny.py", "--config", "small"], "tune run: no recipe file ./tiny.py"),
        (["run", "mine", "--config", "small"], "did you mean mine.py?"),
        (["run", "prime", "--config", "small"], "tune run: recipe prime was renamed to sft"),
        (["run", "tiny", "--config", "smal"], "tune run: no config or file smal; did you mean small?"),
        (["run", "tiny", "--config", "local"], "did you mean local.yaml?"),
        (["run", "tiny", "--config", "sub/smal.yaml"], "no config file sub/smal.yaml; did you mean small?"),
        (["run", "tiny", "--config"], "--config has no value; configs of tiny: small"),
        (["run", "tiny", "--config="], "--config has no value; configs of tiny: small"),
        (["run", "tiny", "--config", "--dry-run"], "--config has no value; configs of tiny: small"),
        (["run", "tiny"], "--config: missing; give a YAML file"),
        (
            ["run", "tiny", "--config", "wide"],
            "wide is a config of other, as its first line says; configs of tiny: small",
        ),
        (["run", "tiny", "--config", "small", "woh=1"], "woh: no such key; did you mean who?"),
        (["run", "--bogus", "tiny"], "tune run: unrecognized arguments: --bogus"),
        (["cat", "smal"], "tune cat: no config or file smal; did you mean small?"),
        (["cat", "tiny"], "tune cat: tiny is a recipe, not a config; its configs: small"),
        (["cp", "smal", "."], "tune cp: no recipe or config smal; did you mean small?"),
        (["cp", "small", "no/where.yaml"], "tune cp: no folder no (--make-parents creates it)"),
        (["validate", "plain.yaml"], "plain.yaml does not say which recipe it is for"),
        (["validate", "none.yaml"], "no config or file none.yaml"),
        (["validate", "plain.yaml", "--recipe", "tiny"], "no config class of rolltune.config.schema"),
        (["vlidate", "plain.yaml"], "invalid choice: 'vlidate'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(bundle: Path, capsys, arguments: list[str], fragment: str):
    Path("plain.yaml").write_text("a: 1\n")
    Path("local.yaml").write_text("a: 1\n")
    Path("mine.py").write_text("")
    assert run_main(*arguments) == 2
    captured = capsys.readouterr()
    assert fragment in captured.err and not captured.out


def test_missing_config_of_a_known_recipe_names_its_configs(capsys):
    assert run_main("run", "sft") == 2
    names = [c.name for c in catalog.configs() if c.recipe == "sft"]
    assert "quickstart_sft" in names
    assert f"--config is missing; configs of sft: {', '.join(names)}" in capsys.readouterr().err


def test_help(bundle: Path, capsys):
    assert run_main("run") == 2
    assert run_main("run", "--help") == 0
    assert "key=value" in capsys.readouterr().out
    assert run_main("run", "tiny", "--help") == 0
    assert 'who: "default"' in capsys.readouterr().out
    assert run_main() == 0
    assert "validate" in capsys.readouterr().out


def test_keyboard_interrupt(bundle: Path):
    (bundle / "recipes" / "stop.py").write_text("raise KeyboardInterrupt\n")
    assert run_main("run", "stop") == 130


# --- ls, cat, cp, validate --------------------------------------------------------------------------------------------


def test_ls(bundle: Path, capsys):
    assert run_main("ls") == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        "RECIPE  CONFIG",
        "other           Another recipe.",
        "        wide",
        "tiny            A tiny recipe, which says what it was given.",
        "        small   The smallest, by Dr. Small.",
    ]


def test_cat_keeps_comments(bundle: Path, capsys):
    assert run_main("cat", "small.yaml") == 0
    assert capsys.readouterr().out == (bundle / "configs" / "small.yaml").read_text()
    (bundle / "configs" / "tiny.yaml").write_text("who: named like the recipe\n")
    assert run_main("cat", "tiny") == 0
    assert capsys.readouterr().out == "who: named like the recipe\n"
    Path("small.yaml").write_text("who: local\n")
    assert run_main("cat", "small.yaml") == 0
    assert capsys.readouterr().out == "who: local\n"


def test_cat_sorts(bundle: Path, capsys):
    Path("mine.yaml").write_text("# tune run tiny --config mine.yaml\nwho: ${status}\nlr: 1e-5\na: {d: [1, 2], c: 0}\n")
    assert run_main("cat", "mine.yaml", "--sort") == 0
    assert capsys.readouterr().out == "a:\n  c: 0\n  d:\n  - 1\n  - 2\nlr: 1e-5\nwho: ${status}\n"


def test_download(monkeypatch: pytest.MonkeyPatch, capsys):
    def snapshot_download(repo: str, *, local_dir: str | None, ignore_patterns: list[str] | None) -> str:
        if repo == "org/gated":
            raise OSError("403: access to org/gated is restricted")
        return f"{local_dir} without {ignore_patterns}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run_main("download", "org/name", "--output-dir", "here", "--ignore-patterns", "original/*") == 0
    assert capsys.readouterr().out == "downloaded to here without ['original/*']\n"
    assert run_main("download", "org/gated") == 2
    assert capsys.readouterr().err == "tune download: org/gated: 403: access to org/gated is restricted\n"


def test_cp(bundle: Path, capsys):
    for name, destination, copied in [
        ("tiny", ".", "tiny.py"),
        ("tiny.py", "mine.py", "mine.py"),
        ("tiny", "yours", "yours.py"),
        ("small", ".", "small.yaml"),
        ("small.yaml", "v1.2", "v1.2.yaml"),
    ]:
        assert run_main("cp", name, destination) == 0
        assert (
            Path(copied).read_text()
            == (bundle / ("recipes" if "py" in copied else "configs") / name)
            .with_suffix(Path(copied).suffix)
            .read_text()
        )
    assert run_main("cp", "small", "a/b/c.yaml", "--make-parents") == 0 and Path("a/b/c.yaml").is_file()
    Path("small.yaml").write_text("mine")
    assert run_main("cp", "small", ".", "--no-clobber") == 0 and Path("small.yaml").read_text() == "mine"
    assert run_main("cp", "small", ".") == 0 and Path("small.yaml").read_text() != "mine"
    capsys.readouterr()
    assert run_main("run", "./mine.py", "--config", "small.yaml") == 0
    assert "who=bundled" in capsys.readouterr().out


def test_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (
        "output_dir: x\ndata: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}\n"
        "rewards: {answer: {_component_: rolltune.rewards.answer.answer_reward}}\n"
    )
    Path("my.yaml").write_text(text)
    Path("audit.py").write_text("from rolltune import config\nconfig.main(AuditRewardsConfig, None)\n")
    assert run_main("validate", "my.yaml", "--recipe", "audit.py") == 0
    assert capsys.readouterr().out == "my.yaml: a valid config of audit\n"
    assert run_main("validate", "my.yaml", "sed=1", "max_problems=0", "--recipe", "audit.py") == 2
    assert capsys.readouterr().err == (
        "my.yaml: 2 mistakes\n  sed: no such key; did you mean seed?\n  max_problems: 0; must be >= 1\n"
    )
    Path("my.yaml").write_text(f"# tune run audit.py --config my.yaml\n{text}")
    assert catalog.recipe_of(Path("my.yaml")) == "audit"


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("# tune run grpo --config a.yaml\n", "grpo"),
        ("# tune run --nproc_per_node 8 grpo --config a.yaml num_steps=3\n", "grpo"),
        ("#tune run ./mine/grpo.py --config a.yaml\n", "grpo"),
        ("# A title.\n# tune run sft --config a.yaml\n", "sft"),
        ("a: 1\n# tune run grpo --config a.yaml\n", None),
        ("# tune cat grpo --config a.yaml\n", None),
        ("", None),
    ],
)
def test_recipe_of_a_config(tmp_path: Path, text: str, recipe: str | None):
    (tmp_path / "a.yaml").write_text(text)
    assert catalog.recipe_of(tmp_path / "a.yaml") == recipe


def test_reading_ends_early(tmp_path: Path):
    """``tune ... | head`` prints no error."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [str(TUNE), "run", "grpo", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60
    )
    os.close(write)
    assert done.stderr == b""


# --- configs that are no files ----------------------------------------------------------------------------------------


def test_a_config_comes_through_a_pipe(tmp_path: Path):
    """The pipe is read once, for all processes."""
    (tmp_path / "tiny.py").write_text(RECIPE)
    os.mkfifo(tmp_path / "fifo")
    for name, given, before in (
        ("-", "cat t.yaml |", ()),
        ("/dev/stdin", "cat t.yaml |", ()),
        ("<(sed s/x/y/ t.yaml)", "", ("--nproc_per_node", "2")),
        ("fifo", "cat t.yaml > fifo &", ()),
    ):
        (tmp_path / "t.yaml").write_text("who: x\n")
        command = " ".join([given, str(TUNE), "run", *before, "./tiny.py", "--config", name])
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        who = "y" if "sed" in name else "x"
        assert done.returncode == 0 and done.stdout.count(f"who={who} ") == max(1, len(before)), done.stderr
    assert not list(Path(tempfile.gettempdir()).glob("rolltune-config-*/t*.yaml"))


def test_processes_do_not_share_a_pipe(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "tiny.py", "--config", "-"],
        cwd=tmp_path,
        env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"},
        input="who: x\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--config: -: only one process can read from it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["grpo", "--config", "https://example.org/a.yaml"], "URLs are not read"),
        (["grpo", "--config=~nobody-of-this-name/a.yaml"], "no such home folder"),
        (["grpo", "--nproc_per_node", "2", "--config", "quickstart"], "tune run --nproc_per_node ... grpo --config"),
        (["grpo", "--nproc-per-node=2", "--config", "quickstart"], "tune run --nproc-per-node ... grpo --config"),
        (["sft", "--config", "quickstart_sft", "--standalone"], "tune run --standalone ... sft --config"),
    ],
)
def test_mistakes_of_place(capsys, arguments: list[str], fragment: str):
    assert cli.main(["run", *arguments]) == 2
    assert fragment in capsys.readouterr().err


def test_home_folder_on_the_command_line(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A shell expands ~ at the start of a word only, so --config=~/x arrives as it was typed."""
    monkeypatch.setenv("HOME", str(bundle))
    (bundle / "mine.yaml").write_text("who: home\n")
    assert cli.main(["cat", "~/mine.yaml"]) == 0 and capsys.readouterr().out == "who: home\n"
    assert cli.main(["cp", "~/mine.yaml", "x"]) == 2
    name = catalog.configs()[0].name
    assert cli.main(["cp", name, "~/copied.yaml"]) == 0
    assert (bundle / "copied.yaml").exists() and not Path("~").exists()
