"""Problem -> messages -> prompt token ids, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rolltune.config.schema import FewShotExample
from rolltune.types import Message, Problem, Prompt


def render_prompt(
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    few_shot: Sequence[FewShotExample] = (),
    prefill: str = "",
) -> Prompt:
    """The tokens in front of the assistant's turn, and the prefill that already belongs to it.

    The template is rendered to text and the prefill appended before anything is tokenized, so a token may
    span the border of the two exactly as it would at inference.
    """
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    for turn in few_shot:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.assistant})
    messages += problem.messages
    turns = [{"role": str(m["role"]), "content": m["content"]} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # The template writes its own BOS: adding special tokens again would double it.
    token_ids = tokenizer(f"{text}{prefill}", add_special_tokens=False)["input_ids"]
    return Prompt(token_ids=tuple(token_ids), prefill=prefill)


def worked_response(problem: Problem, answer_format: str) -> str:
    """The assistant's turn that is entirely right: the format filled with the problem's solution and answer."""
    if problem.answer is None:
        raise ValueError(f"{problem.id}: has no gold answer")
    return answer_format.format(solution=problem.solution or f"The answer is {problem.answer}.", answer=problem.answer)


def completion_ids(turn: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a written turn behind its prompt, EOS included, for SFT."""
    if not turn.startswith(prompt.prefill):
        raise ValueError(f"answer_format: a turn must start with the prefill {prompt.prefill!r}, not {turn[:40]!r}")
    ids = tokenizer(turn[len(prompt.prefill) :], add_special_tokens=False)["input_ids"]
    assert isinstance(tokenizer.eos_token_id, int)
    return (*ids, tokenizer.eos_token_id)
