"""The sample files of the models under evaluation.

    <output_dir>/samples/<name>.jsonl             a line with the settings, then one line for each problem
    <output_dir>/samples/<name>.parts/0001.jsonl  the same format, written by rank 1 until all ranks are done

Samples are taken once and verified as often as needed: another answer checker reads these files and loads no weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rolltune.errors import ConfigError
from rolltune.files import json_line, write_text_atomic

WEIGHTS_KEY = "weights"  # the setting that holds the fingerprint of the model's weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """The part of a completion that verification needs.

    Attributes:
        text: the whole assistant message, including a prefill.
        tokens: number of sampled tokens.
        finish_reason: "stop" or "length".
    """

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSamples:
    """One model's responses to one problem.

    Attributes:
        problem: id of the problem.
        prompt: :func:`rolltune.eval.sampling.prompt_digest` of the prompt.
        greedy: the greedy response.
        samples: the sampled responses, in the order of their seeds.
    """

    problem: str
    prompt: str
    greedy: Response
    samples: tuple[Response, ...]


class SampleCache:
    """The sample files of one model.

    Args:
        folder: ``<output_dir>/samples``, created by the first write.
        name: name of the model.
        settings: everything the samples depend on except the prompts, as config key to value (see
            :func:`rolltune.eval.sampling.sampling_settings`). Files written with other settings are refused.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}.jsonl"
        self._parts = folder / f"{name}.parts"
        self._name = name
        self._settings = dict(settings)

    def read(self) -> dict[str, ProblemSamples]:
        """Read all files, by problem id. A last line without its newline was cut by a kill and is ignored.

        Raises:
            ConfigError: the files were written with other settings.
            ValueError: a line is not a record of samples.
        """
        found: dict[str, ProblemSamples] = {}
        for path in self._files():
            # Not splitlines(): it also splits at characters that a response may contain.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                try:
                    if number == 1:
                        settings = dict(json.loads(line)["settings"])
                    else:
                        samples = _parse_samples(json.loads(line))
                        found[samples.problem] = samples
                except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path}:{number}: not a record of samples ({type(error).__name__}: {error}); remove the file "
                        "to sample again"
                    ) from None
                if number == 1:
                    self._check_settings(settings, path)
        return found

    def append(self, samples: Sequence[ProblemSamples], *, rank: int) -> None:
        """Add the records of a block to this rank's file. They are on disk when this returns."""
        path = self._parts / f"{rank:04d}.jsonl" if rank else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _drop_cut_line(file)
            header = [] if file.tell() else [{"settings": self._settings}]
            file.write("".join(map(json_line, [*header, *map(asdict, samples)])).encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())

    def merge(self, order: Sequence[str]) -> None:
        """Merge the ranks' files into one, with problems in the given order; problems not in ``order`` come last."""
        found = self.read()
        ordered = [found.pop(problem) for problem in order if problem in found] + list(found.values())
        text = "".join(map(json_line, [{"settings": self._settings}, *map(asdict, ordered)]))
        if not self.path.exists() or self.path.read_bytes() != text.encode("utf-8", "backslashreplace"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.path, text)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [path for path in (self.path, *sorted(self._parts.glob("*.jsonl"))) if path.is_file()]

    def _check_settings(self, before: Mapping[str, Any], path: Path) -> None:
        now = json.loads(json.dumps(self._settings))
        advice = "choose another output_dir or remove that file"
        problems = [
            f"models: {path} was sampled with other weights of {self._name}; {advice}"
            if key == WEIGHTS_KEY
            else f"{key}: {now.get(key)}: {path} was sampled with {before.get(key)}; {advice}"
            for key in dict.fromkeys([*now, *before])
            if now.get(key) != before.get(key)
        ]
        if problems:
            raise ConfigError(problems)


def _drop_cut_line(file: BinaryIO) -> None:
    """Truncate a file, open for reading and appending, after its last newline: a kill cut the line that follows."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        size = file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(size)


def _parse_samples(record: Any) -> ProblemSamples:
    return ProblemSamples(
        problem=_string(record["problem"]),
        prompt=_string(record["prompt"]),
        greedy=_parse_response(record["greedy"]),
        samples=tuple(map(_parse_response, record["samples"])),
    )


def _parse_response(record: Any) -> Response:
    if record["finish_reason"] not in ("stop", "length") or not isinstance(record["tokens"], int):
        raise ValueError(f"finish_reason {record['finish_reason']!r}, tokens {record['tokens']!r}")
    return Response(text=_string(record["text"]), tokens=record["tokens"], finish_reason=record["finish_reason"])


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value
