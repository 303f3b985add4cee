"""What it gains that rollouts go on while the trainer trains: the demo twice, wall time to the same reward.

    trainer.pacing_staleness = 0   the trainer asks for a window's rollouts with the version before it, and waits
    trainer.pacing_staleness = 1   they are asked for a version earlier, so both work at the same time

Both begin from the same warm start, with the same seed, tasks and sizes, one after the other on the same machine. The
reward is that of a window's rollouts, whose tasks are all new to the policy, over the last WINDOWS steps; time is from
the run's beginning to the record of the step at which this mean first reaches REWARD. The held-out reward of both last
versions, evaluated after the runs, must be the same within four standard errors.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from clickhouse_connect.driver import Client

from fulgurite.infra.demo import flow, plan, questions

WINDOWS: Final = 5
REWARD: Final = 0.7
HELD_OUT_TASKS: Final = 256
STEPS: Final = "SELECT reward_mean, time_ns FROM steps WHERE run_id = {run_id:String} ORDER BY step"
STARTED: Final = "SELECT min(time_ns) FROM training_events WHERE run_id = {run_id:String} AND event = 'run_started'"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Life:
    """One run of the demo."""

    seconds: float
    """To the reward; NaN where it was not reached."""
    whole_seconds: float
    held_out: float
    standard_error: float


def async_speedup(folder: Path, steps: int) -> Figures:
    lives: dict[int, Life] = {}
    for staleness in (0, 1):
        out = folder / f"async-{staleness}.json"
        command = [sys.executable, "-m", "tests.bench.train_async", str(folder / "demo"), str(out)]
        # Its exit code says whether the reward rose as the demo of full size promises: not what is asked here.
        subprocess.run([*command, str(staleness), str(steps)], check=False)
        if not out.exists():
            raise SystemExit(f"the demo with pacing_staleness {staleness} did not come to its report")
        life = lives[staleness] = Life(**json.loads(out.read_text()))
        print(
            f"pacing_staleness {staleness}: reward {REWARD} after {life.seconds:.1f} s, {steps} steps after "
            f"{life.whole_seconds:.1f} s, held-out {life.held_out:.3f} ± {life.standard_error:.3f}"
        )
    waiting, both = lives[0], lives[1]
    apart = abs(waiting.held_out - both.held_out)
    if apart > 4 * math.hypot(waiting.standard_error, both.standard_error):
        raise SystemExit(f"the held-out rewards differ by {apart:.3f}: not the same learning, so times say nothing")
    return {
        "async_speedup": waiting.seconds / both.seconds,
        "async_speedup_whole_run": waiting.whole_seconds / both.whole_seconds,
        "sync_seconds_to_reward": waiting.seconds,
        "async_seconds_to_reward": both.seconds,
        "sync_held_out_reward": waiting.held_out,
        "async_held_out_reward": both.held_out,
    }


def life_of(client: Client, run_id: str) -> Life:
    """Asked of ClickHouse, as soon as the run's rows are there."""
    run = {"run_id": run_id}
    began = int(client.query(STARTED, run).result_rows[0][0])
    rows = [(float(reward), (int(time_ns) - began) / 1e9) for reward, time_ns in client.query(STEPS, run).result_rows]
    reached = math.nan
    for number in range(WINDOWS, len(rows) + 1):
        if sum(reward for reward, _ in rows[number - WINDOWS : number]) / WINDOWS >= REWARD:
            reached = rows[number - 1][1]
            break
    after = next(e for e in questions.evaluations(client, run_id) if (e.name, e.sampling) == ("after", "sampled"))
    return Life(reached, rows[-1][1], after.reward_mean, after.reward_sem)


def main(data: Path, out: Path, staleness: int, steps: int) -> int:
    """The demo with another pacing; writes what came of it before it prints its report."""
    settings, report = plan.Plan.settings, flow.report

    def paced(self: plan.Plan) -> dict[str, dict[str, Any]]:
        found = settings(self)
        found["trainer"]["pacing_staleness"] = staleness
        return found

    def noted(console: Any, client: Client, run_id: str, *more: Any) -> float | None:
        out.write_text(json.dumps(asdict(life_of(client, run_id))))
        return report(console, client, run_id, *more)

    plan.Plan.settings, flow.report = paced, noted
    return flow.main(data, plan.Sizes(steps=steps, eval_tasks=HELD_OUT_TASKS, greedy_tasks=1))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
