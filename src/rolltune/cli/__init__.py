"""``tune`` (and ``rolltune``, the same command): list, copy, check and run recipes and configs, and look at runs.

torchtune's recipes and configs are listed beside rolltune's, and its recipes are run by its own command line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import rolltune
from rolltune.cli import catalog, reports
from rolltune.cli.catalog import UsageError
from rolltune.cli.launch import USER_MISTAKE, is_valid, run, run_torchtune
from rolltune.files import home_path
from rolltune.terminal import printable

INTERRUPTED = 130
BROKEN_PIPE = 141


def list_recipes(args: argparse.Namespace) -> None:
    rows = [("RECIPE", "CONFIG", "")]
    bundled = catalog.configs()
    for recipe in catalog.recipes():
        rows.append((recipe.name, "", catalog.summary_of(recipe.path)))
        rows += [("", c.name, catalog.summary_of(c.path)) for c in bundled if c.recipe == recipe.name]
    if args.all:
        theirs, their_configs = catalog.torchtune_catalog()
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
    if args.config in catalog.names(catalog.recipes()) and args.config not in catalog.names(catalog.configs()):
        raise UsageError(f"{args.config} is a recipe, not a config; its configs: {catalog.configs_of(args.config)}")
    text = catalog.find_config(args.config).path.read_text(encoding="utf-8")
    if args.sort:
        import yaml

        text = yaml.safe_dump(yaml.safe_load(text), sort_keys=True, allow_unicode=True)
    print(text, end="")


def copy(args: argparse.Namespace) -> None:
    source = catalog.find_bundled(args.file)
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
        print(f"{target} exists and was left as it is")
        return
    shutil.copyfile(source, target)
    print(f"copied to {target}")


def validate(args: argparse.Namespace) -> int:
    recipe = catalog.find_recipe(args.recipe) if args.recipe else None
    config = catalog.find_config(args.config, recipe)
    if not config.ours:
        run_torchtune(["validate", str(config.path)])
        return 0
    if recipe is None and config.recipe is None:
        raise UsageError(
            f"{args.config} does not say which recipe it is for; open it with `# tune run <recipe> --config "
            f"{config.path.name}`, or give --recipe"
        )
    recipe = recipe or catalog.find_recipe(config.recipe or "")
    schema = catalog.schema_of(recipe.path)
    if schema is None:
        raise UsageError(
            f"{recipe.path}: uses no config class of rolltune.config.schema; check the config by --dry-run"
        )
    catalog.check_belongs(recipe, config)
    if not is_valid(schema, ["--config", str(config.path), *args.overrides], title=args.config):
        return USER_MISTAKE
    print(f"{args.config}: a valid config of {recipe.name}")
    return 0


def download(args: argparse.Namespace) -> None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(args.repo, local_dir=args.output_dir, ignore_patterns=args.ignore_patterns)
    except (OSError, ValueError) as error:  # no such repository, no access, no network, not a name
        raise UsageError(f"{args.repo}: {error}") from error
    print(f"downloaded to {folder}")


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
    ls.add_argument("--all", action="store_true", help="list torchtune's as well")
    cp = add("cp", copy, "Copy a recipe or config, to change it.")
    cp.add_argument("file", help="a name that `tune ls` shows")
    cp.add_argument("destination", type=home_path, help="a folder or a file")
    cp.add_argument("-n", "--no-clobber", action="store_true", help="do not overwrite a file")
    cp.add_argument("--make-parents", action="store_true", help="create the folders of the destination")
    cat = add("cat", print_config, "Print a config.")
    cat.add_argument("config", help="a name that `tune ls` shows, or a file")
    cat.add_argument("--sort", action="store_true", help="sort the keys and drop the comments")
    check = add("validate", validate, "Check a config: keys, types, components and their arguments, values.")
    check.add_argument("config", help="a name that `tune ls` shows, or a file")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="as with `tune run`")
    check.add_argument("--recipe", help="the recipe that the config is for, if its first line does not say so")
    reports.add_arguments(
        add("report", reports.report, "Write a run or an evaluation as an HTML page, or a page that compares runs."),
        add(
            "watch",
            reports.watch,
            "Serve a run's page on this machine while the run goes on, with a button to stop it.",
        ),
    )
    get = add("download", download, "Download a model from the Hugging Face Hub.")
    get.add_argument("repo", metavar="org/name", help="the Hub id; for a gated model log in first: hf auth login")
    get.add_argument(
        "--output-dir",
        type=home_path,
        help="a folder; without it Hugging Face's cache, which model.path=org/name reads",
    )
    get.add_argument("--ignore-patterns", nargs="*", metavar="PATTERN", help="files to leave out: 'original/*'")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. A recipe that exits by itself passes its own status through."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    try:
        if command == "run":
            return run(argv[1:])
        parser = _parser()
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(argv)
        return args.command(args) or 0
    except UsageError as error:
        print(f"tune {command}: {printable(str(error))}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader is gone, as with `tune cat ... | head`: drop what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
