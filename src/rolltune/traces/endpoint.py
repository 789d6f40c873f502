"""Ask a model behind an endpoint for traces, as in arXiv 2503.01307: one system prompt for each set of behaviours.

The prompts are the files ``prompts/<task>/<condition>.md`` beside this one; a user's file can replace them. Temperature
0.5 and 1,024 tokens are the paper's settings. Its model and prompts are different.
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
_TRIES = 3  # replies asked for until one has the layout


class EndpointTraceWriter:
    """A model that is told which behaviours to show.

    A reply that was cut, or is not exactly one think block and one answer block, is asked for again with another seed,
    at most twice.

    Example:
        >>> settings = EndpointSettings(base_url="http://localhost:8000/v1", model="llama-3.3-70b")
        >>> EndpointTraceWriter(condition="backtracking", task="countdown", endpoint=settings).provenance["model"]
        'llama-3.3-70b'

    Args:
        condition: a name of :data:`rolltune.traces.conditions.CONDITIONS`; with your own ``prompt``, any name for what
            it asks for.
        task: "countdown", or "math" for questions with a numeric answer.
        endpoint: address, model, limits. A cap applies to one run of the recipe; a continued run starts at zero.
        prompt: file with a system prompt that replaces the packaged one.
        temperature: 0 .. 2.
        max_tokens: of one reply. A reply cut there is not kept.

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
        """Return the first reply with the layout.

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
        problem_with_it = f"cut at {self._max_tokens} tokens" if reply.finish_reason == "length" else "another layout"
        raise Malformed(
            f"{problem.id}: none of {_TRIES} replies is one <think> and one <answer> block alone; the last: "
            f"{problem_with_it}"
        )

    def preview(self, problem: Problem) -> str:
        """Render the messages that are sent for a problem."""
        return shown_messages(self._messages(problem))

    def _messages(self, problem: Problem) -> list[Message]:
        return [
            {"role": "system", "content": self._system},
            {"role": "user", "content": problem.messages[-1]["content"]},
        ]


def packaged_prompt(task: str, condition: str) -> str:
    """Load the system prompt for a condition's behaviours.

    Raises:
        ValueError: there is no such task or condition.
    """
    tasks = sorted(folder.name for folder in _PROMPTS.iterdir())
    for key, name, names in (("task", task, tasks), ("condition", condition, list(CONDITIONS))):
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{key}: {name!r} is unknown; {hint}There are {', '.join(names)}")
    return (_PROMPTS / task / f"{condition}.md").read_text(encoding="utf-8")


def _is_well_formed(problem: Problem, reply: Reply) -> bool:
    return reply.finish_reason != "length" and format_reward(problem, reply.text).total == 1.0
