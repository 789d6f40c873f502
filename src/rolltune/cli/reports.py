"""``tune report`` and ``tune watch``: runs and evaluations as a page to look at."""

from __future__ import annotations

import argparse

from rolltune.cli.catalog import UsageError
from rolltune.errors import os_error_text
from rolltune.files import home_path


def add_arguments(report: argparse.ArgumentParser, watch: argparse.ArgumentParser) -> None:
    report.add_argument(
        "folders", nargs="+", metavar="FOLDER", type=home_path, help="output_dir of a run or evaluation"
    )
    report.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=home_path,
        help="the page; without it report.html in the folder, or in this folder if there are several",
    )
    watch.add_argument("folder", metavar="FOLDER", type=home_path, help="output_dir of a run or evaluation")
    watch.add_argument(
        "--host", default="127.0.0.1", help="name or address of this machine to listen on, as the browser has it"
    )
    watch.add_argument("--port", type=int, default=0, help="port (0: a free one)")


def report(args: argparse.Namespace) -> None:
    from rolltune.report import write_report

    try:
        print(write_report(args.folders, args.output))
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{os_error_text(error)}; --output FILE writes the page to another place") from None


def watch(args: argparse.Namespace) -> None:
    from rolltune.report.serve import WatchServer

    try:
        server = WatchServer(args.folder, host=args.host, port=args.port)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except (OSError, OverflowError) as error:
        raise UsageError(f"{args.host}, port {args.port}: {error}; give another --host or --port") from None
    print(f"{args.folder}: {server.url}\nCtrl-C ends the page; the run goes on.", flush=True)
    with server:
        server.serve_forever()
