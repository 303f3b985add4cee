"""The demo's parts without the demo: its questions on real tables, its state, its plan, its screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from clickhouse_connect.driver import Client
from rich.console import Console

from fulgurite.infra import vllm
from fulgurite.infra.demo import plots, questions, state
from fulgurite.infra.demo.plan import Sizes, make_plan
from fulgurite.infra.demo.report import report
from fulgurite.infra.demo.screen import Figures, Screen, sparkline
from fulgurite.infra.demo.watch import Watcher
from fulgurite.infra.sql import connect
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import ClickHouseSettings, Settings, load_settings

POINTS = [
    plots.CurvePoint(1, "val", 0.3, 0.02, 512, 0.5),
    *(plots.CurvePoint(version, "train", version / 20, 0.05, 64, 0.6) for version in range(2, 20)),
    plots.CurvePoint(20, "val", 0.8, 0.02, 512, 0.9),
]


def test_every_question_is_one_that_the_tables_answer(migrated_settings: ClickHouseSettings, tmp_path: Path):
    parameters = {"run_id": "r", "mode": "train", "prefix": "r-g", "resource": "policy", "since_ns": 0}
    with connect(migrated_settings) as client:
        for name in (name for name in dir(questions) if name.isupper() and name != "TO_TRY"):
            client.query(getattr(questions, name), parameters)
        for sql in questions.TO_TRY:
            client.query(sql.format(run_id="r"))
        console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
        assert report(console, client, "r", tmp_path, None) is None
        console.file.close()


def test_curve_counts_train_and_sampled_held_out_rollouts(migrated_settings: ClickHouseSettings):
    rows = [("a", "train", "", 1.0), ("b", "train", "", 0.0), ("c", "val", "sampled", 1.0), ("d", "val", "greedy", 1.0)]
    with connect(migrated_settings) as client:
        for offset, (rollout_id, mode, sampling, reward) in enumerate(rows):
            client.command(
                "INSERT INTO rollout_events (event, rollout_id, run_id, mode, metadata, _offset) VALUES "
                f"('queued', '{rollout_id}', 'r', '{mode}', {{'sampling': '{sampling}'}}, {offset})"
            )
            client.command(
                "INSERT INTO trajectories (rollout_id, run_id, mode, reward, min_version, metadata, _offset) VALUES "
                f"('{rollout_id}', 'r', '{mode}', {reward}, 7, {{'sampling': '{sampling}'}}, {offset})"
            )
        curve = questions.curve(client, "r")
    assert {(p.mode, p.version, p.rollouts, p.reward_mean) for p in curve} == {("train", 7, 2, 0.5), ("val", 7, 1, 1.0)}


def test_state_survives_and_a_stranger_is_refused(tmp_path: Path):
    assert state.load(tmp_path) is None
    kept = state.DemoState(run_id="demo-1", sizes=Sizes(steps=3), published=True)
    state.save(tmp_path, kept)
    assert state.load(tmp_path) == kept
    (tmp_path / state.FILE_NAME).write_text("{}")
    with pytest.raises(SettingsError, match="not a demo's state"):
        state.load(tmp_path)


def test_the_plan_sets_only_settings_that_exist(tmp_path: Path):
    plan = make_plan(tmp_path, Sizes(), "demo-1")
    settings = load_settings(plan.environment())
    assert settings.trainer.run_id == "demo-1"
    assert settings.gateway.backend_url == settings.follower.servers[0]
    assert settings.runner.agent == "examples.calculator.agent:agent"


def test_the_policy_is_served_by_the_embedded_server_or_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "policy-server" in make_plan(tmp_path, Sizes(), "demo-1").services
    monkeypatch.setattr(vllm, "ENVIRONMENT", str(tmp_path / "vllm"))
    with pytest.raises(StartError, match="make vllm"):
        make_plan(tmp_path, Sizes(), "demo-1", "vllm")
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    plan = make_plan(tmp_path, Sizes(), "demo-1", "vllm")
    assert "policy-server" not in plan.services
    assert {f"--model={plan.warm_start}", f"--port={plan.ports['policy_server']}"} <= set(plan.vllm_command())
    assert load_settings(plan.environment()).gateway.backend_url.endswith(f":{plan.ports['policy_server']}")
    assert "PYTHONPATH" not in plan.vllm_environment()


def test_plots_are_drawn(tmp_path: Path):
    assert "policy version" in plots.terminal_plot(POINTS)
    plots.write_png(POINTS, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_shows_every_figure_that_was_promised(tmp_path: Path):
    with (tmp_path / "log").open("w") as file, Screen(Console(file=file, width=200)) as screen:
        screen.phase("training")
        screen.show(
            Figures(
                done=3,
                total=10,
                what="GRPO steps",
                version=5,
                served_version=5,
                reward=0.5,
                tool_use=0.8,
                rollouts_per_second=20.0,
                staleness_mean=0.4,
                staleness_max=1,
                lag={"trainer": 3},
                dead_letters=0,
            )
        )
        screen.end()
    text = (tmp_path / "log").read_text()
    for part in ("3/10", "version 5", "0.500", "80%", "rollouts/s 20.0", "0.40 mean, 1 max", "trainer 3", "letters 0"):
        assert part in text
    assert "✓ training" in text
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_what_is_counted_now_is_not_what_was_counted_before(migrated_settings: ClickHouseSettings) -> None:
    """The figures are asked for every two seconds; the phase of the demo changes at once."""
    with connect(migrated_settings) as client:
        watcher = Watcher(Settings(clickhouse=migrated_settings), "r", "policy", 0)
        rows = [["r", f"r-g{number}-r0", number] for number in range(3)]
        client.insert("trajectories", rows, column_names=["run_id", "rollout_id", "_offset"])
        watcher.follow("train", "r-g")
        watcher._ask(client)  # pyright: ignore[reportPrivateUsage]
        assert watcher.ended == 3
        watcher.follow("val", "r-val-after-")
        assert watcher.ended == 0

        class Changing:
            """The phase changes while its questions are asked."""

            def query(self, *asked: Any) -> Any:
                watcher.follow("val", "r-val-after-")
                return client.query(*asked)

        watcher.follow("train", "r-g")
        watcher._ask(cast(Client, Changing()))  # pyright: ignore[reportPrivateUsage]
        assert watcher.ended == 0
