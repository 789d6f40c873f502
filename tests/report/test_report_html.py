"""The file that a report is written to."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re

from hypothesis import given
from hypothesis import strategies as st

from rolltune.report import write_report
from rolltune.report.html import json_in_html

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\ud800\x1b[2J&amp;"


@given(st.text() | st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_json_is_inert_and_reads_back(value):
    text = json_in_html(value)
    assert json.loads(text) == value
    assert text.isascii() and not re.search("[<>&\\x00-\\x1f]", text)


def test_json_of_hostile_text():
    assert json.loads(json_in_html([HOSTILE, float("nan")])) == [HOSTILE, None]
    assert "<" not in json_in_html(HOSTILE) and "\u2028" not in json_in_html(HOSTILE)


def test_a_report_is_one_file_with_a_strict_policy(make_run):
    folder = make_run(text=HOSTILE, config=f"num_steps: 8\nname: {HOSTILE[:40]!r}\n")
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "alert(1)" not in page.replace("\\u003cscript\\u003ealert(1)", ""), "it is in the packed samples only"
    assert not re.search(r"""\ssrc=|\shref=["']?http|\son\w+=["']|@import|url\(""", page.split("<script>")[0])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules and "unsafe" not in policy[1]
    for tag in ("script", "style"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert len(texts) == 2 and rules[f"{tag}-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)
    packs = re.findall(r'<script id="pack-[\w-]+" type="text/plain">([\w+/=]+)</script>', page)
    assert len(packs) == 4 and HOSTILE in json.loads(gzip.decompress(base64.b64decode(packs[-1])))[0]["completions"][0][
        "text"
    ]  # fmt: skip
