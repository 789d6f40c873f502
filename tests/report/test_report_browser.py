"""The page in a headless Chromium: what it shows, what it runs, and what it asks the network for."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from report_folders import write_step

from rolltune.report import write_report
from rolltune.report.serve import WatchServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><svg onload=window.hacked=1>"
    "<a href='javascript:window.hacked=1'>x</a>\x1b]0;title\x07\x1b[2J\u202eright to left {{7*7}} ${7*7}\u2028"
)
DRAWN = """canvas => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.some((value, i) => i % 4 === 3 && value > 0);
}"""


class Tab:
    """A page with everything that it complained of and asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready=yes]")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def wait_for_first(self, title: str) -> None:
        expect(self.page.locator("#groups h3").first).to_contain_text(title)

    def wait_for_count(self, text: str) -> None:
        expect(self.page.locator("#count")).to_have_text(text)


@pytest.fixture
def open_report(browser):
    tabs: list[Tab] = []

    def open_(folder: Path, **options: Any) -> Tab:
        tabs.append(Tab(browser, write_report([folder]).as_uri(), **options))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.page.close()


def test_a_run_opens_from_disk_with_its_curves(make_run, open_report):
    folder = make_run()
    tab = open_report(folder)
    tab.wait_for_count("2 prompts")
    assert tab.problems == [] and tab.requests == [(folder / "report.html").as_uri()]
    assert tab.page.title() == "run"
    assert tab.texts("figure strong")[:2] == ["Reward", "Reward parts"]
    assert all(tab.page.locator("canvas").evaluate_all(f"all => all.map({DRAWN})"))
    figure = tab.page.locator("figure").first
    assert figure.locator("output").inner_text() == "0.4"
    figure.locator(".plot").focus()
    tab.page.keyboard.press("ArrowRight")
    assert figure.locator(".at").inner_text() == "step 1" and figure.locator("output").inner_text() == "0.1"
    figure.locator("summary").click()
    expect(figure.locator("tbody tr")).to_have_text(["10.1", "20.2", "30.3", "40.4"])
    figure.locator(".legend button").click()
    assert figure.locator(".legend button").get_attribute("aria-pressed") == "false"
    assert "the mismatch of sampler and trainer grew" in tab.page.locator("#warnings").inner_text()
    assert "is_short" in tab.page.locator("#tables").inner_text()
    assert tab.problems == []


def test_samples_are_filtered_and_searched(make_run, open_report):
    folder = make_run()
    file = folder / "samples/step_000004.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[2]["token_gaps"] = [0.0005, -0.05, 0.7]  # sums/1, which has the most reward
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tab = open_report(folder)
    page = tab.page
    assert tab.texts("#groups h3") == ["step 4 · sums/0 mean reward 0.2", "step 4 · sums/1 mean reward 0.41"]
    assert tab.texts("#groups .completion:nth-child(2) .flag") == ["truncated", "unscored", "judge_down", "no gradient"]
    assert page.locator("#groups .top").count() == page.locator("#groups .bottom").count() == 1
    page.select_option("#place", "2")
    tab.wait_for_first("step 2 · sums/0")
    for name, first, count in (
        ("best", "step 4 · sums/1", "8 prompts"),
        ("worst", "step 1 · sums/0", "8 prompts"),
        ("changed", "step 1 · sums/1", "4 prompts"),
        ("unscored", "step 1 · sums/1", "4 prompts"),
        ("truncated", "step 1 · sums/1", "4 prompts"),
    ):
        page.select_option("#filter", name)
        tab.wait_for_count(count)
        tab.wait_for_first(first)
    page.select_option("#filter", "best")
    page.fill("#query", "STEP 3 problem 1")
    tab.wait_for_count("1 prompt")
    tab.wait_for_first("step 3 · sums/1")
    assert tab.texts("#groups mark") == ["step 3 problem 1"] * 2
    page.fill("#query", "nowhere")
    tab.wait_for_count("0 prompts")
    page.fill("#query", "It is short")  # a judge's reason
    tab.wait_for_count("8 prompts")
    page.select_option("#colour", "logprob")
    page.wait_for_selector("#groups .t4")
    assert tab.texts("#groups .completion:first-child pre")[0] == "<t0><t1><t2>"
    assert page.locator("#groups .t2").first.get_attribute("title") == "log-prob -1, probability 0.368"
    page.select_option("#colour", "gap")
    page.wait_for_selector("#key:has-text('Difference of the log-probs')")
    coloured = page.locator("#groups pre span[class^=t]")
    assert [coloured.nth(i).get_attribute("class") for i in range(coloured.count())] == ["t0", "t2", "t4"]
    assert coloured.nth(1).get_attribute("title") == "log-prob of the trainer minus that of the sampler: -0.05"
    assert tab.problems == []


def test_hostile_samples_do_nothing(make_run, open_report):
    folder = make_run(text=HOSTILE + "A" * 1_000_000, config=f"num_steps: 8\nname: {json.dumps(HOSTILE)}\n")
    records = [json.loads(line) for line in (folder / "samples/step_000004.jsonl").read_text().split("\n")[:-1]]
    records[0] |= {"problem": HOSTILE, "answer": HOSTILE, "notes": {HOSTILE: HOSTILE}, "parts": {HOSTILE: 1.0}}
    records[0] |= {"messages": [{"role": HOSTILE, "content": HOSTILE}], "token_texts": [HOSTILE], "failure": HOSTILE}
    (folder / "samples/step_000004.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": 0.0, f"reward/{HOSTILE.replace('/', '')}/mean": 1.0}) + "\n")
    tab = open_report(folder)
    tab.page.select_option("#colour", "logprob")
    tab.page.wait_for_selector("#groups .t0")
    tab.page.select_option("#colour", "none")
    tab.page.wait_for_selector("#groups pre button")
    tab.page.locator("#groups details").first.evaluate("details => { details.open = true; }")
    text = tab.page.locator("#groups").inner_text()
    assert "</script><script>window.hacked" in text and "\\x1b]0;title\\x07" in text and "\\u202eright" in text
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("#main img, #main svg, #main script, #main a[href^=javascript]").count() == 0
    assert "\x1b" not in tab.page.content() and "\u202e" not in tab.page.content()
    tab.page.get_by_text("Show all 10").first.click()
    assert tab.problems == [] and len(tab.requests) == 1


def test_the_policy_stops_what_the_script_would_let_through(make_run, open_report):
    """The second line of defence: even an element made from markup neither runs nor loads anything."""
    tab = open_report(make_run())
    tab.page.evaluate("html => { document.getElementById('main').innerHTML = html; }", HOSTILE)
    tab.page.evaluate("""() => { const s = document.createElement("script"); s.textContent = "window.hacked = 2";
                                 document.body.append(s); }""")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in problem for problem in tab.problems)


def test_an_evaluation_on_a_phone_in_the_dark(evaluation_folder, open_report):
    tab = open_report(evaluation_folder, viewport={"width": 375, "height": 700}, color_scheme="dark")
    assert tab.texts("figure strong") == ["pass@k", "Accuracy by completion length", "Accuracy by difficulty"]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    tab.page.select_option("#filter", "single")
    tab.wait_for_count("6 prompts")
    assert [h.split(" mean")[0] for h in tab.texts("#groups h3")[:2]] == ["model base · p4", "model trained · p4"]
    assert tab.problems == []


def test_paper_is_white(make_run, open_report):
    tab = open_report(make_run(), color_scheme="dark")
    tab.page.emulate_media(media="print")
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.page.locator("nav").is_visible()


def test_a_large_run_opens_at_once(make_run, open_report):
    """1,000 steps of 64 completions: the texts are unpacked when they are shown."""
    folder = make_run(steps=1)
    record = json.loads((folder / "samples/step_000001.jsonl").read_text().splitlines()[0])
    base = (folder / "metrics.jsonl").read_text()
    with (folder / "metrics.jsonl").open("a") as metrics:
        for step in range(2, 1001):
            metrics.write(base.replace('"step": 1,', f'"step": {step},'))
            texts = [f"{step} {i} {base64.b64encode(random.randbytes(480)).decode()}" for i in range(64)]
            lines = [
                json.dumps(record | {"problem": f"p{step}-{i // 8}", "group": i // 8, "text": text})
                for i, text in enumerate(texts)
            ]
            (folder / f"samples/step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    tab = open_report(folder)
    tab.wait_for_count("8 prompts")
    seconds = tab.page.evaluate("performance.now()") / 1000
    print(f"opened in {seconds:.2f} s, {(folder / 'report.html').stat().st_size / 2**20:.1f} MiB")
    tab.page.fill("#query", "777 63 ")
    tab.wait_for_count("1 prompt")
    tab.wait_for_first("step 777 · p777-7")
    assert tab.problems == []


def test_watching_a_run_and_stopping_it(make_run, browser):
    folder = make_run()
    with WatchServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = Tab(browser, server.url)
        tab.wait_for_count("2 prompts")
        write_step(folder, 5)
        expect(tab.page.locator("#groups h3").first).to_contain_text("step 5", timeout=20_000)
        assert tab.page.locator("figure output").first.inner_text() == "0.5"
        assert "Following run; last change" in tab.page.locator("#live").inner_text()
        tab.page.click("#stop")
        assert not (folder / "stop").exists(), "one click may be a slip"
        tab.page.click("#stop")
        deadline = time.monotonic() + 10
        while not (folder / "stop").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (folder / "stop").exists()
        tab.page.wait_for_selector("#stop:disabled")
        assert all(url.startswith(server.url) for url in tab.requests) and tab.problems == []
        server.shutdown()
    expect(tab.page.locator("#live")).to_contain_text("is gone", timeout=20_000)
    tab.page.close()
