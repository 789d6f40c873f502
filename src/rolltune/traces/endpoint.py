"""Traces from a model behind an endpoint, as in arXiv 2503.01307, with one system prompt per set of behaviours.

The prompts are the files ``prompts/<task>/<condition>.md`` beside this one; your own file can replace them. The
defaults are the paper's settings: temperature 0.5, 1,024 tokens. The paper used another model and other prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rolltune.config.components import nearest
from rolltune.endpoints.client import Endpoint, Reply
from rolltune.rewards.format import format_reward
from rolltune.seeding import derive_seed
from rolltune.traces.conditions import CONDITIONS
from rolltune.types import Message, Problem
from rolltune.writers.writing import Malformed, ask, check_asking, digest, read_prompt, shown_messages

_PROMPTS = Path(__file__).parent / "prompts"
_TRIES = 3  # requests for a reply with the right layout


class EndpointTraceWriter:
    """Asks a model to show chosen behaviours.

    A reply that is truncated, or is not just one think block and one answer block, is requested again with another
    seed, at most twice.

    Example:
        >>> writer = EndpointTraceWriter(
        ...     condition="backtracking", task="countdown", base_url="http://localhost:8000/v1", model="llama-3.3-70b"
        ... )
        >>> writer.provenance["model"]
        'llama-3.3-70b'

    Args:
        condition: the behaviours to ask for: a name in :data:`rolltune.traces.conditions.CONDITIONS`, or any name
            together with your own ``prompt``.
        task: "countdown", or "math" for questions whose answer is a number.
        base_url: of the endpoint, up to and with ``/v1``.
        model: as the server names it.
        prompt: file with a system prompt that replaces the packaged one.
        temperature: 0 .. 2.
        max_tokens: limit of one reply; a reply that reaches it is truncated and not kept.
        api_key_env: the environment variable with the key; need not be set for a server without keys.
        timeout_seconds: for a whole reply.
        max_attempts: calls for one reply, at most, where calls fail.
        max_calls: cap on the calls of a run, as with :class:`rolltune.endpoints.client.Endpoint`. A run that is taken
        up again
            has the whole of each cap again.
        max_total_tokens: cap on the tokens of a run, prompts included.
        max_dollars: cap on the price of a run.
        dollars_per_million_input: price of prompt tokens.
        dollars_per_million_output: price of completion tokens.

    Raises:
        ValueError: an argument is unknown or out of range, or the prompt's file cannot be read.
    """

    def __init__(
        self,
        *,
        condition: str,
        task: Literal["countdown", "math"],
        base_url: str,
        model: str,
        prompt: str | None = None,
        temperature: float = 0.5,
        max_tokens: int = 1024,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_seconds: float = 120.0,
        max_attempts: int = 6,
        max_calls: int | None = None,
        max_total_tokens: int | None = None,
        max_dollars: float | None = None,
        dollars_per_million_input: float = 0.0,
        dollars_per_million_output: float = 0.0,
    ) -> None:
        check_asking(temperature=temperature, max_tokens=max_tokens, max_total_tokens=max_total_tokens)
        self.condition = condition
        self.endpoint = Endpoint(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            max_concurrency=1024,  # above any recipe's, which is the one that counts
            timeout_seconds=timeout_seconds,
            max_attempts=max_attempts,
            max_calls=max_calls,
            max_tokens=max_total_tokens,
            max_dollars=max_dollars,
            dollars_per_million_input=dollars_per_million_input,
            dollars_per_million_output=dollars_per_million_output,
        )
        self._system = read_prompt(prompt) if prompt is not None else packaged_prompt(task, condition)
        self._temperature = temperature
        self._max_tokens = max_tokens

    @property
    def provenance(self) -> dict[str, str]:
        return {
            "writer": "rolltune.traces.endpoint",
            "model": self.endpoint.model,
            "host": self.endpoint.host,
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
