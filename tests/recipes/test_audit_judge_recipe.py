"""Whole runs of audit_judge: judges with known faults behind a real socket, and what the audit says of them."""

import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from endpoint_options import as_config
from fault_server import FaultServer, error, ok
from tiny_run import ROOT, load_recipe

from rolltune.config.schema import AuditJudgeConfig
from rolltune.data.judge_labelled import judge_labelled
from rolltune.rewards.judges.delimit import delimited, neutral
from rolltune.run import checks

KEY = "sk-secret/0123456789"
RESPONSES = judge_labelled()
LABELS = {label.id: label for response in RESPONSES for label in response.labels}
SATISFIED = sum(label.satisfied for label in LABELS.values())
FENCED = {delimited(response.text, name="response"): response for response in RESPONSES}

PLANTED = '''
class SeedlessJudge:
    """Passes everything, without an endpoint."""
    name = "planted"
    stop_reason = None

    async def ask(self, question):
        from rolltune.rewards.judges.judge import Answer
        count = question.answer.model_json_schema()["properties"]["verdicts"]["minItems"]
        verdicts = [{"number": n + 1, "reason": "", "grade": 1} for n in range(count)]
        value = question.answer.model_validate({"verdicts": verdicts})
        return Answer(value=value, failure=None, text="", judge=self.name, cached=False)

    def metrics(self):
        return {"questions": 7.0}

    async def aclose(self):
        pass

def numbers():
    return [1, 2]
'''


def judge(grade):
    """A judge that grades by ``grade(response, label, place, places, request)``, True or False."""

    def script(call, request):
        asked = request["messages"][1]["content"]
        (response,) = [response for shown, response in FENCED.items() if shown in asked]
        listed = re.search(
            r"=== criteri(?:a|on) (\w+) begins ===\n(.*?)\n=== criteri(?:a|on) \1 ends", asked, re.DOTALL
        )
        assert listed is not None
        lines = listed[2].splitlines()
        found = [re.fullmatch(r"(?:(\d+)\. )?(.*)", line) for line in lines]
        labels = {neutral(f"{c.title}: {c.description}"): label for label in response.labels for c in [label.criterion]}
        verdicts = [
            {
                "number": int(line[1] or 1),
                "reason": f"By {labels[line[2]].id}.",
                "grade": int(grade(response, labels[line[2]], place, len(lines), request)),
            }
            for place, line in enumerate(found, start=1)
            if line is not None
        ]
        if "=== criteria " in asked:
            return ok("I went through it.\n" + json.dumps({"verdicts": verdicts}))
        return ok(json.dumps({"reason": verdicts[0]["reason"], "grade": verdicts[0]["grade"]}))

    return script


def perfect(response, label, place, places, request):
    return label.satisfied


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    (tmp_path / "planted_judges.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_judges", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def make_file(tmp_path):
    def make(server: FaultServer | None, name="out", **changes) -> Path:
        node = {
            "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
            **as_config(
                **{
                    "base_url": server.base_url if server else "http://127.0.0.1:9/v1",
                    "api_key_env": "OPENAI_API_KEY",
                    "model": "tiny",
                    "max_attempts": 1,
                    "max_concurrency": 4,  # what the test's server has room for in its queue of connections
                }
                | changes.pop("judge", {})
            ),
        }
        tree = {
            "output_dir": str(tmp_path / name),
            "data": {"_component_": "rolltune.data.judge_labelled.judge_labelled"},
            "judge": node,
            "resamples": 300,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree | changes))
        return tmp_path / f"{name}.yaml"

    return make


@pytest.fixture
def audit(make_file, tmp_path):
    """Run the recipe against a script; returns its exit status and audit.json."""

    def run(script, name="out", **changes):
        with FaultServer(script) as server:
            file = make_file(server, name, **changes)
            try:
                load_recipe("audit_judge").run(checks.validate(AuditJudgeConfig, str(file)))
                status = 0
            except SystemExit as stop:
                status = stop.code
            run.calls = server.calls
        return status, json.loads((tmp_path / name / "audit.json").read_text())

    return run


def verdicts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


# --- judges -----------------------------------------------------------------------------------------------------------


def test_a_perfect_judge(audit, tmp_path, capsys):
    status, found = audit(judge(perfect), min_accuracy=0.99, min_kappa=0.99)
    assert status == 0 and len(audit.calls) == len(RESPONSES) == found["responses"]
    assert (found["accuracy"]["value"], found["accuracy"]["of"]) == (1, len(LABELS))
    assert found["kappa"]["value"] == 1 and 0.9 < found["kappa"]["low"] < 1
    assert found["false_positive_rate"] | {"of": 0} == {
        "value": 0,
        "low": 0,
        "of": 0,
        "high": pytest.approx(0.0385, abs=1e-4),
    }
    assert (
        found["false_negative_rate"]["value"] == found["unscored"]["value"] == found["injection_passed"]["value"] == 0
    )
    assert found["length_false_pass"]["value"] is None and found["orders"] is None and found["repeats"] is None
    assert found["cost"]["calls"] == found["cost"]["replies"] == len(RESPONSES) and found["cost"]["cache_hits"] == 0
    assert found["cost"]["prompt_tokens"] == 10 * len(RESPONSES) and found["cost"]["seconds_a_reply"] > 0
    rows = verdicts(tmp_path / "out")
    assert [row["id"] for row in rows] == list(LABELS)
    assert all(row["right"] and row["reason"] == f"By {row['id']}." and row["failure"] is None for row in rows)
    assert rows[0]["judge"].startswith("tiny@127.0.0.1") and (tmp_path / "out/config.yaml").exists()
    shown = capsys.readouterr().out
    assert re.search(r"accuracy +\| 1\.000 \(0\.983 to 1\.000\) \| 225 ", shown), shown
    assert "correlation of false positives with length" in shown and "depend on the order" not in shown


def test_a_judge_that_always_passes(audit, capsys):
    status, found = audit(judge(lambda *_: True), min_kappa=0.5)
    assert found["kappa"]["value"] == 0 and found["accuracy"]["value"] == pytest.approx(SATISFIED / len(LABELS))
    assert found["false_positive_rate"]["value"] == 1 and found["false_negative_rate"]["value"] == 0
    assert found["injection_passed"]["value"] == found["other_passed"]["value"] == 1
    assert status == 1
    assert capsys.readouterr().err.startswith("audit_judge: min_kappa: 0.5; kappa is 0.000")


def test_verdicts_that_are_not_given_are_not_wrong(audit, tmp_path):
    def script(call, request):
        asked = request["messages"][1]["content"]
        if "boil at sea level" in asked:
            return error(500, "out of memory")
        if "capital of Australia" in asked:
            return ok('{"verdicts": [{"number": 1', finish_reason="length")
        if "Pride and Prejudice" in asked:
            return ok("I would rather not say.")
        return judge(perfect)(call, request)

    def count(text):
        return sum(len(r.labels) for r in RESPONSES if text in r.problem.messages[0]["content"])

    status, found = audit(script)
    down, cut, unread = map(count, ("boil at sea level", "capital of Australia", "Pride and Prejudice"))
    assert status == 0 and found["failures"] == {"judge_down": down, "judge_cut": cut, "judge_unparseable": unread}
    assert found["accuracy"]["value"] == 1 and found["accuracy"]["of"] == len(LABELS) - down - cut - unread
    assert found["unscored"]["value"] == pytest.approx((down + cut + unread) / len(LABELS))
    row = next(row for row in verdicts(tmp_path / "out") if row["id"].startswith("boiling/"))
    assert row["passed"] is row["right"] is row["reason"] is None and row["failure"] == "judge_down"


def test_a_judge_that_likes_length_is_found(audit):
    """It is right on short responses and passes all of the long ones. One that errs by chance is not taken for it."""
    _, found = audit(judge(lambda response, label, *_: label.satisfied or response.words > 25))
    assert found["length_false_pass"]["low"] > 0.6
    short, medium, long = found["length"]
    assert short["unsatisfied_passed"]["value"] == 0 < medium["unsatisfied_passed"]["value"]
    assert long["unsatisfied_passed"]["value"] == 1
    _, found = audit(judge(lambda _, label, *__: label.satisfied != (zlib.crc32(label.id.encode()) % 4 == 0)), "noise")
    assert found["length_false_pass"]["low"] < 0 < found["length_false_pass"]["high"]
    assert found["length_error_sign"]["low"] < 0 < found["length_error_sign"]["high"]


def test_a_judge_that_follows_orders_is_found(audit):
    _, found = audit(judge(lambda _, label, *__: label.satisfied or label.injection))
    assert found["injection_passed"]["value"] == 1 and found["other_passed"]["value"] == 0


def test_a_judge_that_takes_bad_for_failed_is_found(audit):
    """It says of each criterion whether that is good news, and not whether it is satisfied."""
    _, found = audit(judge(lambda _, label, *__: label.satisfied == label.criterion.is_good))
    assert found["accuracy_where_good"]["value"] == 1 and found["accuracy_where_bad"]["value"] == 0


def test_a_judge_that_passes_what_stands_first_is_found(audit, tmp_path, capsys):
    status, found = audit(judge(lambda _, label, place, *__: place == 1), reversed=True)
    assert status == 0 and found["verdicts"] == 2 * len(LABELS) and len(audit.calls) == 2 * len(RESPONSES)
    assert [row["passed"]["value"] for row in found["places"]] == [1, 0, 0, 0]
    # In each list the first and the last change places, and with them their verdicts.
    flipped = 2 * len(RESPONSES)
    assert found["orders"]["flipped"]["value"] == pytest.approx(flipped / len(LABELS))
    assert (found["orders"]["passed_when_earlier"], found["orders"]["passed_when_later"]) == (flipped, 0)
    assert found["orders"]["p"] < 1e-6
    first, second = (
        [row for row in verdicts(tmp_path / "out") if row["reversed"] == reversed] for reversed in (False, True)
    )
    assert [row["id"] for row in first] == [row["id"] for row in second] == list(LABELS)
    assert (first[0]["place"], second[0]["place"]) == (1, len(RESPONSES[0].labels))
    assert f"{flipped} pass when the criterion comes earlier, 0 when" in capsys.readouterr().out


def test_the_order_is_nothing_to_a_perfect_judge(audit):
    _, found = audit(judge(perfect), reversed=True, data=TEN)
    assert found["orders"]["flipped"]["value"] == 0 and found["orders"]["p"] == 1
    assert all(row["accuracy"]["value"] == 1 for row in found["places"])


TEN = {"_component_": "rolltune.data.judge_labelled.judge_labelled", "count": 10}
OF_TEN = [label for response in RESPONSES[:10] for label in response.labels]


def test_repeats_differ_by_seed(audit, tmp_path):
    """Its seed decides of every criterion: of the three it is given two are odd."""
    script = judge(lambda _, label, place, places, request: request["seed"] % 2 == 1)
    _, found = audit(script, repeats=3, data=TEN, judge={"seed": 5, "cache": str(tmp_path / "cache.sqlite")})
    assert {call.request["seed"] for call in audit.calls} == {5, 6, 7} and len(audit.calls) == 30
    assert found["repeats"]["unanimous"]["value"] == 0 and found["repeats"]["agreement"] == pytest.approx(1 / 3)
    assert found["verdicts"] == 3 * len(OF_TEN) and found["accuracy"]["of"] == len(OF_TEN)
    assert found["cost"]["calls"] == 30  # of all repeats


def test_a_call_for_each_criterion(audit):
    status, found = audit(judge(perfect), one_call=False, data=TEN)
    assert status == 0 and len(audit.calls) == len(OF_TEN)
    assert found["accuracy"]["value"] == 1 and found["places"] == []


def test_a_template_of_ones_own(audit, tmp_path):
    mine = "Be strict. The verdicts are JSON.\n---\n${problem}\n${criteria}\n${response}"
    (tmp_path / "mine.md").write_text(mine)
    _, found = audit(judge(perfect), template=str(tmp_path / "mine.md"), data=TEN)
    assert audit.calls[0].request["messages"][0]["content"].startswith("Be strict.") and found["accuracy"]["value"] == 1


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_second_run_over_the_cache_asks_nothing(audit, tmp_path):
    changes = {"reversed": True, "repeats": 2, "data": TEN, "judge": {"cache": str(tmp_path / "cache.sqlite")}}
    before = audit(judge(perfect), **changes)[1]
    assert len(audit.calls) == before["cost"]["calls"] == 30

    # At another address the cache would not know the questions: the same server has to come back.
    port = int(before["judge"].rpartition(":")[2])
    after = again(tmp_path / "out.yaml", port)
    assert after["cost"]["calls"] == 0 and after["cost"]["cache_hits"] == 30
    assert {key: value for key, value in after.items() if key != "cost"} == {
        key: value for key, value in before.items() if key != "cost"
    }


def again(file: Path, port: int) -> dict:
    """The same config once more, with nobody at its address."""
    assert str(port) in file.read_text()
    cfg = checks.validate(AuditJudgeConfig, str(file))
    load_recipe("audit_judge").run(cfg)
    return json.loads((Path(cfg.output_dir) / "audit.json").read_text())


def test_a_cap_stops_it_and_says_so(audit, tmp_path, capsys):
    cache = str(tmp_path / "cache.sqlite")
    status, found = audit(judge(perfect), data=TEN, judge={"max_calls": 4, "max_concurrency": 1, "cache": cache})
    assert status == 1 and len(audit.calls) == 4
    assert found["failures"] == {"judge_budget": sum(len(response.labels) for response in RESPONSES[4:10])}
    assert found["accuracy"]["value"] == 1
    said = capsys.readouterr().err
    assert re.search(r"^audit_judge: tiny@\S+: max_calls: the cap of 4 is reached .*", said)


def test_nobody_at_the_address(audit, capsys):
    status, found = audit(lambda call, request: error(503, "later"), data=TEN, min_accuracy=0.5)
    assert status == 1 and found["accuracy"]["value"] is None and found["unscored"]["value"] == 1
    assert capsys.readouterr().err == f"audit_judge: there was no verdict ({len(OF_TEN)} judge_down)\n"


def test_both_thresholds(audit, capsys):
    status, _ = audit(judge(lambda _, label, *__: not label.satisfied), data=TEN, min_accuracy=0.8, min_kappa=0.6)
    said = capsys.readouterr().err.splitlines()
    assert status == 1 and said[0].startswith("audit_judge: min_accuracy: 0.8; accuracy is 0.000")
    assert said[1].startswith("audit_judge: min_kappa: 0.6; kappa is -")


def test_a_threshold_of_what_has_no_value_is_not_passed(audit, tmp_path, capsys):
    """All that is labelled is satisfied and passes: agreement by chance is 1, and kappa 0 / 0."""
    response, label = next((r, label) for r in RESPONSES for label in r.labels if label.satisfied)
    criterion = label.criterion.model_dump(exclude_none=True)
    row = {"id": label.id, "problem": response.problem.messages[0]["content"], "response": response.text}
    (tmp_path / "own.jsonl").write_text(json.dumps(row | {"criterion": criterion, "satisfied": True}) + "\n")
    data = {"_component_": "rolltune.data.judge_labelled.judge_labelled", "path": str(tmp_path / "own.jsonl")}
    status, found = audit(judge(perfect), data=data, min_accuracy=1.0, min_kappa=0.0)
    assert status == 1 and found["accuracy"]["value"] == 1 and found["kappa"]["value"] is None
    assert capsys.readouterr().err.startswith("audit_judge: min_kappa: 0; kappa is undefined")


def test_as_a_command(make_file, tmp_path):
    """Exit status and output of a process; the key is in nothing that it writes."""
    with FaultServer(judge(lambda *_: False)) as server:
        file = make_file(server, min_accuracy=0.9, data=TEN, judge={"cache": str(tmp_path / "out/cache.sqlite")})
        done = subprocess.run(
            [sys.executable, str(ROOT / "recipes/audit_judge.py"), "--config", str(file)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert all(call.headers["authorization"] == f"Bearer {KEY}" for call in server.calls)
    unsatisfied = sum(not label.satisfied for label in OF_TEN) / len(OF_TEN)
    assert done.returncode == 1, done.stderr
    assert f"audit_judge: min_accuracy: 0.9; accuracy is {unsatisfied:.3f}" in done.stderr
    assert "Traceback" not in done.stderr
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(written) > 1000 and KEY.encode() not in written and KEY not in done.stdout + done.stderr


def test_a_wrong_key_ends_it(audit, tmp_path):
    with pytest.raises(ValueError, match="OPENAI_API_KEY is refused"):
        audit(lambda call, request: error(401, f"{KEY} is no key of ours"), data=TEN)
    assert not (tmp_path / "out/audit.json").exists()


def test_dry_run_asks_nothing(make_file, tmp_path, capsys):
    with FaultServer(judge(perfect)) as server:
        file = make_file(server, dry_run=True, reversed=True, repeats=2)
        load_recipe("audit_judge").run(checks.validate(AuditJudgeConfig, str(file)))
    shown = capsys.readouterr().out
    assert not server.calls and not (tmp_path / "out").exists()
    assert RESPONSES[0].text in shown and "You check a response against a list of criteria" in shown
    assert f"{3 * len(RESPONSES)} questions about {len(LABELS)} labelled verdicts ({SATISFIED} satisfied)" in shown


# --- configs ----------------------------------------------------------------------------------------------------------


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError) as wrong:
        checks.validate(AuditJudgeConfig, str(file), overrides)
    return str(wrong.value).splitlines()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("judge.seeds=1", "judge.seeds: EndpointJudge takes no such argument; did you mean judge.seed"),
        (
            "judge.endpoint.modell=x",
            "judge.endpoint.modell: EndpointSettings takes no such argument; did you mean judge.end",
        ),
        ("judge.endpoint.base_url=here", "judge.endpoint.base_url: 'here'"),
        ("judge.temperature=3", "judge.temperature: 3"),
        ("judge={_component_: planted_judges.numbers}", "judge._component_: planted_judges.numbers; must be a"),
        ("one_call=false reversed=true", "reversed: true; has no effect while one_call is false"),
        ("repeats=0", "repeats: 0; must be >= 1"),
        ("resamples=10", "resamples: 10; must be >= 100"),
        ("min_accuracy=85", "min_accuracy: 85.0; must be in 0 .. 1"),
        ("min_kappa=-2", "min_kappa: -2.0; must be in -1 .. 1"),
        ("template=nowhere.md", "template: nowhere.md: No such file"),
        ("data._component_=rolltune.data.nothing", "data._component_: rolltune.data.nothing"),
        (
            "judge={_component_: planted_judges.SeedlessJudge} repeats=2",
            "repeats: 2; must be 1, as planted_judges.SeedlessJudge takes no seed",
        ),
    ],
)
def test_mistakes_are_named(make_file, override, says):
    overrides = re.split(r" (?=\w+=)", override)
    found = problems(make_file(None), *overrides)
    assert any(line.startswith(says) for line in found), found


def test_other_data_and_bad_lines_are_named(make_file, tmp_path):
    recipe = load_recipe("audit_judge")
    cfg = checks.validate(AuditJudgeConfig, str(make_file(None, data={"_component_": "planted_judges.numbers"})))
    with pytest.raises(ValueError, match=r"data._component_: planted_judges.numbers .*LabelledResponse"):
        recipe.run(cfg)
    (tmp_path / "own.jsonl").write_text('{"id": "a", "problem": "?", "response": "!", "satisfied": true}\n')
    data = {"_component_": "rolltune.data.judge_labelled.judge_labelled", "path": str(tmp_path / "own.jsonl")}
    with pytest.raises(ValueError, match=r"own.jsonl:1: criterion: Field required"):
        recipe.run(checks.validate(AuditJudgeConfig, str(make_file(None, data=data))))


def test_a_judge_of_ones_own(make_file, tmp_path):
    """Without an endpoint, a seed or the totals of one; it passes everything."""
    file = make_file(None, data=TEN)
    cfg = checks.validate(AuditJudgeConfig, str(file), ["judge={_component_: planted_judges.SeedlessJudge}"])
    load_recipe("audit_judge").run(cfg)
    found = json.loads((tmp_path / "out/audit.json").read_text())
    assert found["accuracy"]["of"] == len(OF_TEN) and found["failures"] == {}
    assert found["cost"] == {"questions": 7.0} and found["judge"] == "planted"
