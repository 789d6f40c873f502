"""Traces as SFT examples: the trained text, the controls, and mistakes."""

from dataclasses import replace

import pytest

from rolltune.data.traces import traces
from rolltune.prompts import worked_response
from rolltune.traces import Trace
from rolltune.traces.record import to_line
from rolltune.types import Problem

THINKING = "3 + 5 = 8, no. 8 * 2 = 16."
RESPONSE = f"<think>{THINKING}</think>\n<answer>(3 + 5) * 2</answer>"
PROBLEM = Problem(
    id="c/0",
    messages=({"role": "system", "content": "Go."}, {"role": "user", "content": "Make 16 from 3, 5 and 2."}),
    answer="2 * (3 + 5)",
    solution="3 + 5 = 8. 8 * 2 = 16.",
)
TRACE = Trace(problem=PROBLEM, sample=0, response=RESPONSE, correct=True, condition="c")


def trace(name, sample=0, correct=True, answer=PROBLEM.answer, response=RESPONSE) -> Trace:
    problem = replace(PROBLEM, id=name, answer=answer)
    return replace(TRACE, problem=problem, sample=sample, correct=correct, response=response)


@pytest.fixture
def write(tmp_path):
    def write(*found: Trace) -> str:
        path = tmp_path / "traces.jsonl"
        path.write_bytes(b"".join(map(to_line, found)))
        return str(path)

    return write


def test_a_trace_becomes_an_example(write):
    (example,) = traces(path=write(TRACE))
    assert example == replace(PROBLEM, id="c/0#0", solution=RESPONSE)
    assert worked_response(example, "{solution}") == RESPONSE  # what sft trains on


def test_the_stated_answer_stands_in_for_one_that_is_not_known(write):
    (example,) = traces(path=write(trace("a", answer=None, response=RESPONSE.replace("(3 + 5) * 2", " 41\n"))))
    assert example.answer == "41"


def test_order_ids_and_slices(write):
    path = write(trace("b", 0), trace("b", 1), trace("a", 0), trace("a", 1))
    assert [e.id for e in traces(path=path)] == ["b#0", "b#1", "a#0", "a#1"]
    assert [e.id for e in traces(path=path, start=1, count=2)] == ["b#1", "a#0"]
    with pytest.raises(ValueError, match=r"keep=all: count=5"):
        traces(path=path, count=5)


MIXED = [trace("a", correct=True), trace("b", correct=False), trace("c", correct=None), trace("d", correct=False)]


@pytest.mark.parametrize(
    ("keep", "left"), [("all", ["a", "b", "c", "d"]), ("correct", ["a"]), ("incorrect", ["b", "d"])]
)
def test_keep(write, keep, left):
    assert [e.id for e in traces(path=write(*MIXED), keep=keep)] == [f"{name}#0" for name in left]


def test_the_slice_is_of_what_is_kept(write):
    assert [e.id for e in traces(path=write(*MIXED), keep="incorrect", start=1)] == ["d#0"]
    with pytest.raises(ValueError, match="keep=incorrect: start=2"):
        traces(path=write(*MIXED), keep="incorrect", start=2)


def test_nothing_left(write):
    with pytest.raises(ValueError, match="keep=correct .* 0 are correct, 2 incorrect, 1 unscored"):
        traces(path=write(*MIXED[1:]), keep="correct")


def test_empty_thinking(write):
    (example,) = traces(path=write(TRACE), thinking="empty")
    assert example.solution == "<think> </think>\n<answer>(3 + 5) * 2</answer>"
    assert example.answer == PROBLEM.answer and example.messages == PROBLEM.messages


def test_tags_that_are_spoken_of_later_stay(write):
    response = "<think>a</think> <think>b</think> <answer>4</answer>"
    (example,) = traces(path=write(trace("a", response=response)), thinking="empty")
    assert example.solution == "<think> </think> <think>b</think> <answer>4</answer>"


@pytest.mark.parametrize("length", [1, 2, 3, 26, 99])
def test_dots_are_as_long_as_the_thinking(write, tiny_llama, length):
    """The tokenizer of this model has a token a byte: two for each " .", so an odd length is missed by one."""
    response = f"<think>{'x' * length}</think>\n<answer>4</answer>"
    (example,) = traces(path=write(trace("a", response=response)), thinking="dots", tokenizer=str(tiny_llama))
    thinking = example.solution.removeprefix("<think>").removesuffix("</think>\n<answer>4</answer>")
    assert thinking == " ." * (len(thinking) // 2) and thinking
    assert abs(len(thinking) - length) == length % 2


def test_dots_where_a_dot_is_a_token(write, tmp_path):
    """As with the tokenizers of most models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|end|>", "\u0120.", "\u0120", "3", "+", "5"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    response = "<think>3 + 5 + 3 + 5</think>\n<answer>16</answer>"  # 7 words
    (example,) = traces(path=write(trace("a", response=response)), thinking="dots", tokenizer=str(tmp_path / "model"))
    assert example.solution == f"<think>{' .' * 7}</think>\n<answer>16</answer>"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "nowhere.jsonl"}, "path='nowhere.jsonl'"),
        ({"keep": "right"}, "keep='right'"),
        ({"thinking": "none"}, "thinking='none'"),
        ({"thinking": "dots"}, "thinking=dots needs tokenizer"),
        ({"tokenizer": "x"}, "tokenizer='x' .*thinking=written"),
        ({"thinking": "empty", "tokenizer": "x"}, "tokenizer='x' .*thinking=empty"),
    ],
)
def test_bad_options(write, options, says):
    with pytest.raises(ValueError, match=f"^traces: {says}"):
        traces(**{"path": write(TRACE), **options})


def test_bad_files(write, tmp_path):
    with pytest.raises(ValueError, match="no traces"):
        traces(path=write())
    path = write(TRACE, trace("b"))
    lines = (tmp_path / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "traces.jsonl").write_bytes(b"".join([lines[0], b"{}\n", lines[1]]))
    with pytest.raises(ValueError, match=r"traces\.jsonl:2: problem: "):
        traces(path=path)
    (tmp_path / "traces.jsonl").write_bytes(b"".join(lines)[:-9])  # cut off: dropped
    assert [e.id for e in traces(path=path)] == ["c/0#0"]
    with pytest.raises(ValueError, match="^b#1: "):
        traces(path=write(trace("b", 1, response="16")))
