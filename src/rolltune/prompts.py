"""Problems to prompt token ids, through the model's own chat template."""

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
    """Render a problem to the tokens before the response.

    The template is rendered to text and the prefill appended before anything is tokenized, so a token may span both, as
    it would at inference.

    Args:
        problem: its messages end with the user's.
        tokenizer: has a chat template.
        system: system message; None or "" for none.
        few_shot: examples before the problem, each a user message and an assistant message.
        prefill: start of the response.
    """
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    for example in few_shot:
        messages.append({"role": "user", "content": example.user})
        messages.append({"role": "assistant", "content": example.assistant})
    messages += problem.messages
    plain = [{"role": str(m["role"]), "content": m["content"]} for m in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    # The template writes its own BOS; adding special tokens would write it twice.
    token_ids = tokenizer(f"{text}{prefill}", add_special_tokens=False)["input_ids"]
    return Prompt(token_ids=tuple(token_ids), prefill=prefill)


def worked_response(problem: Problem, answer_format: str) -> str:
    """Write the correct response: ``answer_format`` filled with the problem's solution and answer.

    Raises:
        ValueError: the problem has no gold answer.
    """
    if problem.answer is None:
        raise ValueError(f"{problem.id}: has no gold answer, which answer_format is filled with")
    return answer_format.format(solution=problem.solution or f"The answer is {problem.answer}.", answer=problem.answer)


def completion_ids(response: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenize a written response that follows ``prompt``, without the prefill and with EOS.

    Raises:
        ValueError: the response does not start with the prefill.
    """
    if not response.startswith(prompt.prefill):
        raise ValueError(
            f"answer_format: a response must start with prompt.prefill, {prompt.prefill!r}, not {response[:40]!r}"
        )
    ids = tokenizer(response[len(prompt.prefill) :], add_special_tokens=False)["input_ids"]
    assert isinstance(tokenizer.eos_token_id, int)
    return (*ids, tokenizer.eos_token_id)
