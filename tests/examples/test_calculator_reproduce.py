"""The experiments: what is sampled is what the learner scores, a cell is the same every time, intervals are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.calculator.model import new_model, train_tokenizer
from examples.calculator.reproduce import __main__ as command
from examples.calculator.reproduce import report, training
from examples.calculator.reproduce.cells import BASE, CELLS, COMPARISONS, Cell, Sizes
from examples.calculator.reproduce.rollouts import Asked, Sampler, expression_reward
from examples.calculator.reproduce.statistics import estimate, paired
from examples.calculator.reproduce.training import Point, Result, finished, run_cell
from examples.calculator.reward import reward_of
from examples.calculator.tasks import train_task
from examples.calculator.warm_start import Recipe, save

SMALL = Sizes(seeds=2, steps=2, rollouts_per_step=8, heldout_tasks=4, evaluate_every=2, warm_start_steps=1)


def made_up(text: str, answer: float) -> float:
    return reward_of(text, answer) if text.startswith("ANS 42") or "error" in text else len(text) % 7 / 6


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm start: half a minute. An untrained policy's rewards are all 0, so they are made up here."""

    def make(folder: Path, recipe: Recipe, _: object) -> bool:
        if not folder.exists():
            torch.manual_seed(recipe.seed)
            tokenizer = train_tokenizer(recipe.seed, conversations=200)
            save(folder, new_model(tokenizer), tokenizer, recipe.manifest())
        return True

    monkeypatch.setattr(training, "warm_start", make)
    monkeypatch.setattr("examples.calculator.reproduce.rollouts.reward_of", made_up)


def test_a_cell_trains_and_gives_the_same_again(tmp_path: Path) -> None:
    """Also that sampler and learner agree: the learner compares their logprobs and raises where they do not."""
    lagged = Cell("lagged", lag=1, correction="truncate")
    result, again = (run_cell(tmp_path / name, lagged, 1, SMALL, quiet) for name in ("a", "b"))
    assert result.points == again.points
    assert [point.step for point in result.points] == [0, 1, 2]
    assert [step for step, _ in result.heldout] == [0, 2]
    assert all(point.tokens > 0 for point in result.points[1:])
    assert [point.staleness for point in result.points[1:]] == [0.0, 1.0]
    assert finished(tmp_path / "a", lagged, 1, SMALL) == result
    assert finished(tmp_path / "a", lagged, 2, SMALL) is None
    assert not list(tmp_path.glob("a/*.work"))


def test_a_first_call_with_a_reward_of_its_own(tmp_path: Path) -> None:
    """Credit by call trains; what the calls were is in the trajectory, as the assembler would write it."""
    result = run_cell(
        tmp_path, Cell("calls", credit="call", credit_discount=0.0, rewarded="expression"), 1, SMALL, quiet
    )
    assert all(point.tokens > 0 for point in result.points[1:])
    assert (expression_reward("42", 42.0), expression_reward("error: no", 42.0)) == (1.0, 0.0)


def test_a_rollout_of_several_problems_is_what_the_assembler_would_write(tmp_path: Path) -> None:
    """Each problem is a sequence, calls are numbered through, and the parts of the reward add up to it."""
    cell = Cell("two", group_size=4, credit="call", credit_discount=0.0, rewarded="problem", problems=2)
    result = run_cell(tmp_path, cell, 1, SMALL, quiet)
    assert all(point.tokens > 0 for point in result.points[1:])
    assert cell.settings(1, Sizes(), tmp_path, tmp_path).groups_per_step == 16

    sampler = Sampler("two", "problem")
    sampler.add(1, training.start_model(tmp_path, 1, SMALL, quiet), 1)
    asked = [Asked(f"r{n}", "g", (train_task(2 * n), train_task(2 * n + 1))) for n in range(4)]
    for one, rollout in zip(asked, sampler.rollouts(1, asked, 4), strict=True):
        assert len(rollout.sequences) == len(one.tasks)
        calls = [call for sequence in rollout.sequences for call in sequence.calls]
        assert [call.number for call in calls] == list(range(rollout.calls))
        assert [reward.span_id for reward in rollout.rewards] == [call.span_id for call in calls]
        assert sum(reward.value for reward in rollout.rewards) == pytest.approx(rollout.reward)


def test_finished_cells_are_kept_and_everything_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [BASE, Cell("lag16-uncorrected", lag=1, correction="none")]
    console = Console(record=True, width=160)
    assert command.reproduce(console, tmp_path / "kept", tmp_path / "out", cells, SMALL) == 0

    def never(*_: object) -> Result:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(training, "run_cell", never)
    assert command.reproduce(console, tmp_path / "kept", tmp_path / "out", cells, SMALL) == 0
    figures = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert set(figures["cells"]) == {"base", "lag16-uncorrected"}
    assert figures["cells"]["base"]["seeds"] == [1, 2]
    assert [each["worse"] for each in figures["comparisons"]] == ["lag16-uncorrected"]
    assert figures["comparisons"][0]["after"]["n"] == 2
    assert (tmp_path / "out" / "reproduce.png").stat().st_size > 10_000
    assert "Ablations: difference in held-out reward" in console.export_text()


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """As `--jobs 2` does, on models that cannot do anything yet."""
    folder, one = tmp_path / "kept", replace(SMALL, seeds=1)
    training.start_model(folder, 1, one, quiet)
    assert command.reproduce(Console(width=160), folder, tmp_path / "out", [BASE], one, jobs=2) == 0
    figures = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert figures["cells"]["base"]["seeds"] == [1]


def test_arguments_that_are_wrong_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--cells", "base,nothing"]) == 2
    assert "--cells nothing: unknown; they are base, lag4" in capsys.readouterr().err
    names = {cell.name for cell in CELLS}
    assert {name for each in COMPARISONS for name in (each.better, each.worse)} <= names
    assert all(Sizes().rollouts_per_step % (cell.group_size * cell.problems) == 0 for cell in CELLS)


def test_intervals_are_students() -> None:
    found = estimate([0.8, 0.9, 0.85, 0.7, 0.95])
    assert found.mean == pytest.approx(0.84)
    assert found.half_width == pytest.approx(2.776 * math.sqrt(0.00925 / 5), rel=1e-3)
    assert math.isnan(estimate([1.0]).half_width)
    difference = paired({1: 0.9, 2: 0.8, 3: 0.7}, {1: 0.8, 2: 0.7, 3: 0.6, 4: 0.0})
    assert (difference.n, difference.mean) == (3, pytest.approx(0.1))
    assert difference.excludes_zero


def point(step: int, heldout: float) -> Point:
    return Point(step, None, heldout, None, 0.0, 0.0, 1.0, 0)


def results_of(**curves: list[float]) -> list[Result]:
    """Held-out reward of each seed after the last step; before it is 0.2, give or take the seed."""
    return [
        Result(cell, seed, [point(0, 0.2 + seed / 100), point(1, value)], 1.0)
        for cell, values in curves.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"base": [0.7, 0.72, 0.71], "lag16-uncorrected": [0.3, 0.35, 0.2]}, []),
        ({"base": [0.7, 0.72, 0.71], "groups-of-2": [0.7, 0.75, 0.68]}, []),
        ({"base": [0.2, 0.1, 0.3]}, ["base did not learn"]),
        ({"base": [0.2, 0.1]}, []),
        ({"base": [0.7, 0.72, 0.71], "lag16": [0.8, 0.82, 0.81]}, ["base is worse than lag16: -0.100"]),
    ],
)
def test_what_should_not_be_is_said(curves: dict[str, list[float]], expected: list[str]) -> None:
    found = report.contradictions(report.by_cell(results_of(**curves)))
    assert len(found) == len(expected)
    assert all(said.startswith(start) for said, start in zip(found, expected, strict=True))
