"""Prompts, token by token, against the template written out by hand."""

import copy

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rolltune.config.schema import FewShotExample
from rolltune.errors import ConfigError
from rolltune.prompts import PromptRenderer, check_visible, completion_ids, turn_end, worked_response
from rolltune.run.notices import about_prompts
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
    prompt = PromptRenderer(tokenizer)(PROBLEM)
    assert list(prompt.token_ids) == [*turn(tokenizer, USER, "What is 2 + 2?"), ASSISTANT]
    assert prompt.prefill == ""
    assert len(prompt.token_ids) == 3 + len("What is 2 + 2?")


def test_everything_around_the_problem_in_order(tokenizer):
    prompt = PromptRenderer(
        tokenizer,
        system="Think.",
        few_shot=[FewShotExample(user="1 + 1?", assistant="2"), FewShotExample(user="3?", assistant="é")],
        prefill="<think>\n",
    )(PROBLEM)
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
    assert PromptRenderer(tokenizer, system="")(PROBLEM) == PromptRenderer(tokenizer)(PROBLEM)


def test_a_problem_may_be_a_whole_conversation(tokenizer):
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2?"},
    )
    prompt = PromptRenderer(tokenizer)(Problem(id="c", messages=messages))
    roles = (SYSTEM, USER, ASSISTANT, USER)
    turns = [turn(tokenizer, role, m["content"]) for role, m in zip(roles, messages, strict=True)]
    assert list(prompt.token_ids) == [*(i for ids in turns for i in ids), ASSISTANT]


def test_no_second_bos(bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    prompt = PromptRenderer(bos_tokenizer, prefill="<think>")(PROBLEM)
    assert prompt.token_ids[0] == bos and prompt.token_ids.count(bos) == 1
    assert completion_ids("<think>4", prompt, bos_tokenizer).count(bos) == 0


def test_is_what_the_tokenizers_own_template_call_gives(bos_tokenizer):
    own = bos_tokenizer.apply_chat_template(
        list(PROBLEM.messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(PromptRenderer(bos_tokenizer)(PROBLEM).token_ids) == own


def test_a_token_may_span_the_border_of_template_and_prefill(tokenizer):
    """The template ends with ">" and the prefill starts with "<": with "><" in the vocabulary they are one token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}>"
    tokenizer.add_tokens([AddedToken("><", normalized=False)])
    joined = tokenizer.convert_tokens_to_ids("><")
    problem = Problem(id="p", messages=({"role": "user", "content": "a"},))
    assert list(PromptRenderer(tokenizer, prefill="<b")(problem).token_ids) == [
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
    prompt = PromptRenderer(tokenizer, system="s", prefill="<think>")(PROBLEM)
    ids = prompt.token_ids + completion_ids("<think>x</think>4", prompt, tokenizer)
    conversation = [
        {"role": "system", "content": "s"},
        *PROBLEM.messages,
        {"role": "assistant", "content": "<think>x</think>4"},
    ]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(conversation, tokenize=False)


# --- what templates do ------------------------------------------------------------------------------------------------

# Short versions of what the templates of some model families do to a conversation.
TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
LOOP = "{% for m in messages %}"
CHAT = LOOP + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
NO_THOUGHTS = "<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1].strip() }}<|end|>"
R1 = LOOP + NO_THOUGHTS + "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
QWEN3 = (
    LOOP
    + "{% if loop.last and m['role'] == 'assistant' %}<|assistant|><think>\n\n</think>\n\n{{ m['content'] }}<|end|>"
    "{% else %}" + NO_THOUGHTS + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN3_5 = QWEN3.replace("%}<|assistant|>{% endif", "%}<|assistant|><think>\n{% endif")
NO_THINK = QWEN3.replace("%}<|assistant|>{% endif", "%}<|assistant|><think>\n\n</think>\n\n{% endif")
SMOLLM3 = (  # an empty block before every response
    LOOP + "<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think>\n\n</think>\n{% endif %}{{ m['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MISTRAL = (
    LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}<|end|>"
    "{% endif %}{% endfor %}"
)
GPT_OSS = LOOP + (
    "<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}[final]{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORKED = "<think>{solution}</think>\n<answer>{answer}</answer>"
THOUGHTS = [FewShotExample(user="1 + 1?", assistant="<think>one and one</think>\n<answer>2</answer>")]


def templated(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "opened"),
    [(R1, "<think>\n"), (QWEN3, ""), (QWEN3_5, "<think>\n"), (NO_THINK, "<think>\n\n</think>\n\n"),
     (SMOLLM3, "<think>\n\n</think>\n"), (GEMMA, ""), (MISTRAL, "")],
)  # fmt: skip
def test_what_the_template_opens_the_response_with_is_prefill(tokenizer, template, opened):
    tokenizer = templated(tokenizer, template)
    prompt = PromptRenderer(tokenizer)(PROBLEM)
    assert prompt.prefill == opened
    own = tokenizer.apply_chat_template(list(PROBLEM.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.token_ids) == own


@pytest.mark.parametrize("template", [R1, QWEN3_5])
@pytest.mark.parametrize("prefill", ["", "<think>", "<think>\n"])
def test_an_opened_response_is_trained_on_without_a_second_tag(tokenizer, template, prefill):
    tokenizer = templated(tokenizer, template)
    prompt = PromptRenderer(tokenizer, prefill=prefill)(PROBLEM)
    ids = prompt.token_ids + completion_ids(worked_response(PROBLEM, WORKED), prompt, tokenizer)
    assert tokenizer.decode(ids) == (
        "<|user|>What is 2 + 2?<|end|><|assistant|><think>\n2 + 2 = 4.</think>\n<answer>4</answer><|end|>"
    )


@pytest.mark.parametrize(("thinking", "opened"), [({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_variables_of_the_template_decide_what_it_opens(tokenizer, thinking, opened):
    """As in Qwen3, whose generation prompt has an empty block of thoughts only where thinking is off."""
    block = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    template = QWEN3.replace("%}<|assistant|>{% endif", f"%}}<|assistant|>{block}{{% endif")
    render = PromptRenderer(templated(tokenizer, template), chat_template_kwargs=thinking)
    assert render.prefill == render(PROBLEM).prefill == opened
    assert tokenizer.decode(render(PROBLEM).token_ids).endswith(f"<|assistant|>{opened}")
    with pytest.raises(ConfigError, match=r"prompt.chat_template_kwargs: thinking: .* no such variable"):
        PromptRenderer(templated(tokenizer, template), chat_template_kwargs={"thinking": False})
    with pytest.raises(ConfigError, match=r"prompt.chat_template: cannot be rendered: .*'messages'"):
        PromptRenderer(templated(tokenizer, template), chat_template_kwargs={"messages": []})


def test_a_template_that_writes_the_date_is_noticed(tokenizer):
    """As in Llama 3.2, whose date a variable can set."""
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated = templated(tokenizer, f"{date}<|system|>Today: {{{{ date_string }}}}<|end|>{CHAT}")
    (note,) = about_prompts(PromptRenderer(dated))
    assert "today's date" in note
    assert list(about_prompts(PromptRenderer(dated, chat_template_kwargs={"date_string": "26 Jul 2024"}))) == []
    assert list(about_prompts(PromptRenderer(tokenizer))) == []


def test_a_prefill_goes_on_behind_the_templates_own(tokenizer):
    render = PromptRenderer(templated(tokenizer, R1), prefill="<think>Let me")
    assert render(PROBLEM).prefill == "<think>\nLet me"
    assert tokenizer.decode(render(PROBLEM).token_ids).endswith("<|assistant|><think>\nLet me")
    with pytest.raises(ConfigError, match=r"prompt.prefill: '<think>'; the chat template itself"):
        PromptRenderer(templated(tokenizer, NO_THINK), prefill="<think>")


def test_an_empty_block_of_thoughts_need_not_be_repeated(tokenizer):
    tokenizer = templated(tokenizer, NO_THINK)
    prompt = PromptRenderer(tokenizer, prefill="It is")(PROBLEM)
    assert prompt.prefill == "<think>\n\n</think>\n\nIt is"
    assert tokenizer.decode(completion_ids("It is 4", prompt, tokenizer)) == " 4<|end|>"
    with pytest.raises(ValueError, match="answer_format: a response must start with the prefill"):
        completion_ids("<think>2</think>4", prompt, tokenizer)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (R1, {"few_shot": THOUGHTS}, r"prompt.few_shot\[0\].assistant: '<think>one"),
        (QWEN3, {"few_shot": THOUGHTS}, r"prompt.few_shot\[0\].assistant: '<think>one"),
        (GEMMA, {"system": "Think."}, "prompt.system: .*System role not supported"),
        (CHAT.replace("messages %}", "messages if m.role != 'system' %}"), {"system": "Zzz"}, "prompt.system: 'Zzz'"),
        (MISTRAL.replace("[INST] ", ""), {"system": "Zzz"}, "prompt.system: .*roles must alternate"),
        (CHAT.replace("m['content']", "m['content'] | upper"), {}, None),
        ("{% for m in messages %}", {}, "prompt.chat_template: cannot be rendered: .*endfor"),
        ("{{ messages[0].content + nothing }}", {}, "prompt.chat_template: cannot be rendered: .*undefined"),
        ("{{ messages[0].content + 1 }}", {}, "prompt.chat_template: cannot be rendered: TypeError"),
        ("{{ messages[0].content }}:", {"few_shot": THOUGHTS}, r"prompt.few_shot\[0\].assistant: "),
        (LOOP + "{{ m.content }}\n{% endfor %}", {"few_shot": THOUGHTS}, r"few_shot\[0\].assistant: .*join"),
        (CHAT + "{{ 1 // (4 - messages | length) }}", {"system": "s", "few_shot": THOUGHTS}, "system: .*ZeroDivision"),
    ],
)  # fmt: skip
def test_a_template_that_changes_what_it_is_given_is_refused(tokenizer, template, options, message):
    if message is None:
        message = "data: p: message 0: 'What is 2"
    with pytest.raises(ConfigError, match=message) as error:
        PromptRenderer(templated(tokenizer, template), **options)(PROBLEM)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("template", "header"), [
    (GPT_OSS, "<|assistant|>[final]"), (CHAT.replace("add_generation_prompt", "false"), "<|assistant|>")
])  # fmt: skip
@pytest.mark.parametrize("prefill", ["", "<think>"])
def test_the_header_that_a_generation_prompt_lacks_is_appended(tokenizer, template, header, prefill):
    """Rewards do not see it, so it may hold special tokens."""
    prompt = PromptRenderer(templated(tokenizer, template), prefill=prefill)(PROBLEM)
    assert tokenizer.decode(prompt.token_ids) == f"<|user|>What is 2 + 2?<|end|>{header}{prefill}"
    assert prompt.prefill == prefill


def test_a_response_ends_with_the_token_that_ends_a_turn(tokenizer):
    """Like base models fine-tuned for chat: the tokenizer's EOS ends a document, and turns end in <|end|>."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": "</s>"})
    other.add_special_tokens({"additional_special_tokens": ["<|end|>"]}, replace_extra_special_tokens=False)
    assert turn_end(other) == END != other.eos_token_id
    assert completion_ids("4", Prompt(token_ids=(1,)), other)[-1] == END
    assert turn_end(templated(other, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")) == (
        other.eos_token_id
    )


def test_a_response_gets_no_space_that_the_text_does_not_have():
    """Like Llama 2 and Mistral, whose tokenizers put a space before a text."""
    alphabet = [chr(i) for i in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", "\n", "▁", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    spaced.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = PromptRenderer(spaced)(PROBLEM)
    assert spaced.convert_ids_to_tokens(list(completion_ids("4 x", prompt, spaced))) == ["4", "▁", "x", "</s>"]


def test_tags_that_are_special_tokens_are_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]}, replace_extra_special_tokens=False)
    with pytest.raises(ConfigError, match="answer_format: .*'<think>' is a special token"):
        check_visible(WORKED, tokenizer, "answer_format")
    check_visible("<answer>{answer}</answer>", tokenizer, "answer_format")
    tokenizer.add_tokens([AddedToken("<answer>", special=True)], special_tokens=True)  # without a role
    with pytest.raises(ConfigError, match="'<answer>' is a special token"):
        check_visible("<answer>{answer}</answer>", tokenizer, "answer_format")
