"""What it gains that rollouts go on while the trainer trains: the demo twice, wall time to the same reward.

    trainer.pacing_staleness = 0   the trainer asks for a window's rollouts with the version before it, and waits
    trainer.pacing_staleness = 2   they are asked for two versions earlier: three windows are under way

Both begin from the same warm start, with the same seed, tasks and sizes, one after the other on the same machine, and
the runner takes all rollouts at once that are asked for: neither waits for the runner's bound. The reward is that of a
window's rollouts, whose tasks are all new to the policy, as mean of the last WINDOWS steps. What is compared is the
time from the run's beginning to the record of the step at which this mean has risen by SHARE of what both runs rise at
least. The held-out reward of both last versions, evaluated after the runs, must be the same within four standard
errors.

Twice, for what is waited for is one of two things:

    waiting   agents wait for their tool, as they do (waiting_agent.py): a window takes as long as its slowest agent
    busy      the demo's own agent, whose tool takes no time: everybody waits for the processor. Where actors and
              trainer share its cores, asynchrony gains at most what of them the synchronous run leaves idle
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
PACING_STALENESS: Final = 2
SHARE: Final = 0.9
"""Not all of it: where a noisy curve has its peak says little."""
HELD_OUT_TASKS: Final = 256
AGENT: Final = "examples.calculator.agent:agent"
WAITING_AGENT: Final = "tests.bench.waiting_agent:agent"
STEPS: Final = "SELECT reward_mean, time_ns FROM steps WHERE run_id = {run_id:String} ORDER BY step"
STARTED: Final = "SELECT min(time_ns) FROM training_events WHERE run_id = {run_id:String} AND event = 'run_started'"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Life:
    """One run of the demo."""

    curve: list[tuple[float, float]]
    """Of each step from the WINDOWSth on: seconds since the run began, mean reward of the last WINDOWS."""
    held_out: float
    standard_error: float

    @property
    def whole_seconds(self) -> float:
        return self.curve[-1][0]

    def seconds_to(self, reward: float) -> float:
        return next(seconds for seconds, mean in self.curve if mean >= reward)


def async_speedup(folder: Path, steps: int) -> Figures:
    """With agents that wait for their tools, then with the demo's own (`async_busy_...`)."""
    figures = {f"async_{name}": value for name, value in compared(folder, steps, WAITING_AGENT).items()}
    return figures | {f"async_busy_{name}": value for name, value in compared(folder, steps, AGENT).items()}


def compared(folder: Path, steps: int, agent: str) -> Figures:
    lives: dict[int, Life] = {}
    for staleness in (0, PACING_STALENESS):
        out = folder / f"async-{staleness}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.bench.train_async", str(folder / "demo"), str(out)]
        # Its exit code says whether the reward rose as the demo of full size promises: not what is asked here.
        subprocess.run([*command, str(staleness), str(steps), agent], check=False)
        if not out.exists():
            raise SystemExit(f"the demo with pacing_staleness {staleness} did not come to its report")
        life = lives[staleness] = Life(**json.loads(out.read_text()))
        print(
            f"{agent}, pacing_staleness {staleness}: {steps} steps in {life.whole_seconds:.1f} s, "
            f"held-out {life.held_out:.3f} ± {life.standard_error:.3f}"
        )
    sync, both = lives[0], lives[PACING_STALENESS]
    apart = abs(sync.held_out - both.held_out)
    if apart > 4 * math.hypot(sync.standard_error, both.standard_error):
        raise SystemExit(f"the held-out rewards differ by {apart:.3f}: not the same learning, so times say nothing")
    reward = common_reward(sync, both)
    sync_seconds, async_seconds = sync.seconds_to(reward), both.seconds_to(reward)
    print(
        f"{agent}: reward {reward:.3f} after {sync_seconds:.1f} s synchronously, {async_seconds:.1f} s asynchronously"
    )
    return {
        "speedup": sync_seconds / async_seconds,
        "speedup_whole_run": sync.whole_seconds / both.whole_seconds,
        "reward": reward,
        "seconds": async_seconds,
        "sync_seconds": sync_seconds,
        "held_out_reward": both.held_out,
        "sync_held_out_reward": sync.held_out,
    }


def common_reward(*lives: Life) -> float:
    """One that all of them reach: SHARE of the way from the lower first mean to the lower highest."""
    first = min(life.curve[0][1] for life in lives)
    highest = min(max(mean for _, mean in life.curve) for life in lives)
    return first + SHARE * (highest - first)


def life_of(client: Client, run_id: str) -> Life:
    """Asked of ClickHouse, as soon as the run's rows are there."""
    run = {"run_id": run_id}
    began = int(client.query(STARTED, run).result_rows[0][0])
    rows = [(float(reward), (int(time_ns) - began) / 1e9) for reward, time_ns in client.query(STEPS, run).result_rows]
    curve = [
        (rows[number - 1][1], sum(reward for reward, _ in rows[number - WINDOWS : number]) / WINDOWS)
        for number in range(WINDOWS, len(rows) + 1)
    ]
    after = next(e for e in questions.evaluations(client, run_id) if (e.name, e.sampling) == ("after", "sampled"))
    return Life(curve, after.reward_mean, after.reward_sem)


def main(data: Path, out: Path, staleness: int, steps: int, agent: str) -> int:
    """The demo with another pacing and agent; writes what came of it before it prints its report."""
    settings, report = plan.Plan.settings, flow.report

    def paced(self: plan.Plan) -> dict[str, dict[str, Any]]:
        found = settings(self)
        found["trainer"]["pacing_staleness"] = staleness
        rollouts = self.sizes.groups_per_step * self.sizes.group_size * (staleness + 1)
        found["runner"] |= {"agent": agent, "concurrency": rollouts}
        return found

    def noted(console: Any, client: Client, run_id: str, *more: Any) -> float | None:
        out.write_text(json.dumps(asdict(life_of(client, run_id))))
        return report(console, client, run_id, *more)

    plan.Plan.settings, flow.report = paced, noted
    return flow.main(data, plan.Sizes(steps=steps, eval_tasks=HELD_OUT_TASKS, greedy_tasks=1))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
