"""Problems to prompt token ids, through the model's own chat template.

Templates do more than join messages: some drop a system message or the thoughts of earlier turns, and some open the
response themselves (``<think>``). :class:`PromptRenderer` compares what a template wrote with what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rolltune.config.schema import FewShotExample
from rolltune.errors import ConfigError
from rolltune.types import Message, Problem, Prompt

BATCH = 1024  # prompts that are tokenized at once
_USER, _ASSISTANT = "what is one and one", "it makes two"  # a conversation in which parts of a template are found
_EMPTY_BLOCK = re.compile(r"<(\w+)>\s*</\1>\s*")  # written where a model shall not think


class PromptRenderer:
    """Renders problems to the tokens before the response.

    The template is rendered to text and the prefill appended before anything is tokenized, so a token may span both, as
    it would at inference. What the template itself writes behind the header of the response is part of the prefill.
    What of the header it lacks is appended, such as gpt-oss's ``<|channel|>final<|message|>``: responses start there in
    a conversation.

    Example:
        >>> render = PromptRenderer(tokenizer, system="Think first.")  # doctest: +SKIP
        >>> render(problem).prefill  # doctest: +SKIP
        '<think>\\n'

    Attributes:
        prefill: start of every response: what the template writes, then the configured prefill.

    Args:
        tokenizer: has a chat template.
        system: system message; None or "" for none.
        few_shot: examples before the problem, each a user message and an assistant message.
        prefill: start of the response.
        chat_template_kwargs: variables of the template, such as ``enable_thinking``.

    Raises:
        ConfigError: the template cannot be rendered, opens the response in another way than ``prefill``, or does not
            know one of its variables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        few_shot: Sequence[FewShotExample] = (),
        prefill: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(chat_template_kwargs or {})
        _check_variables(tokenizer, self._variables)
        self._system: list[tuple[str, Message]] = []
        if system:
            self._system = [("prompt.system", {"role": "system", "content": system})]
        self._few_shot: list[tuple[str, Message]] = []
        for i, example in enumerate(few_shot):
            self._few_shot.append((f"prompt.few_shot[{i}].user", {"role": "user", "content": example.user}))
            key = f"prompt.few_shot[{i}].assistant"
            self._few_shot.append((key, {"role": "assistant", "content": example.assistant}))
        opened, missing = _response_start(tokenizer, self._variables)
        added = _added_prefill(opened, prefill.removeprefix(missing))
        self.prefill = f"{opened}{added}"
        self._added = f"{missing}{added}"

    def __call__(self, problem: Problem) -> Prompt:
        """Render one problem.

        Raises:
            ConfigError: the template cannot render it, or leaves out or changes one of its messages.
        """
        return self.many([problem])[0]

    def many(self, problems: Sequence[Problem]) -> list[Prompt]:
        """Render problems; faster than one by one. See :meth:`__call__`."""
        texts = [f"{self._text(problem)}{self._added}" for problem in problems]
        # The template writes its own BOS; adding special tokens would write it twice.
        token_ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [Prompt(token_ids=tuple(ids), prefill=self.prefill) for ids in token_ids]  # pyright: ignore

    def writes_date(self) -> bool:
        """Return whether the template writes today's date, so that prompts differ from day to day."""
        question = _conversation(1)[:1]
        another_day = self._variables | {"strftime_now": lambda _format: "another day"}
        return _render(self._tokenizer, question, self._variables) != _render(self._tokenizer, question, another_day)

    def lengths(self, problems: Sequence[Problem]) -> list[int]:
        """Return the number of tokens of each problem's prompt."""
        batches = (problems[start : start + BATCH] for start in range(0, len(problems), BATCH))
        return [len(prompt.token_ids) for batch in batches for prompt in self.many(batch)]

    def _text(self, problem: Problem) -> str:
        own: list[tuple[str, Message]] = [
            (f"data: {problem.id}: message {i}", message) for i, message in enumerate(problem.messages)
        ]
        parts = [*self._system, *self._few_shot, *own]
        try:
            text = _render(self._tokenizer, [message for _, message in parts], self._variables)
        except TemplateError as error:
            raise ConfigError([f"{self._blame(own)}: the chat template refuses it: {_one_line(error)}"]) from error
        _check_parts(text, parts)
        return text

    def _blame(self, own: list[tuple[str, Message]]) -> str:
        """Return the key without which the template would render."""
        for key, parts in (
            ("prompt.system", [*self._few_shot, *own]),
            ("prompt.few_shot", [*self._system, *own]),
            ("prompt.system, prompt.few_shot", own),
        ):
            try:
                _render(self._tokenizer, [message for _, message in parts], self._variables)
            except TemplateError:
                continue
            return key
        return own[0][0].rpartition(":")[0] if own else "prompt.chat_template"


def worked_response(problem: Problem, answer_format: str) -> str:
    """Write the correct response: ``answer_format`` filled with the problem's solution and answer.

    Raises:
        ValueError: the problem has no gold answer.
    """
    if problem.answer is None:
        raise ValueError(f"{problem.id}: has no gold answer, which answer_format is filled with")
    return answer_format.format(solution=problem.solution or f"The answer is {problem.answer}.", answer=problem.answer)


def completion_ids(response: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenize a written response that follows ``prompt``, without the prefill and with the end of the turn.

    Raises:
        ValueError: the response does not start with the prefill, or the tokenizer cannot continue a text.
    """
    rest = without_prefill(response, prompt.prefill)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if not _continues(ids, rest, prompt, tokenizer):
        # A tokenizer in the way of SentencePiece puts a space before the start of a text. Here is none.
        before = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"\n{rest}", add_special_tokens=False)["input_ids"][len(before) :]  # pyright: ignore
        if not _continues(ids, rest, prompt, tokenizer):
            raise ValueError(
                "model.path: the tokenizer puts a space before every text, so a response cannot be tokenized apart "
                "from its prompt; use a tokenizer without add_prefix_space"
            )
    return (*ids, turn_end(tokenizer))  # pyright: ignore


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a turn of the assistant: the template's, or the EOS token if it writes none."""
    assert isinstance(tokenizer.eos_token_id, int)
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    try:
        tail = _render(tokenizer, _conversation(1), add_generation_prompt=False).rpartition(_ASSISTANT)[2]
    except TemplateError:  # a template for a single question
        return tokenizer.eos_token_id
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in added and added[i].special), tokenizer.eos_token_id)  # pyright: ignore


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that decoding leaves out: those with a role, such as EOS, and all others marked as special."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]  # pyright: ignore
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def special_token_in(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the first special token in a text, which rewards would not see in a response; None if it has none."""
    return next((token for token in special_tokens(tokenizer) if token in text), None)


def check_visible(text: str, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raise ConfigError if ``text``, which responses shall have, holds a special token."""
    if token := special_token_in(text, tokenizer):
        raise ConfigError(
            [
                f"{key}: {text!r}: {token!r} is a special token of the tokenizer, which rewards do not see in a "
                "response; use other tags, or make it an ordinary added token (special: false) in the tokenizer's files"
            ]
        )


# --- templates --------------------------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages to text.

    Raises:
        TemplateError: the template is not valid, or it does not support these messages.
    """
    plain = [{"role": str(m["role"]), "content": m["content"]} for m in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, **(variables or {})
            )
        )
    except TemplateError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:  # in its expressions
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def _conversation(turns: int) -> list[Message]:
    """A user message, the assistant's response, and with two turns a user message behind it."""
    messages: list[Message] = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    return messages if turns == 1 else [*messages, {"role": "user", "content": "go on"}]


def _check_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Raise ConfigError for a variable that the template does not read, which would change nothing."""
    template = tokenizer.get_chat_template() if variables else ""
    if problems := [
        f"prompt.chat_template_kwargs: {name}: the chat template has no such variable; look at the template for the "
        "names of its variables"
        for name in variables
        if not re.search(rf"\b{re.escape(name)}\b", template)
    ]:
        raise ConfigError(problems)


def _response_start(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> tuple[str, str]:
    """Compare the generation prompt with the header of an earlier response.

    Templates may write an empty block of thoughts before a response, or only before the last one. It is no header.

    Returns:
        What the generation prompt has behind the header, and what of the header it lacks.

    Raises:
        ConfigError: the template cannot be rendered, or the two have nothing to do with each other.
    """
    try:
        generation = _render(tokenizer, _conversation(1)[:1], variables).rpartition(_USER)[2]
    except TemplateError as error:
        raise ConfigError([f"prompt.chat_template: cannot be rendered: {_one_line(error)}"]) from error
    try:
        whole = _render(tokenizer, _conversation(2), variables)
    except TemplateError:
        whole = ""
    if _USER not in whole or _ASSISTANT not in whole:
        return "", ""  # a template for a single question
    header = whole.partition(_USER)[2].partition(_ASSISTANT)[0]
    header = header[: _last_block(header)]
    for known in (header, header.rstrip()):
        if generation.startswith(known):
            opened = generation[len(known) :]
            return (opened if opened.strip() else ""), ""
    if header.startswith(generation.rstrip()):
        return "", header[len(generation) :]
    raise ConfigError(
        [
            f"prompt.chat_template: with add_generation_prompt the template ends in {generation!r}, but a response of "
            f"the assistant starts behind {header!r}; it must end in the same header"
        ]
    )


def _last_block(header: str) -> int:
    """Return where the empty block at the end of a header starts."""
    blocks = [block for block in _EMPTY_BLOCK.finditer(header) if block.end() == len(header)]
    return blocks[-1].start() if blocks else len(header)


def _added_prefill(opened: str, prefill: str) -> str:
    """Return what of the configured prefill the template has not written.

    Raises:
        ConfigError: the template opens the response with the prefill and goes on differently.
    """
    begun = opened.strip()
    if not begun or not prefill.strip():
        return prefill
    if prefill.strip().startswith(begun):
        return prefill.removeprefix(opened) if prefill.startswith(opened) else prefill.strip()[len(begun) :]
    if begun.startswith(prefill.strip()):
        raise ConfigError(
            [
                f"prompt.prefill: {prefill!r}; the chat template itself starts every response with {opened!r}, so "
                "leave it out"
            ]
        )
    return prefill


def _check_parts(text: str, parts: Sequence[tuple[str, Message]]) -> None:
    """Raise ConfigError unless each message occurs in the rendered text, in order and apart from the others.

    Templates may strip space around a message, and may move the system message.
    """
    end = None
    for key, message in parts:
        content = message["content"].strip()
        start = text.find(content, 0 if message["role"] == "system" else end or 0)
        if start < 0:
            raise ConfigError(
                [
                    f"{key}: {content[:60]!r}: the chat template leaves it out or changes it (some drop the thoughts "
                    "of earlier turns); leave it out, or give a template that keeps it as prompt.chat_template"
                ]
            )
        if message["role"] == "system" or not content:
            continue
        if end is not None and not text[end:start].strip():
            raise ConfigError(
                [
                    f"{key}: the chat template joins it with the message before it; give a template that marks every "
                    "turn as prompt.chat_template"
                ]
            )
        end = start + len(content)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- responses --------------------------------------------------------------------------------------------------------


def without_prefill(response: str, prefill: str) -> str:
    """Cut the prefill off, with any space for its space; an empty block of thoughts need not be repeated."""
    for start in dict.fromkeys((prefill, _EMPTY_BLOCK.sub("", prefill, count=1))):
        if response.startswith(start):
            return response[len(start) :]
        words = r"\s*".join(map(re.escape, start.split())) + (r"\s*" if start[-1:].isspace() else "")
        if found := re.match(words, response):
            return response[found.end() :]
    raise ValueError(
        f"answer_format: a response must start with the prefill, which prompt.prefill or the chat template writes, "
        f"{prefill!r}, not {response[:40]!r}"
    )


def _continues(ids: Sequence[int], text: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokens go on behind the prompt without a space that the text does not have."""
    tail = list(prompt.token_ids[-8:])
    written = str(tokenizer.decode([*tail, *ids[:8]]))[len(str(tokenizer.decode(tail))) :]
    return text[:1].isspace() or not written[:1].isspace()
