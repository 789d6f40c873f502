"""``tune`` (and ``rolltune``, the same command): rolltune's recipes and configs, beside torchtune's CLI.

What concerns our own recipes and configs is done here, without importing torch where that can be helped.
``tune download`` and the recipes that torchtune brings are handed to torchtune; no other file touches its private CLI.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import runpy
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rolltune

USER_MISTAKE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
PACKAGE = Path(rolltune.__file__).parent

RUN_HELP = """\
usage: tune run [TORCHRUN OPTIONS] <recipe> --config <config> [--dry-run] [key=value ...]

  <recipe>           a recipe's name (tune ls), or a file of your own: ./grpo.py
  --config <config>  a config's name with or without .yaml, or a file of your own, which wins over a bundled config
                     of the same name
  --dry-run          check everything, load no weights
  key=value          set a config key: optimizer.lr=1e-5 loss=rolltune.losses.dapo.DAPOLoss
  ~key               leave a key out

examples:
  tune run grpo --config quickstart
  tune run grpo --config my.yaml num_steps=10 --dry-run
  tune run --nproc_per_node 2 grpo --config my.yaml   (torchrun's options: torchrun --help)
  tune run grpo --help                                the keys of a recipe's config
"""


class UsageError(Exception):
    """A command that cannot be carried out; the message is for the user."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    path: Path
    ours: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """A bundled config; ``recipe`` is the name of the recipe that it is for."""

    name: str
    path: Path
    recipe: str | None
    ours: bool = True


# --- the catalog ------------------------------------------------------------------------------------------------------


def recipes() -> list[Recipe]:
    return [Recipe(name=path.stem, path=path.resolve()) for path in sorted((PACKAGE / "recipes").glob("*.py"))]


def configs() -> list[Config]:
    paths = sorted((PACKAGE / "configs").glob("*.yaml"))
    return [Config(name=path.stem, path=path.resolve(), recipe=recipe_of(path)) for path in paths]


def torchtune_catalog() -> tuple[list[Recipe], list[Config]]:
    """torchtune's own recipes and configs, from its registry file alone: importing torchtune takes seconds."""
    spec = importlib.util.find_spec("torchtune")
    if spec is None or not spec.submodule_search_locations:
        return [], []
    package = Path(next(iter(spec.submodule_search_locations)))
    folder = package.parent / "recipes"
    registry = runpy.run_path(str(package / "_recipe_registry.py"))["_ALL_RECIPES"]
    theirs = [Recipe(name=recipe.name, path=folder / recipe.file_path, ours=False) for recipe in registry]
    their_configs = [
        Config(name=config.name, path=folder / "configs" / config.file_path, recipe=recipe.name, ours=False)
        for recipe in registry
        for config in recipe.configs
    ]
    return theirs, their_configs


def _comments(path: Path) -> list[str]:
    """The comment lines that a YAML file opens with."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())
    return lines


def recipe_of(path: Path) -> str | None:
    """The recipe in the command that a config opens with: ``# tune run grpo --config quickstart.yaml``."""
    for line in _comments(path):
        words = line.split()
        if words[:2] == ["tune", "run"] and "--config" in words[3:]:
            return Path(words[words.index("--config") - 1]).stem
    return None


def summary_of(path: Path) -> str:
    """The first sentence about a recipe or config: of its docstring, or of the comments below its command."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return text.partition("\n\n")[0].replace("\n", " ")
    text = " ".join(line for line in _comments(path) if not line.startswith("tune run")).strip()
    return re.split(r"(?<=\w{3}[.!])\s", text, maxsplit=1)[0]


def schema_of(recipe: Path) -> type | None:
    """The config dataclass that a recipe file gives to ``config.main``, if it is one of
    :mod:`rolltune.config.schema`."""
    from rolltune.config import schema

    for node in ast.walk(ast.parse(recipe.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found = getattr(schema, node.args[0].id, None)
            if called == "main" and isinstance(found, type):
                return found
    return None


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or a Python file."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return Recipe(name=path.stem, path=path.resolve(), ours=path.resolve() in [r.path for r in recipes()])
    known = [*recipes(), *torchtune_catalog()[0]]
    for recipe in known:
        if name in (recipe.name, f"{recipe.name}.py"):
            return recipe
    if path.suffix == ".py" and os.sep in name:
        raise UsageError(f"no recipe file {name}")
    files = [file.name for file in Path().glob("*.py")]
    ours = [recipe.name for recipe in recipes()]
    raise UsageError(f"no recipe {name}{_did_you_mean(name, [*ours, *files, *_names(known)])} (tune ls lists them)")


def find_config(name: str, recipe: Recipe | None = None) -> Config:
    """A local file, or a bundled config by name, with or without .yaml."""
    path = Path(name)
    if path.is_file():
        return Config(name=path.stem, path=path.absolute(), recipe=recipe_of(path))
    known = configs() if recipe else [*configs(), *torchtune_catalog()[1]]
    for config in known:
        if name.removesuffix(".yaml") == config.name:
            return config
    if path.suffix in (".yaml", ".yml") and os.sep in name:
        raise UsageError(f"no config file {name}{_did_you_mean(path.stem, _names(configs()))}")
    files = [file.name for file in Path().glob("*.yaml")]
    raise UsageError(
        f"no config {name}, nor a file of that name{_did_you_mean(name, [*_names(configs()), *files, *_names(known)])} "
        "(tune ls lists them)"
    )


def _names(entries: Iterable[Recipe | Config]) -> list[str]:
    return [entry.name for entry in entries]


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    from rolltune.config.components import did_you_mean

    return did_you_mean(name, names)


# --- ls, cat, cp, validate --------------------------------------------------------------------------------------------


def list_recipes(args: argparse.Namespace) -> None:
    rows = [("RECIPE", "CONFIG", "")]
    bundled = configs()
    for recipe in recipes():
        rows.append((recipe.name, "", summary_of(recipe.path)))
        rows += [("", config.name, summary_of(config.path)) for config in bundled if config.recipe == recipe.name]
    if args.all:
        theirs, their_configs = torchtune_catalog()
        for recipe in theirs:
            names = [config.name for config in their_configs if config.recipe == recipe.name] or ["<>"]
            rows += [(recipe.name if i == 0 else "", name, "") for i, name in enumerate(names)]
    left, middle = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    room = max(shutil.get_terminal_size((120, 24)).columns - left - middle, 20)
    for recipe, config, summary in rows:
        short = textwrap.shorten(summary, room, placeholder=" ...")
        print(f"{recipe:<{left}}{config:<{middle}}{short}".rstrip())
    if not args.all:
        print("\nRun one:  tune run <recipe> --config <config>     torchtune's own: tune ls --all")


def print_config(args: argparse.Namespace) -> None:
    if args.config in _names(recipes()) and args.config not in _names(configs()):
        raise UsageError(f"{args.config} is a recipe, not a config; its configs: {_configs_of(args.config)}")
    config = find_config(args.config)
    if args.sort:
        _torchtune(["cat", str(config.path), "--sort"])
    else:
        print(config.path.read_text(encoding="utf-8"), end="")


def _configs_of(recipe: str) -> str:
    return ", ".join(config.name for config in configs() if config.recipe == recipe) or "none is bundled"


def copy(args: argparse.Namespace) -> None:
    source = _find_bundled(args.file)
    target: Path = args.destination
    if target.is_dir():
        target = target / source.name
    elif target.suffix != source.suffix:
        target = target.with_name(f"{target.name}{source.suffix}")
    if args.make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not target.parent.is_dir():
        raise UsageError(f"no folder {target.parent} (--make-parents creates it)")
    if target.exists() and args.no_clobber:
        print(f"{target} is there already, and stays")
        return
    shutil.copyfile(source, target)
    print(f"copied to {target}")


def _find_bundled(name: str) -> Path:
    """The path of a bundled recipe or config: ``grpo``, ``grpo.py``, ``quickstart``, ``quickstart.yaml``."""
    theirs, their_configs = torchtune_catalog()
    known = [*recipes(), *configs(), *theirs, *their_configs]
    for entry in known:
        if name in (entry.name, f"{entry.name}{entry.path.suffix}"):
            return entry.path
    raise UsageError(f"no recipe or config {name}{_did_you_mean(name, _names(known))} (tune ls lists them)")


def validate(args: argparse.Namespace) -> int:
    recipe = find_recipe(args.recipe) if args.recipe else None
    config = find_config(args.config, recipe)
    if not config.ours:
        _torchtune(["validate", str(config.path)])
        return 0
    if recipe is None and config.recipe is None:
        raise UsageError(
            f"{args.config} does not say which recipe it is for; open it with `# tune run <recipe> --config "
            f"{config.path.name}`, or give --recipe"
        )
    recipe = recipe or find_recipe(config.recipe or "")
    schema = schema_of(recipe.path)
    if schema is None:
        raise UsageError(
            f"{recipe.path}: its config is of none of rolltune.config.schema's classes; check it with --dry-run"
        )
    _check_belongs(recipe, config)
    if not _is_valid(schema, ["--config", str(config.path), *args.overrides], title=args.config):
        return USER_MISTAKE
    print(f"{args.config}: a valid config of {recipe.name}")
    return 0


def _is_valid(schema: type, arguments: Sequence[str], *, title: str, world_size: int | None = None) -> bool:
    from rolltune import config
    from rolltune.run import checks

    try:
        parsed = config.parse_args(arguments)
        checks.validate(schema, parsed.config or "", parsed.overrides, world_size=world_size)
    except config.ConfigError as error:
        print(config.format_mistakes(error, title), file=sys.stderr)
        return False
    return True


# --- run --------------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """``tune run``: in this process, or through torchrun where any of its options stands before the recipe."""
    if not argv or argv[0] in ("-h", "--help"):
        print(RUN_HELP, end="")
        return 0 if argv else USER_MISTAKE
    launch = _parse_torchrun(argv) if argv[0].startswith("-") else None
    name, *arguments = [launch.training_script, *launch.training_script_args] if launch else argv
    recipe = find_recipe(name)
    if not recipe.ours and recipe in torchtune_catalog()[0]:
        _torchtune(["run", *argv])
        return 0
    schema = schema_of(recipe.path)
    if schema is not None and {"-h", "--help"} & set(arguments):
        from rolltune.config import explain

        print(f"{recipe.name}: {summary_of(recipe.path)}\n\n{explain(schema)}")
        return 0
    arguments = _with_config_path(arguments, recipe, is_required=schema is not None)
    if launch is None:
        return _run_here(recipe, arguments)
    local, world_size = _count_processes(launch)
    # torchrun would set 1 and print a banner about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // local, 1)))
    if schema is not None and not _is_valid(schema, arguments, title=recipe.name, world_size=world_size):
        return USER_MISTAKE
    return _run_torchrun(launch, recipe, arguments)


def _with_config_path(arguments: Sequence[str], recipe: Recipe, *, is_required: bool) -> list[str]:
    """The arguments with an absolute path behind ``--config``."""
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag != "--config":
            continue
        name = name if equals else arguments[i + 1] if i + 1 < len(arguments) else ""
        if not name or (not equals and name.startswith("--")):
            raise UsageError(f"--config has no value; configs of {recipe.name}: {_configs_of(recipe.name)}")
        config = find_config(name, recipe)
        _check_belongs(recipe, config)
        return [*arguments[:i], "--config", str(config.path), *arguments[i + (1 if equals else 2) :]]
    if is_required:
        raise UsageError(f"--config is missing; configs of {recipe.name}: {_configs_of(recipe.name)}")
    return arguments


def _check_belongs(recipe: Recipe, config: Config) -> None:
    """Refuse a config that opens with the command of another of our recipes: every key of it would look wrong."""
    if recipe.ours and config.recipe != recipe.name and config.recipe in _names(recipes()):
        raise UsageError(
            f"{config.name} is a config of {config.recipe}, as its first line says; "
            f"configs of {recipe.name}: {_configs_of(recipe.name)}"
        )


def _run_here(recipe: Recipe, arguments: Sequence[str]) -> int:
    sys.argv = [str(recipe.path), *arguments]
    if not recipe.ours:  # as in `python recipe.py`: modules beside a user's recipe can be imported
        sys.path.insert(0, str(recipe.path.parent))
    runpy.run_path(str(recipe.path), run_name="__main__")
    return 0


def _parse_torchrun(argv: Sequence[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()

    def error(message: str) -> None:
        raise UsageError(f"{message} (torchrun's options come first, then the recipe: tune run --help)")

    parser.error = error  # pyright: ignore[reportAttributeAccessIssue]
    return parser.parse_args(list(argv))


def _count_processes(launch: argparse.Namespace) -> tuple[int, int]:
    """Processes on this node, and on all of them (the most there can be)."""
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        local = determine_local_world_size(launch.nproc_per_node)
        return local, local * parse_min_max_nnodes(launch.nnodes)[1]
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def _run_torchrun(launch: argparse.Namespace, recipe: Recipe, arguments: Sequence[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch.training_script = str(recipe.path)
    launch.training_script_args = list(arguments)
    try:
        torchrun.run(launch)
    except ChildFailedError as error:  # the process has printed its own error
        rank, failure = error.get_first_failure()
        print(f"tune run: process {rank} failed with exit code {failure.exitcode}; its error is above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


# --- torchtune --------------------------------------------------------------------------------------------------------


def _torchtune(argv: Sequence[str]) -> None:
    """Hand a command to torchtune's own CLI."""
    from rolltune.config import components as _silences_torchao  # noqa: F401  torchao warns while torchtune imports it

    sys.argv = ["tune", *argv]
    from torchtune._cli.tune import main as torchtune_main

    torchtune_main()


# --- main -------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune",
        description=f"rolltune {rolltune.__version__}: RL post-training recipes for language models.",
        epilog="examples: tune run grpo --config quickstart    tune cp quickstart my.yaml    tune run grpo --help",
    )
    parser.add_argument("--version", action="version", version=f"rolltune {rolltune.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int | None] | None, text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    add("run", None, "Run a recipe; all of torchrun's options may come before its name.")
    ls = add("ls", list_recipes, "List recipes and their configs.")
    ls.add_argument("--all", action="store_true", help="torchtune's own, too")
    cp = add("cp", copy, "Copy a recipe or config, to change it.")
    cp.add_argument("file", help="a name that `tune ls` shows")
    cp.add_argument("destination", type=Path, help="a folder or a file")
    cp.add_argument("-n", "--no-clobber", action="store_true", help="leave a file that is there already")
    cp.add_argument("--make-parents", action="store_true", help="create the folders of the destination")
    cat = add("cat", print_config, "Print a config.")
    cat.add_argument("config", help="a name that `tune ls` shows, or a file")
    cat.add_argument("--sort", action="store_true", help="keys in order, without comments")
    check = add("validate", validate, "Check a config: keys, types, components and their arguments, values.")
    check.add_argument("config", help="a name that `tune ls` shows, or a file")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="as with `tune run`")
    check.add_argument("--recipe", help="the recipe it is for, where its first line does not say so")
    add("download", None, "Download a model from the Hugging Face Hub or Kaggle (torchtune's command).")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status; a recipe that exits by itself passes its own through."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    try:
        if command == "run":
            return run(argv[1:])
        if command == "download":
            _torchtune(argv)
            return 0
        parser = _parser()
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(argv)
        return args.command(args) or 0
    except UsageError as error:
        print(f"tune {command}: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `tune cat ... | head`: nobody reads on, and what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
