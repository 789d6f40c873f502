"""Checks that several recipes share.

torch, transformers and whatever imports them are imported in the functions that need them: the configs of the other
recipes are checked in a moment.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import string
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rolltune.config.components import check_component, instantiate, is_node, locate
from rolltune.config.schema import Component, EvaluateSamplingConfig, PromptConfig, SamplingConfig
from rolltune.config.values import type_problem
from rolltune.errors import ConfigError

T = TypeVar("T")


def at_least(key: str, value: float, lowest: int) -> Iterable[str]:
    return [] if value >= lowest else [f"{key}: {value}; must be >= {lowest}"]


def above(key: str, value: float, bound: float) -> Iterable[str]:
    return [] if value > bound else [f"{key}: {value}; must be > {bound}"]


# --- components -------------------------------------------------------------------------------------------------------


def build_component(node: Component, key: str, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """Check a component, and call it with ``args``, its own arguments and ``kwargs`` as the recipe would.

    Returns:
        The object and no problems, or None and the problems.
    """
    problems = check_component(node, key, positional=len(args), passed=tuple(kwargs))
    problems = problems or [
        problem
        for place, inner in _nodes_inside(node, key)
        if component_class(inner) is not None
        for problem in build_component(inner, place)[1]
    ]
    if problems:
        return None, problems
    try:
        return instantiate(node, *args, **kwargs), []
    except ConfigError as error:
        return None, [f"{key}: {problem}".replace(f": {node['_component_']}: ", ".", 1) for problem in error.problems]


def _nodes_inside(node: Component, key: str) -> Iterator[tuple[str, Component]]:
    """The nodes among a component's arguments, with their keys."""
    for name, value in node.items():
        if is_node(value):
            yield f"{key}.{name}", value
        elif isinstance(value, list):
            yield from ((f"{key}.{name}[{i}]", item) for i, item in enumerate(value) if is_node(item))


def build_instance(node: Component, key: str, kind: type[T]) -> tuple[T | None, list[str]]:
    """As :func:`build_component`, of a component that must be a ``kind``."""
    built, problems = build_component(node, key)
    if not problems and not isinstance(built, kind):
        return None, [not_a(node, key, f"a {kind.__module__}.{kind.__name__}")]
    return built, problems


def check_members(node: Component, key: str, protocol: str, members: Sequence[str]) -> list[str]:
    """Build a component, which must have the members of a protocol."""
    built, problems = build_component(node, key)
    if not problems and not all(hasattr(built, name) for name in members):
        problems = [not_a(node, key, f"a {protocol}, which has {' and '.join(members)}")]
    return problems


def not_a(node: Component, key: str, wanted: str) -> str:
    return f"{key}._component_: {node['_component_']}; must be {wanted}"


def component_class(node: Component) -> type | None:
    """The class that a node names; None for a function or a wrong path."""
    try:
        found = locate(node.get("_component_", ""))
    except ValueError:
        return None
    return found if inspect.isclass(found) else None


def check_reward(node: Component, key: str) -> list[str]:
    """Check a function that is called with (problem, text), or a class whose object is."""
    if component_class(node) is None:
        return check_component(node, key, positional=2, reserved=("completion",), ignore=("weight",))
    built, problems = build_component({name: value for name, value in node.items() if name != "weight"}, key)
    if not problems and not callable(built):
        problems = [not_a(node, key, "a reward, which is called with (problem, text)")]
    return problems


def check_rewards(rewards: dict[str, Component]) -> Iterator[str]:
    if not rewards:
        yield "rewards: none; give at least one reward"
    for name, node in rewards.items():
        key = f"rewards.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            yield f"{key}: a reward's name is part of metric names; use letters, digits, - and _"
        yield from check_reward(node, key)
        weight = node.get("weight", 1.0)
        wrong = type_problem(weight, float)
        if wrong or not math.isfinite(weight):
            yield f"{key}.weight: {wrong or f'{weight}; must be finite'}"


def check_verifier(node: Component, key: str) -> Iterator[str]:
    """Check a reward that sees the problem and the response's text, but no completion."""
    for problem in check_component(node, key, positional=2):
        if problem.startswith(f"{key}.completion: missing"):
            problem = not_a(node, key, "a reward without the argument completion: only the response's text is known")
        yield problem


def check_sampler(node: Component, sampling: SamplingConfig | EvaluateSamplingConfig) -> Iterator[str]:
    """Check a sampler that is called with (model, tokenizer), and vLLM's limits on the distribution."""
    problems = check_component(node, "sampler", positional=2)
    yield from problems
    if problems or not node["_component_"].startswith("rolltune.samplers.vllm."):
        return
    from rolltune.endpoints import serving
    from rolltune.samplers.vllm_sampler import sampling_problem

    try:
        serving.installed_version()
    except ValueError as error:
        yield f"sampler._component_: {node['_component_']}: {error}"
    if problem := sampling_problem(sampling.temperature, sampling.top_p, sampling.top_k):
        yield problem
    length = node.get("max_model_len")
    if length is not None and length <= sampling.max_new_tokens:
        yield (
            f"sampler.max_model_len: {length}; must be more than sampling.max_new_tokens, {sampling.max_new_tokens}, "
            "to leave room for the prompt"
        )


# --- keys -------------------------------------------------------------------------------------------------------------


def check_output_dir(output_dir: str) -> Iterator[str]:
    """Check that files can be written to the folder, or that it can be made; leaves nothing behind."""
    if not output_dir:
        yield "output_dir: empty; give a folder"
        return
    try:
        if any("\ud800" <= char <= "\udfff" for char in output_dir):
            raise OSError("Python cannot read it in this locale: export PYTHONUTF8=1")
        folder = Path(output_dir)
        if folder.exists() and not folder.is_dir():
            raise OSError("is a file")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if not there.exists():
            raise OSError(f"the link {there} leads nowhere, to {os.readlink(there)}")
        os.rmdir(tempfile.mkdtemp(prefix=".rolltune-", dir=there))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        yield f"output_dir: {output_dir}: {reason}; give a folder that can be written"


def check_device(device: str) -> Iterator[str]:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            yield "device: cuda; torch finds no CUDA device on this machine (auto would use the CPU)"


def check_model_path(path: str, key: str) -> Iterator[str]:
    from rolltune.model.load import PACKAGED, adapter_base, resolve_model

    if path != PACKAGED:
        try:
            adapter_base(resolve_model(path))
        except ValueError as error:
            yield str(error).replace("model.path", key, 1)


def check_context(path: str, max_new_tokens: int, key: str) -> Iterator[str]:
    """Compare a local model's context with the longest completion.

    The dry run does this for a model on the Hub, and also knows the length of the prompts.
    """
    from rolltune.model.load import load_config

    if not (Path(path) / "config.json").exists():
        return
    try:
        context = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    except ValueError as error:
        yield str(error).replace("model.path", key, 1)
        return
    if context is not None and max_new_tokens >= context:
        yield (
            f"sampling.max_new_tokens: {max_new_tokens}; must be less than the context of {key}, {context} tokens, "
            "to leave room for the prompt"
        )


def check_sampling_params(sampling: SamplingConfig | EvaluateSamplingConfig) -> Iterator[str]:
    try:
        sampling.params()
    except ValueError as error:
        yield f"sampling.{error}"


def check_prompt(prompt: PromptConfig) -> Iterator[str]:
    if prompt.chat_template is not None and not Path(prompt.chat_template).is_file():
        yield f"prompt.chat_template: {prompt.chat_template}: no such file; give a Jinja file"


def check_answer_format(answer_format: str, prefill: str = "", *, needs: Sequence[str] = ("answer",)) -> Iterator[str]:
    """Check the layout of a right response.

    Args:
        answer_format: with ``{solution}`` and ``{answer}``.
        prefill: start of every response.
        needs: fields of which at least one must occur.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(answer_format) if name is not None]
    except ValueError as error:
        yield f"answer_format: {answer_format!r}: {error}; write a literal brace twice: {{{{ }}}}"
        return
    unknown = [name for name in fields if name not in ("solution", "answer")]
    if unknown:
        yield f"answer_format: has {{{unknown[0]}}}; use {{solution}} and {{answer}}, and write other braces twice"
    elif not set(needs) & set(fields):
        yield f"answer_format: {answer_format!r}; must have {' or '.join(f'{{{name}}}' for name in needs)}"
    elif not answer_format.startswith(prefill):
        yield f"answer_format: {answer_format!r}; must start with prompt.prefill, {prefill!r}, as every response does"


def check_max_problems(max_problems: int | None) -> Iterable[str]:
    return [] if max_problems is None else at_least("max_problems", max_problems, 1)
