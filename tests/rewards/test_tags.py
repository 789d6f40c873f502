from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.tags import parse_tags

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " ", "<"]), max_size=12)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>18</answer>", "18"),
        ("<think>w</think> <answer> 18\n</answer>", " 18\n"),
        ("<answer>17</answer> <answer>18</answer>", "18"),
        ("<answer>18</answer> <answer>19", "18"),  # the last block that is whole
        ("<answer>17 <answer>18</answer>", "18"),
        ("<answer>17</answer>18</answer>", "17</answer>18"),  # never cut to a clean 17 or 18
        ("<think>not closed <answer>18</answer>", "18"),
        ("<answer></answer>", ""),
        ("<think><answer>18</answer></think>", None),  # part of the working
        ("<answer>18</answer></think>", None),
        ("<think><answer>17</answer></think><answer>18</answer>", "18"),
        ("<answer>18", None),
        ("18</answer>", None),
        ("</answer>18<answer>", None),
        ("<Answer>18</Answer>", None),
        ("<answer >18</answer>", None),
        ("", None),
    ],
)
def test_the_last_whole_answer_block_behind_the_thinking_counts(text: str, answer: str | None) -> None:
    assert parse_tags(text).answer == answer


def test_layout_holds_what_is_inside_and_what_is_outside() -> None:
    layout = parse_tags("a<think>b</think>c<answer>d</answer>e").layout
    assert layout is not None
    assert (layout.think, layout.answer, layout.outside) == ("b", "d", "ace")


@pytest.mark.parametrize(
    "text",
    [
        "<think>b</think><answer>d",
        "<answer>d</answer><think>b</think>",
        "</think><think><answer>d</answer>",
        "<think><answer>d</answer></think>",
    ],
)
def test_no_layout_where_a_tag_is_missing_or_out_of_order(text: str) -> None:
    assert parse_tags(text).layout is None


def test_counts_every_tag() -> None:
    counts = parse_tags("<think><think></think><answer><answer><answer></answer>").counts
    assert counts == {"<think>": 2, "</think>": 1, "<answer>": 3, "</answer>": 1}


@given(PIECES)
def test_an_answer_is_always_what_stands_between_its_two_tags(pieces: list[str]) -> None:
    text = "".join(pieces)
    answer = parse_tags(text).answer
    if answer is not None:
        # Nothing that opens a block, or ends one or the thinking later, was skipped.
        start = text.rindex(f"<answer>{answer}</answer>")
        assert "<answer>" not in answer
        assert "</answer>" not in text[start + len(f"<answer>{answer}</answer>") :]
        assert "</think>" not in text[start:]


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<think>", "<answer></answer>", "<", "</think><answer>"])
def test_a_megabyte_of_tags_is_parsed(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    assert parse_tags(text).answer == ("" if piece == "<answer></answer>" else None)
