"""Secrets from the environment are in no config that is printed or saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from rolltune import config
from rolltune.config import ConfigError


@dataclass
class Config:
    url: str = "http://h"
    extra: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


@pytest.fixture
def secret(monkeypatch) -> str:
    for name, value in (
        ("MY_API_KEY", "sk-123456"),
        ("DB_PASSWORD", "hunter2"),
        ("LONG_TOKEN", "sk-123456-long"),
        ("HOME_URL", "http://h"),
    ):
        monkeypatch.setenv(name, value)
    return "sk-123456"


def load(tmp_path, **tree: Any) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return config.load(Config, path)


def test_secrets_are_written_as_they_were_given(tmp_path, secret):
    given = {
        "url": "${oc.env:HOME_URL}",
        "extra": {"key": "${oc.env:MY_API_KEY}", "header": "Bearer ${oc.env:LONG_TOKEN}"},
        "names": ["${oc.env:DB_PASSWORD}", "x"],
    }
    cfg = load(tmp_path, **given)
    assert cfg.extra["key"] == secret and cfg.names[0] == "hunter2"  # the run has them
    config.save(cfg, tmp_path)
    saved = (tmp_path / "config.yaml").read_text()
    assert secret not in saved and "hunter2" not in saved
    assert config.read_saved(tmp_path) == given | {"url": "http://h"}
    assert config.load(Config, tmp_path / "config.yaml") == cfg  # and a run of the saved config has them again


def test_a_resumed_run_compares_the_text(tmp_path, secret, monkeypatch):
    """A key may have been changed meanwhile, and a config of an older version holds the value itself."""
    config.save(load(tmp_path, extra={"key": "${oc.env:MY_API_KEY}"}), tmp_path)
    before = config.read_saved(tmp_path)
    monkeypatch.setenv("MY_API_KEY", "sk-another")
    now = load(tmp_path, extra={"key": "${oc.env:MY_API_KEY}"})
    assert config.masked(before)["extra"] == config.masked(now.extra | {}) | {} == {"key": "${oc.env:MY_API_KEY}"}
    assert config.masked({"key": "sk-another"}) == {"key": "${oc.env:MY_API_KEY}"}


@pytest.mark.parametrize(
    "name", ["DB_PASS", "PROXY_AUTH", "GITHUB_PAT", "MYSQL_PWD", "SENTRY_DSN", "SLACK_WEBHOOK_URL"]
)
def test_secrets_have_many_names(name: str, monkeypatch):
    monkeypatch.setenv(name, "hunter2")
    assert config.masked(["hunter2"]) == [f"${{oc.env:{name}}}"]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HOME_DIR", "LANG", "PWD", "OLDPWD", "AUTHOR", "COMPASS"])
def test_other_variables_are_no_secrets(name: str, monkeypatch):
    monkeypatch.setenv(name, "something")
    assert config.masked(["something"]) == ["something"]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"url": "http://me:pass-word@h/v1"}, "url"),
        ({"extra": {"sampler": {"base_urls": ["http://h", "https://:pass-word@h"]}}}, "extra.sampler.base_urls[1]"),
        ({"names": ["postgres://pass-word@h"]}, "names[0]"),
    ],
)
def test_a_password_in_a_url_is_refused_wherever_it_is(tmp_path, tree, key: str):
    with pytest.raises(ConfigError) as wrong:
        load(tmp_path, **tree)
    assert f"{key}: contains a user name or password" in str(wrong.value) and "pass-word" not in str(wrong.value)


def test_an_at_sign_elsewhere_is_no_password(tmp_path):
    load(tmp_path, url="http://h/@me?x=a@b", names=["me@h.example", "s3://bucket/a@b"])
