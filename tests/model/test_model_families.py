"""One family per mechanism, trained and sampled as ``make families`` does for all; and that wrong ones are found."""

import pytest
from family_check import check_family
from model_families import FAMILIES

from rolltune.model import packed_attention

PACKED, OWN_MASKS, UNPACKED = "packed", "packed, own masks", "unpacked"


@pytest.mark.parametrize(
    ("family", "length", "trained", "head", "sampled"),
    [
        ("qwen3-moe", "long", PACKED, "", "shared cache"),
        ("mistral", "beyond", OWN_MASKS, "", "own cache"),  # a window that the check at load does not reach
        ("gemma2", "long", OWN_MASKS, "own", "own cache"),  # softcaps
        ("gpt-oss", "long", OWN_MASKS, "", "own cache"),  # sinks
        ("nemotron", "short", PACKED, "", "shared cache"),  # drops keyword arguments
        ("phi4-mini", "beyond", PACKED, "", "refused"),  # longrope
        ("lfm2", "short", UNPACKED, "", "own cache"),  # convolutions
        ("llama4-text", "beyond", UNPACKED, "", "own cache"),  # scales queries by their place in the row
        ("gptj", "short", UNPACKED, "own", "own cache"),  # old modelling code, a head with a bias
        ("qwen2.5-vl", "short", PACKED, "", "shared cache"),  # multimodal
    ],
)
def test_family(tmp_path, family, length, trained, head, sampled):
    result = check_family(family, length, tmp_path / "model")
    assert result.is_right, result
    assert (result.trained, result.head, result.sampled) == (trained, head, sampled)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_silently_wrong(tmp_path, family):
    result = check_family(family, "long", tmp_path / "model")
    assert not result.silently_wrong and not result.wrong, result


def test_the_check_finds_packed_attention_without_the_window(tmp_path, monkeypatch):
    original = packed_attention.packed_mask
    monkeypatch.setattr("family_check.packed_mask", lambda *_, mask_function=None, **__: original())
    result = check_family("mistral", "beyond", tmp_path / "model")
    assert any(text.startswith("log-probs off by") for text in result.silently_wrong)
