"""Prompts, token by token, against the template written out by hand."""

import copy

import pytest
from tokenizers import AddedToken, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from rolltune.config.schema import FewShotExample
from rolltune.prompts import completion_ids, render_prompt, worked_response
from rolltune.types import Problem, Prompt

END, SYSTEM, USER, ASSISTANT = range(4)  # the special tokens of the byte tokenizer
PROBLEM = Problem(id="p", messages=({"role": "user", "content": "What is 2 + 2?"},), answer="4", solution="2 + 2 = 4.")


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """Like Llama's: encoding adds <s> of its own accord, and the chat template writes one too."""
    with_bos = copy.deepcopy(tokenizer)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.convert_tokens_to_ids("<s>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", bos)]
    )
    with_bos.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert with_bos("a")["input_ids"][0] == bos
    return with_bos


def text_ids(tokenizer, text: str) -> list[int]:
    """Bytes of plain text, looked up one by one."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[c] for piece, _ in byte_level.pre_tokenize_str(text) for c in piece] if text else []


def turn(tokenizer, role: int, text: str) -> list[int]:
    return [role, *text_ids(tokenizer, text), END]


def test_a_prompt_is_the_user_turn_and_the_start_of_the_answer(tokenizer):
    prompt = render_prompt(PROBLEM, tokenizer)
    assert list(prompt.token_ids) == [*turn(tokenizer, USER, "What is 2 + 2?"), ASSISTANT]
    assert prompt.prefill == ""
    assert len(prompt.token_ids) == 3 + len("What is 2 + 2?")


def test_everything_around_the_problem_in_order(tokenizer):
    prompt = render_prompt(
        PROBLEM,
        tokenizer,
        system="Think.",
        few_shot=[FewShotExample(user="1 + 1?", assistant="2"), FewShotExample(user="3?", assistant="é")],
        prefill="<think>\n",
    )
    assert list(prompt.token_ids) == [
        *turn(tokenizer, SYSTEM, "Think."),
        *turn(tokenizer, USER, "1 + 1?"),
        *turn(tokenizer, ASSISTANT, "2"),
        *turn(tokenizer, USER, "3?"),
        *turn(tokenizer, ASSISTANT, "é"),
        *turn(tokenizer, USER, "What is 2 + 2?"),
        ASSISTANT,
        *text_ids(tokenizer, "<think>\n"),
    ]
    assert prompt.prefill == "<think>\n"
    assert PROBLEM.messages == ({"role": "user", "content": "What is 2 + 2?"},)  # not added to


def test_an_empty_system_prompt_is_none(tokenizer):
    assert render_prompt(PROBLEM, tokenizer, system="") == render_prompt(PROBLEM, tokenizer)


def test_a_problem_may_be_a_whole_conversation(tokenizer):
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2?"},
    )
    prompt = render_prompt(Problem(id="c", messages=messages), tokenizer)
    roles = (SYSTEM, USER, ASSISTANT, USER)
    turns = [turn(tokenizer, role, m["content"]) for role, m in zip(roles, messages, strict=True)]
    assert list(prompt.token_ids) == [*(i for ids in turns for i in ids), ASSISTANT]


def test_no_second_bos(bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    prompt = render_prompt(PROBLEM, bos_tokenizer, prefill="<think>")
    assert prompt.token_ids[0] == bos and prompt.token_ids.count(bos) == 1
    assert completion_ids("<think>4", prompt, bos_tokenizer).count(bos) == 0


def test_is_what_the_tokenizers_own_template_call_gives(bos_tokenizer):
    own = bos_tokenizer.apply_chat_template(
        list(PROBLEM.messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(render_prompt(PROBLEM, bos_tokenizer).token_ids) == own


def test_a_token_may_span_the_border_of_template_and_prefill(tokenizer):
    """The template ends with ">" and the prefill starts with "<": with "><" in the vocabulary they are one token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}>"
    tokenizer.add_tokens([AddedToken("><", normalized=False)])
    joined = tokenizer.convert_tokens_to_ids("><")
    problem = Problem(id="p", messages=({"role": "user", "content": "a"},))
    assert list(render_prompt(problem, tokenizer, prefill="<b").token_ids) == [
        *text_ids(tokenizer, "a"),
        joined,
        *text_ids(tokenizer, "b"),
    ]


@pytest.mark.parametrize(
    ("solution", "said"), [("2 + 2 = 4.", "2 + 2 = 4."), (None, "The answer is 4."), ("{answer}", "{answer}")]
)
def test_worked_turn_fills_in_the_format(solution, said):
    problem = Problem(id="p", messages=(), answer="4", solution=solution)
    filled = worked_response(problem, "<think>{solution}</think> {{x}} <answer>{answer}</answer>")
    assert filled == f"<think>{said}</think> {{x}} <answer>4</answer>"


def test_a_worked_turn_needs_an_answer():
    with pytest.raises(ValueError, match="p: has no gold answer"):
        worked_response(Problem(id="p", messages=(), solution="s"), "{solution} {answer}")


def test_completion_ids_go_on_behind_the_prefill_and_end_with_eos(tokenizer):
    prompt = Prompt(token_ids=(1,), prefill="<think>")
    assert list(completion_ids("<think>4", prompt, tokenizer)) == [*text_ids(tokenizer, "4"), END]
    assert list(completion_ids("4 <|user|>", Prompt(token_ids=(1,)), tokenizer)) == [
        *text_ids(tokenizer, "4 "),
        USER,
        END,
    ]
    with pytest.raises(ValueError, match=r"answer_format: .*'<think>', not 'think 4'"):
        completion_ids("think 4", prompt, tokenizer)


def test_prompt_and_completion_are_the_rendered_conversation(tokenizer):
    """Trained on: exactly what the template makes of the finished conversation, here with its end token as EOS."""
    prompt = render_prompt(PROBLEM, tokenizer, system="s", prefill="<think>")
    ids = prompt.token_ids + completion_ids("<think>x</think>4", prompt, tokenizer)
    conversation = [
        {"role": "system", "content": "s"},
        *PROBLEM.messages,
        {"role": "assistant", "content": "<think>x</think>4"},
    ]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(conversation, tokenize=False)
