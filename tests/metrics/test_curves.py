"""curves.png: complete, without a display, with the panels that there is data for."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rolltune.behaviours import BEHAVIOURS
from rolltune.metrics import curves
from rolltune.metrics.curves import plot_curves
from rolltune.metrics.log import MetricsLog
from rolltune.stats import accuracy_interval


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def full_run(folder: Path, steps: int) -> None:
    log = MetricsLog(folder)
    for step in range(steps):
        record = {"reward/mean": step / 10, "reward/answer/mean": step / 20, "reward/format/mean": 1.0}
        record |= {"kl": step / 1e3}
        record |= {"entropy": 1 / (step + 1), "grad_norm": math.nan if step == 2 else 1.0, "clip_fraction": 0.0}
        record |= {"completions/length_mean": 60 - step, "completions/truncated": 0.1}
        if step % 5 == 0:
            low, high = accuracy_interval(step, 40)
            record |= {"heldout/accuracy": step / 40, "heldout/accuracy_low": low, "heldout/accuracy_high": high}
        log.log(step, record)
    log.close()


def test_curves_of_a_whole_run(tmp_path):
    full_run(tmp_path, 30)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    width, height = png_size(path)
    assert width > 1.5 * height > 900
    assert not list(tmp_path.glob("*.tmp"))


def test_curves_need_no_display_and_no_pyplot(tmp_path):
    full_run(tmp_path, 1)
    program = (
        "import sys; from rolltune.metrics.curves import plot_curves; "
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules; "
        "plot_curves(sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, timeout=120)
    png_size(tmp_path / "curves.png")


def test_panels_without_data_are_left_out(tmp_path):
    sizes = []
    for number, values in enumerate(({"kl": 0.1}, {"kl": 0.1, "loss": 1.0}, {"kl": 0.1, "entropy": 1, "grad_norm": 1})):
        log = MetricsLog(tmp_path / str(number))
        log.log(1, values)
        log.close()
        sizes.append(png_size(plot_curves(tmp_path / str(number))))
    (one, height), (two, _), (three, last_height) = sizes
    assert (two, three) == (2 * one, 3 * one) and height == last_height


@pytest.mark.parametrize(("gap", "is_drawn"), [(1e-6, False), (1e-2, True)])
def test_a_mismatch_has_a_panel_if_it_is_more_than_rounding(gap, is_drawn):
    records = [
        {"step": step, "kl": 0.1, "mismatch/mean_abs": gap, "mismatch/k3": gap**2 / 2, "mismatch/outside": 0.05}
        for step in range(3)
    ]
    assert (curves._plot_mismatch in curves._panels(curves.collect_series(records))) == is_drawn
    axes = Figure().add_subplot()
    curves._plot_mismatch(axes, curves.collect_series(records))
    assert list(axes.lines[0].get_ydata()) == [gap**2 / 2] * 3  # pyright: ignore[reportArgumentType]


def test_behaviours_have_a_panel_of_their_own():
    record = {"reward/mean": 0.5, "reward/answer/mean": 0.5, "reward/seen/mean": 7.0}
    record |= {f"reward/seen/{name}/mean": 2.0 for name in BEHAVIOURS}
    assert list(drawn_by(curves._plot_reward, [record])) == ["total", "answer"]
    assert list(drawn_by(curves._plot_behaviours, [record])) == [name.replace("_", " ") for name in BEHAVIOURS]
    assert curves._plot_behaviours in curves._panels(curves.collect_series([{"step": 1, **record}]))
    assert curves._panels(curves.collect_series([{"step": 1, "reward/mean": 0.5}])) == [curves._plot_reward]


JUDGED = {
    "reward/mean": 0.5,
    "reward/rubric/mean": 0.5,
    "reward/rubric/scored_share/mean": 0.9,
    "reward/rubric/category/essential/mean": 0.7,
    "reward/rubric/category/pitfall/mean": 0.4,
    "reward/rubric/criterion/names_the_unit/mean": 0.3,
    "reward/length_correlation": 0.1,
    "judge/rubric/questions": 40.0,
    "judge/rubric/calls": 30.0,
    "judge/rubric/cache_hits": 12.0,
    "judge/rubric/dollars": 0.02,
}


def drawn_by(plot, records) -> dict[str, list[float]]:
    axes = Figure().add_subplot()
    plot(axes, curves.collect_series([{"step": step, **record} for step, record in enumerate(records)]))
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines if str(line.get_label())[0] != "_"}  # pyright: ignore[reportArgumentType]


def test_panels_of_a_judged_run():
    gold = {"overoptimization/train_mean": 0.6, "overoptimization/mean": 0.5, "overoptimization/alarm": 0.0}
    assert curves._panels(curves.collect_series([{"step": 1, **JUDGED, **gold}])) == [
        curves._plot_reward,
        curves._plot_overoptimization,
        curves._plot_categories,
        curves._plot_criteria,
        curves._plot_judge,
    ]
    assert drawn_by(curves._plot_reward, [JUDGED]) == {"total": [0.5], "rubric": [0.5]}
    assert drawn_by(curves._plot_categories, [JUDGED]) == {"essential": [0.7], "pitfall": [0.4]}
    assert drawn_by(curves._plot_criteria, [JUDGED]) == {"names the unit": [0.3]}
    assert drawn_by(curves._plot_judge, [JUDGED]) == {
        "rubric questions": [40.0],
        "rubric calls": [30.0],
        "rubric cache hits": [12.0],
    }


def test_alarms_are_marked_on_the_curve_of_the_judge():
    rows = [
        {"overoptimization/train_mean": mean, "overoptimization/mean": 0.3, "overoptimization/alarm": alarm}
        for mean, alarm in ((0.3, 0), (0.8, 1))
    ]
    assert drawn_by(curves._plot_overoptimization, rows) == {
        "trained on": [0.3, 0.8],
        "gold": [0.3, 0.3],
        "alarm": [0.8],
    }
    assert "alarm" not in drawn_by(curves._plot_overoptimization, rows[:1])


def test_of_many_criteria_those_seen_most_are_drawn():
    names = [f"reward/rubric/criterion/c{i}/mean" for i in range(20)]
    rows = [dict.fromkeys(names, 0.1), dict.fromkeys(names[10:13], 0.2)]
    drawn = drawn_by(curves._plot_criteria, rows)
    assert list(drawn) == ["c10", "c11", "c12", "c0", "c1", "c2"]


def test_nothing_to_draw(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(1, {"seconds/sample": 1.0})
    log.close()
    with pytest.raises(ValueError, match="nothing to draw.* seconds/sample"):
        plot_curves(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        plot_curves(tmp_path / "nowhere")


def test_series_leave_nulls_out_and_take_the_last_of_a_step():
    rows = [
        {"step": 2, "time": 1.0, "kl": 0.2},
        {"step": 1, "time": 2.0, "kl": None, "loss": 3.0},
        {"step": 2, "time": 3.0, "kl": 0.4},
    ]
    assert curves.collect_series(rows) == {"kl": ([2.0], [0.4]), "loss": ([1.0], [3.0])}


def test_smoothing():
    assert curves._smooth([1.0, 5.0]) == [1.0, 5.0]
    # 40 values: a window of 5, cut off at the ends.
    values = [float(i % 5) for i in range(40)]
    smooth = curves._smooth(values)
    assert len(smooth) == 40
    assert smooth[0] == pytest.approx((0 + 1 + 2) / 3) and smooth[-1] == pytest.approx((2 + 3 + 4) / 3)
    assert smooth[2:-2] == pytest.approx([2.0] * 36)
