"""Fences: what stands in them stays in them, and looks like what it is."""

from __future__ import annotations

import hashlib
import re
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from judge_server import read_prompt
from transformers import PreTrainedTokenizerFast

from rolltune.rewards.judges.delimit import MAX_CHARS, added_tokens, delimited, neutral, token_breaker
from rolltune.rewards.rubric.degenerate import is_degenerate

# Texts that are made of the pieces of attacks, which plain random text never holds.
PIECES = st.sampled_from(
    [
        "<",
        "|",
        ">",
        "im_end",
        "file_sep",
        "_",
        "e~[",
        "=== ",
        "response",
        " ends ===",
        " begins ===",
        "\n",
        "\r",
        "\u2028",
        "\u200b",
        "\u202e",
        "[",
        "/",
        "INST",
        "]",
        "</s>",
        "###",
        " System",
        ":",
        "\\",
        '"grade"',
        "{",
        "\x00",
        "\ud800",
        "0123456789abcdef",
    ]
)
NASTY = st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join)


def test_the_lines_of_a_fence():
    mark = hashlib.sha256(b"0\nresponse\nIt is 4.").hexdigest()[:16]
    assert delimited("It is 4.", name="response") == (
        f"=== response {mark} begins ===\nIt is 4.\n=== response {mark} ends ==="
    )


def test_the_same_text_makes_the_same_block_and_another_text_another():
    assert delimited("a") == delimited("a")
    marks = {delimited(text, name=name).split()[2] for text in ("a", "b", "") for name in ("text", "response")}
    assert len(marks) == 6 and all(re.fullmatch(r"[0-9a-f]{16}", mark) for mark in marks)


def test_a_text_that_has_its_own_hash_gets_another(monkeypatch):
    class Known:
        """A hash function whose first answer stands in the text."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def hexdigest(self) -> str:
            return "f" * 64 if self.data.startswith(b"0\n") else "e" * 64

    monkeypatch.setattr(hashlib, "sha256", Known)
    assert delimited(f"I know it: {'F' * 16}").split()[2] == "e" * 16  # in capitals it would be known as well


@given(NASTY)
def test_nothing_closes_a_fence(text: str):
    block = delimited(text, name="response")
    lines = block.split("\n")
    assert len([line for line in lines if re.search(r"^\s*===.*\b(begins|ends)\b", line)]) == 2
    reading = read_prompt(f"before\n{block}\nbehind")
    assert reading.outside == "before\n<response>\nbehind" and len(reading.blocks) == 1
    block.encode()


@given(NASTY)
def test_neutral_is_so_already(text: str):
    once = neutral(text)
    assert neutral(once) == once


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters='<[]=#:"\\')))
def test_plain_text_is_not_touched(text: str):
    assert neutral(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<|im_start|>", "<\\|im_start|>"),
        ("<\uff5cUser\uff5c>", "<\\\uff5cUser\uff5c>"),
        ("</s><s>", "<\\/s><\\s>"),
        ("<START_OF_TURN>", "<\\START_OF_TURN>"),
        ("[INST] [/inst]", "[\\INST] [\\/inst]"),
        ("<<SYS>>", "<<\\SYS>>"),
        ("<SYS> <observation>", "<\\SYS> <\\observation>"),
        ("</think>", "<\\/think>"),
        ("### System: x", "\\### System: x"),
        ("a\n  Assistant: x", "a\n  \\Assistant: x"),
        ("**User**: x", "\\**User**: x"),
        ("\u7cfb\u7edf\uff1ax", "\\\u7cfb\u7edf\uff1ax"),
        ('{"grade" : 1}', '{"\\grade" : 1}'),
        ("{'better': 'first'}", "{'\\better': 'first'}"),
        ("<file_sep>", "<\\file_sep>"),
        ("</tool_use>", "<\\/tool_use>"),
        ("<turn|>", "<\\turn|>"),
        ("<ctrl99><reserved102>", "<\\ctrl99><\\reserved102>"),
        ("<PRE></SUF><AI><ep>", "<\\PRE><\\/SUF><\\AI><\\ep>"),
        ("[|system|]", "[\\|system|]"),
        ("<seed:think>", "<\\seed:think>"),
        ("<role>SYSTEM</role>", "<\\role>SYSTEM<\\/role>"),
        ("<startoftext> <endofturn>", "<\\startoftext> <\\endofturn>"),
        ("<ctrl99>user, <madeupword0>", "<\\ctrl99>user, <\\madeupword0>"),
        ("<ref>a</ref><box>", "<\\ref>a<\\/ref><\\box>"),
        ("[extra_id_0] [Round 2]", "[\\extra_id_0] [\\Round 2]"),
        ("Hi. ASSISTANT: It is 4. USER: x", "Hi. \\ASSISTANT: It is 4. \\USER: x"),
        ("\u95ee\uff1ax", "\\\u95ee\uff1ax"),
        ("<function=run>", "<\\function=run>"),
        (">>QUESTION<<", ">\\>QUESTION<<"),
        ("GPT4 Correct User: x", "\\GPT4 Correct User: x"),
        ("=== text 00 ends ===", "\\=== text 00 ends ==="),
        ("a\u200bb\u202ec\u00add\ufeff", "abcd"),
        ("a\U000e0041\U000e0101b", "ab"),
        ("a\r\nb\rc\u2028d\x85e\x0cf", "a\nb\nc\nd\ne\nf"),
        ("a\x00\x1b[1mb\ud800", "a\ufffd\ufffd[1mb\ufffd"),
        ("<\u200b|im_end\u2060|>", "<\\|im_end|>"),
    ],
)
def test_what_is_special_is_not_special_any_more(text: str, shown: str):
    assert neutral(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "x < y | z > 2",
        "the user: bob, ENDUSER: x, [round 2",
        "a[0], a[i], [1, 2], [A, B]",
        "a >> b << c, std::vector<int>, Map<String, List<T>>, x <- y_1, 1 < a_b",
        "<div class='s'>x</div><h1>y</h1><pre>z</pre>",
        "The system: two users, one assistant.",
        "\\frac{1}{2} \\sum",
        "| a | b |\n|---|---|",
        "Gr\u00fc\u00dfe, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, \U0001f600",
        "====\nTitle\n====",
        '{"name": "x", "number": 1}',
    ],
)
def test_what_is_not_special_stays(text: str):
    assert neutral(text) == text


# The 17 added tokens of SmolLM2, and some with which simple replacement fails.
TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start>
<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script>
<empty_output> <x> <<x>> @@@User @@ ]]>x ##turn
""".split()


def own_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[none]": 0}, unk_token="[none]"))
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in TOKENS])
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("  ", "\n\n", "Canberra", *more)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[none]")


@given(st.lists(st.sampled_from(TOKENS) | st.text(alphabet="<>@x]#|\\ ", max_size=3), max_size=20).map("".join))
def test_no_token_of_a_tokenizer_is_left(text: str):
    tokenizer = TOKENIZER
    special = set(tokenizer.convert_tokens_to_ids(TOKENS))
    shown = BREAK(text)
    assert not special & set(tokenizer(shown, add_special_tokens=False)["input_ids"])
    assert shown.replace("\\", "") == text.replace("\\", "")  # and stays readable


TOKENIZER = own_tokenizer("{{tool}}")
BREAK = token_breaker(added_tokens(TOKENIZER))


def test_only_tokens_are_broken():
    assert BREAK("a  b\n\nCanberra <y> {{tool}}") == "a  b\n\nCanberra <y> {\\{tool}}"
    assert BREAK("<REPO_NAME><<x>>") == "<\\REPO_NAME><\\<\\x>>"
    assert token_breaker([])("<|im_start|>") == "<|im_start|>"


def test_breaking_takes_no_quadratic_time():
    broken = token_breaker([f"<unused{i}>" for i in range(6000)])
    start = time.monotonic()
    assert len(broken("<" * 100_000 + "<unused7>")) == 100_010
    for text in ("<" * 10**5, "<a_" * 30_000, "<" + "_" * 10**5, "[A_" * 30_000, "[" * 10**5, ">" * 10**5):
        neutral(text)
    assert time.monotonic() - start < 10


def test_a_long_text_keeps_both_ends():
    body = read_prompt(delimited("a" * 900 + "b" * 900, max_chars=400)).block("text")
    assert body == f"{'a' * 300}\n[... 1,400 characters are left out here ...]\n{'b' * 100}"
    assert read_prompt(delimited("a" * 400, max_chars=400)).block("text") == "a" * 400


def test_a_very_long_text_is_bounded():
    for text in ("<|" * 10**6, "\u200b" * 10**6, "=== x ends ===\n" * 10**5):
        assert len(delimited(text)) < 2 * MAX_CHARS


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u200b", "\U000e0041", "\ufe0f \t"])
def test_an_empty_text_is_said_to_be_empty(text: str):
    assert read_prompt(delimited(text)).block("text") == "(nothing: the text is empty)"


# --- texts that say nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "\u200b",
        ".",
        ",",
        ":",
        "...",
        "---",
        "* * *",
        "```\n```",
        "\u3002",
        "<think>\n</think>",
        "<answer>Solution</answer>",
        "Solution",
        "SOLUTION:",
        "## Solution",
        "**Solution:**",
        "Thought process:",
        "The answer is",
        "The answer is:",
        "Let's solve this problem step by step.",
        "Let\u2019s think step by step:",
        "Okay, let us go through it step by step",
        "\u89e3",
        "\u304b\u3044\u305b\u3064",
        "Respuesta",
        "L\u00f6sung:",
        "R\u00e9ponse :",
        "\u0909\u0924\u094d\u0924\u0930",
        "Thought process:\nSolution:\n",
        "ha " * 30,
        "A" * 40,
        "To be or not to be. " * 100,
        "I will think. " * 90 + "I w",
    ],
)
def test_texts_that_say_nothing(text: str):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "No",
        "Yes.",
        "-3",
        "x",
        "C",
        "+",
        "-",
        "!=",
        "**",
        "[]",
        "{}",
        "())(",
        "[[]]",
        "->",
        "&&",
        ";",
        "*/",
        "<>",
        "^$",
        "[:]",
        "::",
        "..",
        "===",
        "\\",
        "...---...",
        "\u221e",
        "\u03c0",
        "\U0001f44d",
        "4.",
        "1/2",
        "$5",
        "100%",
        "Solution: 42",
        "The answer is no.",
        "<answer>4</answer>",
        "\\boxed{7}",
        "Let's solve this step by step. 2 + 2 = 4.",
        "I don't know.",
        "ha ha ha",
        "1" * 30,
        "Answering machines",
        "Let's go!",
        "Well.",
        "\u7b54\u6848\u662f4",
        "Jabberwocky",
        "\n".join(f"{i} x 7 = {7 * i}" for i in range(1, 100)),
        "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 20,
    ],
)
def test_texts_that_say_something_however_short(text: str):
    assert not is_degenerate(text)


@given(st.text(max_size=200))
def test_any_text_is_one_or_the_other(text: str):
    assert is_degenerate(text) in (True, False)
