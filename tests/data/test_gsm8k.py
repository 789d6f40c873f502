"""GSM8K: gold answers, solutions, sources, and errors that name the record."""

import json
import re

import pytest
from repo import GSM8K, needs_gsm8k

from rolltune.data.gsm8k import gsm8k

RECORDS = [
    {"question": " Two and two? ", "answer": "2 + 2 = <<2+2=4>>4 apples.\nSo 4.\n#### 4"},
    {"question": "Price?", "answer": "900 * 2 = $<<900*2=1800>>1,800\n#### 1,800"},
    {"question": "Below?", "answer": "It is #1 of #### marks.\n#### -7 "},
    {"question": "Nothing?", "answer": "#### 007"},
]


def write_jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return str(path)


def write_parquet(path, records):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def test_records_become_problems(tmp_path):
    data = gsm8k(split="train", path=write_jsonl(tmp_path / "own.jsonl", RECORDS))
    assert [p.id for p in data] == [f"gsm8k/train/{i}" for i in range(4)]
    assert [p.answer for p in data] == ["4", "1800", "-7", "7"]
    assert data[0].messages == ({"role": "user", "content": "Two and two?"},)
    assert [p.solution for p in data] == [
        "2 + 2 = 4 apples.\nSo 4.",
        "900 * 2 = $1,800",
        "It is #1 of #### marks.",
        None,
    ]


def test_slices_keep_their_ids(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", RECORDS)
    assert [p.id for p in gsm8k(split="test", path=path, start=1, count=2)] == ["gsm8k/test/1", "gsm8k/test/2"]
    with pytest.raises(ValueError, match=r"gsm8k test .*start=4"):
        gsm8k(split="test", path=path, start=4)


@pytest.mark.parametrize("name", ["test.parquet", "main/test-00000-of-00001.parquet"])
def test_parquet_gives_the_same_problems(tmp_path, name):
    expected = list(gsm8k(split="test", path=write_jsonl(tmp_path / "own.jsonl", RECORDS)))
    file = write_parquet(tmp_path / "copy" / name, RECORDS)
    assert list(gsm8k(split="test", path=file)) == expected
    assert list(gsm8k(split="test", path=str(tmp_path / "copy"))) == expected


def test_folder_has_a_file_for_each_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", RECORDS[:1])
    write_jsonl(tmp_path / "test.jsonl", RECORDS[1:])
    assert [len(gsm8k(split=split, path=str(tmp_path))) for split in ("train", "test")] == [1, 3]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl, test\.parquet"):
        gsm8k(split="test", path=str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "a", "answer": "no marker 4"}, "'answer' .*'#### '"),
        ({"question": "a", "answer": "#### four"}, "integer such as .*, not 'four'"),
        ({"question": "a", "answer": "#### 3.5"}, "integer such as .*, not '3.5'"),
        ({"question": "a", "answer": "#### "}, "integer such as .*, not ''"),
        ({"question": "a", "answer": "#### ,"}, "integer such as .*, not ','"),
        ({"answer": "#### 4"}, "'question' .*not None"),
        ({"question": "a", "answer": 4}, "'answer' .*not 4"),
        ("{", "not JSON"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, bad, message):
    path = write_jsonl(tmp_path / "own.jsonl", [RECORDS[0], bad])
    with pytest.raises(ValueError, match=f"{re.escape(path)}:2: .*{message}"):
        gsm8k(split="train", path=path)


def test_malformed_parquet(tmp_path):
    path = write_parquet(tmp_path / "own.parquet", [RECORDS[0], {"question": "a", "answer": "4"}])
    with pytest.raises(ValueError, match=r"own\.parquet, record 1: 'answer'"):
        gsm8k(split="train", path=path)
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a Parquet file"):
        gsm8k(split="train", path=str(tmp_path / "broken.parquet"))


def test_paths_that_lead_nowhere(tmp_path):
    for path in (str(tmp_path / "nowhere"), "./own.jsonl", "folder/own.parquet"):
        with pytest.raises(ValueError, match=re.escape(f"path={path!r}")):
            gsm8k(split="train", path=path)
    (tmp_path / "own.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"must be a \.jsonl or \.parquet file"):
        gsm8k(split="train", path=str(tmp_path / "own.csv"))
    with pytest.raises(ValueError, match="split='dev'"):
        gsm8k(split="dev", path=str(tmp_path))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("no configuration 'main'")])
def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch, error):
    import datasets

    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"(?s)path='openai/gsm8k'.*local copy.*gsm_symbolic") as caught:
        gsm8k(split="train")
    assert str(error) in str(caught.value)


def test_records_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [p.answer for p in gsm8k(split="test", count=2)] == ["4", "1800"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


@needs_gsm8k
def test_the_real_train_split():
    """Counts of the official file."""
    raw = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text("utf-8").split("\n") if line]
    data = gsm8k(split="train", path=str(GSM8K))
    assert len(data) == 7473
    finals = [record["answer"].split("#### ")[-1] for record in raw]
    assert sum("," in final for final in finals) == 79
    assert [p.answer for p in data] == [final.strip().replace(",", "") for final in finals]
    assert all(re.fullmatch(r"-?(0|[1-9][0-9]*)", p.answer or "") for p in data)
    assert sum((p.answer or "").startswith("-") for p in data) == 3
    assert sum("<<" in record["answer"] for record in raw) == 7378
    assert not any("<<" in (p.solution or "") or "####" in (p.solution or "") for p in data)
    assert sum(not p.messages[0]["content"].isascii() for p in data) == 308
    assert data[0].answer == "72" and data[0].messages[0]["content"].startswith("Natalia sold clips to 48")


@needs_gsm8k
def test_the_real_test_split():
    data = gsm8k(split="test", path=str(GSM8K))
    assert len(data) == 1000 and data[0].answer == "18"


@pytest.mark.parametrize("answer", ["1,5", "12,34", "1,2345", "1,234,5", "1,,800", "9" * 5000])
def test_a_comma_that_may_be_a_decimal_comma_is_refused(tmp_path, answer):
    path = write_jsonl(tmp_path / "own.jsonl", [*RECORDS, {"question": "?", "answer": f"#### {answer}"}])
    with pytest.raises(ValueError, match=r"own\.jsonl:5: the final answer after '####' must be an integer such as"):
        gsm8k(split="train", path=path)
