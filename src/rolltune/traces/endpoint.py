"""Traces from a model behind an endpoint, as in arXiv 2503.01307, with one system prompt per set of behaviours.

The prompts are the files ``prompts/<task>/<condition>.md`` beside this one; your own file can replace them. The
defaults are the paper's settings: temperature 0.5, 1,024 tokens. The paper used another model and other prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rolltune.config.components import nearest
from rolltune.endpoints.client import Endpoint, Reply
from rolltune.endpoints.settings import EndpointSettings, check_sampling
from rolltune.rewards.format import format_reward
from rolltune.seeding import derive_seed
from rolltune.traces.conditions import CONDITIONS
from rolltune.types import Message, Problem
from rolltune.writers.writing import Malformed, ask, digest, read_prompt, shown_messages

_PROMPTS = Path(__file__).parent / "prompts"
_TRIES = 3  # requests for a reply with the right layout


class EndpointTraceWriter:
    """Asks a model to show chosen behaviours.

    A reply that is truncated, or is not just one think block and one answer block, is requested again with another
    seed, at most twice.

    Example:
        >>> settings = EndpointSettings(base_url="http://localhost:8000/v1", model="llama-3.3-70b")
        >>> EndpointTraceWriter(condition="backtracking", task="countdown", endpoint=settings).provenance["model"]
        'llama-3.3-70b'

    Args:
        condition: the behaviours to ask for: a name in :data:`rolltune.traces.conditions.CONDITIONS`, or any name
            together with your own ``prompt``.
        task: "countdown", or "math" for questions whose answer is a number.
        endpoint: address, model and limits. A cap applies to one run of the recipe; a continued run starts at zero.
        prompt: file with a system prompt that replaces the packaged one.
        temperature: 0 .. 2.
        max_tokens: limit of one reply; a reply that reaches it is truncated and not kept.

    Raises:
        ValueError: an argument is unknown or out of range, or the prompt's file cannot be read.
    """

    def __init__(
        self,
        *,
        condition: str,
        task: Literal["countdown", "math"],
        endpoint: EndpointSettings,
        prompt: str | None = None,
        temperature: float = 0.5,
        max_tokens: int = 1024,
    ) -> None:
        check_sampling(temperature=temperature, max_tokens=max_tokens)
        self.condition = condition
        self.endpoint = Endpoint(endpoint)
        self._system = read_prompt(prompt) if prompt is not None else packaged_prompt(task, condition)
        self._temperature = temperature
        self._max_tokens = max_tokens

    @property
    def provenance(self) -> dict[str, str]:
        return {
            "writer": "rolltune.traces.endpoint",
            "model": self.endpoint.settings.model,
            "host": self.endpoint.settings.host,
            "prompt": digest(self._system),
            "temperature": str(self._temperature),
        }

    async def write(self, problem: Problem, *, seed: int) -> str:
        """Return the first reply with the right layout.

        Raises:
            Malformed: no reply has it.
            BudgetExceeded, EndpointDown, ValueError: as in :meth:`rolltune.endpoints.client.Endpoint.chat`.
        """
        messages = self._messages(problem)
        for attempt in range(_TRIES):
            reply = await ask(
                self.endpoint,
                messages,
                temperature=self._temperature,
                max_tokens=self._max_tokens,
                seed=derive_seed(seed, attempt),
            )
            if _is_well_formed(problem, reply):
                return reply.text.strip()
        fault = f"cut at {self._max_tokens} tokens" if reply.finish_reason == "length" else "another layout"
        raise Malformed(
            f"{problem.id}: none of {_TRIES} replies is just one <think> and one <answer> block; the last: {fault}"
        )

    def preview(self, problem: Problem) -> str:
        """Return the messages that would be sent for a problem, as text."""
        return shown_messages(self._messages(problem))

    def _messages(self, problem: Problem) -> list[Message]:
        return [
            {"role": "system", "content": self._system},
            {"role": "user", "content": problem.messages[-1]["content"]},
        ]


def packaged_prompt(task: str, condition: str) -> str:
    """Read the packaged system prompt for a task and a condition.

    Raises:
        ValueError: an unknown task or condition.
    """
    tasks = sorted(folder.name for folder in _PROMPTS.iterdir())
    for key, name, names in (("task", task, tasks), ("condition", condition, list(CONDITIONS))):
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{key}: {name!r} is unknown; {hint}Known are {', '.join(names)}")
    return (_PROMPTS / task / f"{condition}.md").read_text(encoding="utf-8")


def _is_well_formed(problem: Problem, reply: Reply) -> bool:
    return reply.finish_reason != "length" and format_reward(problem, reply.text).total == 1.0
