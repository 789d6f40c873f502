"""The wheel, built from the sdist and installed into an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from repo import ROOT

pytestmark = pytest.mark.slow

NOT_SOURCE = (
    ".git",
    ".venv",
    "outputs",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "wandb",
)
FOLDERS = ("recipes", "configs", "rewards", "data")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, work / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    # Without a choice, build makes the wheel from the sdist and not from the tree.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", work / "tree", cwd=work)
    (path,) = (work / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; the dependencies are those of this one, without its rolltune."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    # A path listed in a .pth file is searched, but the .pth files that lie there (our editable install) are not read.
    (site_packages(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def site_packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def test_the_checkout_has_its_links():
    """A checkout without symlinks builds a wheel without these folders, and no error."""
    for name in FOLDERS:
        link = ROOT / "src" / "rolltune" / name
        assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve() == ROOT / name


def test_wheel_holds_every_file_and_nothing_at_the_top(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"rolltune", "rolltune-0.1.0.dist-info"}
    for folder in (*FOLDERS, "src/rolltune"):
        for suffix in ("py", "yaml", "jsonl", "jinja", "md", "typed", "js", "css", "uplot"):
            for path in (ROOT / folder).rglob(f"*.{suffix}"):
                inside = (
                    path.relative_to(ROOT / "src")
                    if folder.startswith("src")
                    else Path("rolltune") / path.relative_to(ROOT)
                )
                assert inside.as_posix() in names


def test_installed_package_imports(environment: Path, tmp_path: Path):
    code = (
        "import rolltune, rolltune.data.sums, rolltune.rewards.answer, rolltune.losses.grpo, rolltune.samplers.native\n"
        "print(rolltune.__file__, rolltune.rewards.answer.__file__)"
    )
    for file in run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(site_packages(environment))


def test_installed_tune_finds_recipes_and_configs(environment: Path, tmp_path: Path):
    for name in ("tune", "rolltune"):
        listed = run(environment / "bin" / name, "ls", cwd=tmp_path).split()
        for path in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "configs").glob("*.yaml")]:
            assert path.stem in listed
    assert run(environment / "bin" / "tune", "cat", "quickstart", cwd=tmp_path).startswith("# tune run grpo")
    run(environment / "bin" / "tune", "cp", "grpo", ".", cwd=tmp_path)
    assert (tmp_path / "grpo.py").read_bytes() == (ROOT / "recipes" / "grpo.py").read_bytes()
    valid = run(environment / "bin" / "tune", "validate", "quickstart_sft", cwd=tmp_path)
    assert valid == "quickstart_sft: a valid config of sft\n"


def test_installed_tune_writes_a_report(environment: Path, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "loss": 1.5}\n')
    assert run(environment / "bin" / "tune", "report", ".", cwd=tmp_path) == "report.html\n"
    assert "uPlot" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_is_a_top_level_module(environment: Path, tmp_path: Path, name: str):
    code = f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec and spec.origin)"
    found = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).strip()
    theirs = Path(sysconfig.get_path("purelib")) / "recipes" / "__init__.py"  # torchtune's wheel brings that one
    assert found == (str(theirs) if name == "recipes" else "None")
