"""``tune run``: a recipe in this process or under torchrun, or one of torchtune's."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rolltune.cli.catalog import (
    Recipe,
    UsageError,
    check_belongs,
    configs_of,
    find_config,
    find_recipe,
    schema_of,
    summary_of,
    torchtune_catalog,
)

USER_MISTAKE = 2
STUCK_SECONDS = 45  # torchrun gives its processes 30 seconds to end
HELP = """\
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


def run(argv: Sequence[str]) -> int:
    """Run a recipe in this process, or under torchrun if any of torchrun's options come before the recipe.

    Returns:
        The exit status.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else USER_MISTAKE
    launch = _parse_torchrun(argv) if argv[0].startswith("-") else None
    name, *arguments = [launch.training_script, *launch.training_script_args] if launch else argv
    recipe = find_recipe(name)
    if not recipe.ours and recipe in torchtune_catalog()[0]:
        run_torchtune(["run", *argv])
        return 0
    schema = schema_of(recipe.path)
    if schema is not None and {"-h", "--help"} & set(arguments):
        from rolltune.config import explain

        print(f"{recipe.name}: {summary_of(recipe.path)}\n\n{explain(schema)}")
        return 0
    if schema is not None:
        _check_options(arguments, name)
    arguments = _with_config_path(arguments, recipe, is_required=schema is not None)
    if launch is None:
        return _run_here(recipe, arguments)
    local, world_size = _count_processes(launch)
    _prepare_restarts(launch)
    # Without this torchrun would set 1 and print a banner.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // local, 1)))
    if schema is not None and not is_valid(schema, arguments, title=recipe.name, world_size=world_size):
        return USER_MISTAKE
    return _run_torchrun(launch, recipe, arguments)


def is_valid(schema: type, arguments: Sequence[str], *, title: str, world_size: int | None = None) -> bool:
    """Check a config and print its mistakes to stderr.

    Args:
        schema: the config's dataclass.
        arguments: as a recipe gets them: ``--config``, a path, overrides.
        title: what the printed mistakes are of.
        world_size: number of processes that are about to start; None: nothing is started.
    """
    from rolltune import config
    from rolltune.run import checks, lifecycle

    try:
        parsed = config.parse_args(arguments)
        checked = checks.validate(schema, parsed.config or "", parsed.overrides, world_size=world_size)
        if world_size is not None and isinstance(checked, lifecycle.Resumable) and not checked.dry_run:
            lifecycle.check_is_new(checked)
    except config.ConfigError as error:
        print(config.format_mistakes(error, title), file=sys.stderr)
        return False
    return True


def run_torchtune(argv: Sequence[str]) -> None:
    """Hand a command to torchtune's own command line, which is private. No other code uses it."""
    sys.argv = ["tune", *argv]
    try:
        from torchtune._cli.tune import main
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f'torchtune cannot be imported ({reason}); it needs `pip install "torchao<0.16" "peft<0.19"`'
        ) from None
    main()


def _check_options(arguments: Sequence[str], recipe: str) -> None:
    """Refuse options of torchrun behind the recipe's name."""
    flags = [argument.partition("=")[0] for argument in arguments if re.match("-[-a-zA-Z]", argument)]
    unknown = [flag for flag in flags if flag not in ("--config", "--dry-run", "--help", "-h")]
    if not unknown:
        return
    from torch.distributed.run import get_args_parser

    options = get_args_parser()._option_string_actions
    for flag in unknown:
        if flag in options:
            raise UsageError(
                f"{flag} belongs to torchrun, whose options come before the recipe: "
                f"tune run {flag} ... {recipe} --config ..."
            )


def _with_config_path(arguments: Sequence[str], recipe: Recipe, *, is_required: bool) -> list[str]:
    """Replace the value of ``--config`` by an absolute path."""
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag != "--config":
            continue
        name = name if equals else arguments[i + 1] if i + 1 < len(arguments) else ""
        if not name or (not equals and name.startswith("--")):
            raise UsageError(f"--config has no value; configs of {recipe.name}: {configs_of(recipe.name)}")
        config = find_config(name, recipe)
        check_belongs(recipe, config)
        return [*arguments[:i], "--config", str(config.path), *arguments[i + (1 if equals else 2) :]]
    if is_required:
        raise UsageError(f"--config is missing; configs of {recipe.name}: {configs_of(recipe.name)}")
    return arguments


def _run_here(recipe: Recipe, arguments: Sequence[str]) -> int:
    sys.argv = [str(recipe.path), *arguments]
    if not recipe.ours:  # like `python recipe.py`, which can import the modules beside it
        sys.path.insert(0, str(recipe.path.parent))
    runpy.run_path(str(recipe.path), run_name="__main__")
    return 0


# --- torchrun ---------------------------------------------------------------------------------------------------------


def _parse_torchrun(argv: Sequence[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()

    def error(message: str) -> None:
        raise UsageError(f"{message} (torchrun's options come first, then the recipe: tune run --help)")

    parser.error = error  # pyright: ignore[reportAttributeAccessIssue]
    return parser.parse_args(list(argv))


def _count_processes(launch: argparse.Namespace) -> tuple[int, int]:
    """Return the number of processes on this node and the largest number on all nodes."""
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        local = determine_local_world_size(launch.nproc_per_node)
        return local, local * parse_min_max_nnodes(launch.nnodes)[1]
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def _prepare_restarts(launch: argparse.Namespace) -> None:
    """Give each start of the processes a store of its own, if torchrun may start them again.

    By default all starts share one, where processes find the addresses of those that have ended, and torchrun does not
    tell a machine that joins later where the store is.
    """
    from torch.distributed.run import parse_min_max_nnodes

    fewest, most = parse_min_max_nnodes(launch.nnodes)
    if not launch.max_restarts and fewest == most:
        return
    if launch.rdzv_backend == "static" and most > 1:
        raise UsageError(
            f"--max_restarts {launch.max_restarts}, --nnodes {launch.nnodes}: restarts on several machines need "
            "--rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        )
    launch.standalone = launch.standalone or launch.rdzv_backend == "static"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def _describe_exit(code: int) -> str:
    """Describe how a process ended; a negative code is the signal that killed it."""
    if code >= 0:
        return f"failed with exit code {code}; its error is above"
    hint = "; the kernel does this when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}){hint}"


def _end_if_stuck(meeting_point: str) -> None:
    """End this process if torchrun does not take notice of a process of its own that has ended (Linux only).

    It asks the machine that the rendezvous is on without a time limit. If that machine or the link to it is gone,
    torchrun hears neither its own processes nor signals.
    """
    looks = 0
    while looks < STUCK_SECONDS:
        time.sleep(1.0)
        looks = looks + 1 if _has_ended_child() else 0
    print(f"tune run: torchrun is stuck, as {meeting_point} does not answer; ended", file=sys.stderr, flush=True)
    os._exit(1)


def _has_ended_child() -> bool:
    """Whether a child of this process has ended without being waited for."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                    return True
    return False


def _run_torchrun(launch: argparse.Namespace, recipe: Recipe, arguments: Sequence[str]) -> int:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    meeting_point = launch.rdzv_endpoint or launch.master_addr
    threading.Thread(target=_end_if_stuck, args=(meeting_point,), daemon=True).start()
    launch.training_script = str(recipe.path)
    launch.training_script_args = list(arguments)
    try:
        torchrun.run(launch)
    except ChildFailedError as error:  # the process has printed its own error
        rank, failure = error.get_first_failure()
        print(f"tune run: process {rank} {_describe_exit(failure.exitcode)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except (DistError, RendezvousError) as error:
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        print(f"tune run: the machines did not meet at {meeting_point}: {reason}", file=sys.stderr)
        return 1
    return 0
