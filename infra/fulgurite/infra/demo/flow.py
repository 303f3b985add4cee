"""The demo: the whole circle on one machine, from nothing to a better policy. Read it to see how parts are wired.

    1 stores            Kafka and ClickHouse as child processes; topics, tables
    2 services          each one `fulgurite <service>`, a process of its own, talking over Kafka and HTTP only:
                          coordinator ► runner ► agent ─OpenAI API─► gateway ► policy server ◄ follower
                          materialiser ► ClickHouse        assembler ► trajectories
    3 warm start        a tiny random Llama learns the format from sloppy demonstrations   -> data/warm-start
    4 first version     `fulgurite publish`: the follower brings it to the policy server. With --serve vllm that server
                          is vLLM's CPU build, which starts here, with the warm start as its model
    5 evaluation before held-out tasks, sampled and greedy, as rollouts of mode val
    6 training          `fulgurite train`: windows ► GRPO ► versions, until its steps are done
    7 evaluation after  the same tasks
    8 report            everything in it is asked from ClickHouse

Promises: Ctrl-C or SIGTERM at any moment, and kill -9 of this process, leave no process behind; a service that dies is
started again; a second run in the same folder goes on where the first stood, or says that it begins a new run. Knows
how to start, watch and stop; nothing of what the services do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fulgurite.infra.demo import questions, state
from fulgurite.infra.demo.plan import EXAMPLE, SERVED_SECONDS, Plan, Serve, Sizes, check_folder, make_plan
from fulgurite.infra.demo.report import MIN_RISE, print_next, report
from fulgurite.infra.demo.screen import Figures, Screen
from fulgurite.infra.demo.state import DemoState
from fulgurite.infra.demo.watch import Watcher
from fulgurite.infra.sql import connect
from fulgurite.infra.stores import hold_folder, start_stores
from fulgurite.infra.supervisor import Supervisor
from fulgurite.infra.trace import rollout_tree
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.settings import (
    CONFIG_NAME,
    ENV_HOME,
    ClickHouseSettings,
    KafkaSettings,
    Settings,
    load_settings,
)

RESOURCE = "policy"
PARTITIONS = 2
"""Every partition costs inserts and transactions of its own; one machine needs no more to work in parallel."""
SETTLE_SECONDS = 60.0
"""How long rows may take to arrive after the last rollout ended."""

_TICK_SECONDS = 0.5


def main(data: Path, sizes: Sizes, serve: Serve = "embedded") -> int:
    """Runs the demo; 0 when the reward rose as promised, 1 when it did not, 130 when it was interrupted."""
    check_folder(data)
    log = data / "logs" / "demo.log"
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # also where a shell's background job inherited it as ignored
    screen = Screen()
    with contextlib.closing(hold_folder(data, "fulgurite demo")):
        demo = _this_run(data, sizes, screen)
        plan = make_plan(data, demo.sizes, demo.run_id, serve)
        _say_what_happens(plan, screen)
        supervisor = Supervisor(plan.logs, lambda name, what: _service_event(screen, name, what))
        try:
            with screen:
                return _Demo(plan, demo, supervisor, screen).run()
        except KeyboardInterrupt:
            screen.say("\nStopped. `make demo` again goes on from here; nothing that was acknowledged is lost.")
            return 130
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
            supervisor.stop_all()
            screen.say(f"All processes ended. Peak memory of all of them: {supervisor.peak_rss_bytes / 2**30:.1f} GiB.")


class _Demo:
    """One run of the demo, phase by phase."""

    def __init__(self, plan: Plan, demo: DemoState, supervisor: Supervisor, screen: Screen) -> None:
        self._plan, self._demo, self._supervisor, self._screen = plan, demo, supervisor, screen
        self._environment = plan.environment()

    def run(self) -> int:
        self._screen.phase("stores")
        settings = _store_settings(self._plan.data)
        stores = start_stores(self._plan.data, settings, self._supervisor, lambda text: self._screen.say(f"  {text}"))
        self._screen.phase("services")
        started_ns = now_ns()
        for service in self._plan.services:
            self._supervisor.start(service, self._plan.service_command(service), self._environment)
        self._screen.phase("warm start")  # while the services come up
        self._warm_start()
        clickhouse = stores.settings.clickhouse
        with Watcher(stores.settings, self._demo.run_id, RESOURCE, started_ns) as self._watcher:
            self._screen.phase("first version")
            if self._plan.serve == "vllm":
                self._supervisor.start("vllm", self._plan.vllm_command(), self._plan.vllm_environment())
            self._publish_warm_start()
            self._screen.phase("evaluation before")
            self._evaluate("before", self._demo.evaluated_before)
            self._remember(evaluated_before=True)
            self._screen.phase("training")
            self._train()
            self._remember(trained=True)
            self._screen.phase("evaluation after")
            self._wait_until_served("the last version")
            self._evaluate("after", self._demo.evaluated_after)
            self._screen.phase("report")
            self._settle()
        self._screen.end()
        rise = self._report(clickhouse)
        self._remember(evaluated_after=True)
        print_next(self._screen.console, self._plan.data, self._demo.run_id)
        if rise is None or rise < MIN_RISE:
            self._screen.say(
                f"[yellow]The rise is below the {MIN_RISE} that the full-size demo promises: exit code 1.[/]"
            )
            return 1
        return 0

    def _warm_start(self) -> None:
        if (self._plan.warm_start / "config.json").is_file():
            self._screen.say(f"  the warm start in {self._plan.warm_start} is used again")
        else:
            self._screen.say(
                "  a tiny Llama (0.4 million parameters, random weights) learns the format of the task from sloppy\n"
                "  demonstrations: they skip the calculator half of the time and err. Reinforcement does the rest."
            )
        self._run_once("warm-start", self._plan.warm_start_command(), self._warm_start_figures)

    def _warm_start_figures(self) -> Figures:
        """From the last line of its log: it is a plain script and reports progress as JSON."""
        for line in reversed((self._plan.logs / "warm-start.log").read_text(errors="replace").splitlines()[-20:]):
            if line.startswith("progress: "):
                try:
                    found = json.loads(line.removeprefix("progress: "))
                    return Figures(int(found["step"]), int(found["steps"]), f"loss {found['loss']:.3f}")
                except (ValueError, KeyError, AttributeError):
                    continue  # a line cut in the middle
        return Figures(what="starting")

    def _publish_warm_start(self) -> None:
        if not self._demo.published:
            self._run_once("publish", [*self._plan.service_command("publish"), str(self._plan.warm_start)], Figures)
            self._remember(published=True)
        if not self._demo.evaluated_before:  # else there may be a trainer's transaction open, which only a trainer ends
            self._wait_until_served("the first version")

    def _wait_until_served(self, what: str) -> None:
        seconds = SERVED_SECONDS[self._plan.serve]
        self._wait_for(lambda: self._watcher.newest_is_served, seconds, f"{what} to be served")

    def _evaluate(self, name: str, done: bool) -> None:
        if done:
            self._screen.say("  done in an earlier run of the demo")
            return
        sizes = self._plan.sizes
        self._watcher.follow("val", f"{self._demo.run_id}-val-{name}-")

        def figures() -> Figures:
            known = self._watcher.figures()
            known.done, known.total, known.what = self._watcher.ended, sizes.held_out_rollouts, "held-out rollouts"
            return known

        for sampling, count in (("greedy", sizes.greedy_tasks), ("sampled", sizes.eval_tasks)):
            options = ["--name", name, "--tasks", f"{EXAMPLE}.tasks:heldout_task", "--count", str(count)]
            command = [*self._plan.service_command("evaluate"), *options, "--sampling", sampling]
            self._run_once(f"evaluate-{name}-{sampling}", command, figures)

    def _train(self) -> None:
        self._watcher.follow("train", f"{self._demo.run_id}-g")

        def figures() -> Figures:
            known = self._watcher.figures()
            known.done, known.total, known.what, known.steps = (
                known.step,
                self._plan.sizes.steps,
                "GRPO steps",
                known.step,
            )
            return known

        self._run_once("trainer", self._plan.service_command("train"), figures)

    def _run_once(self, name: str, command: list[str], figures: Callable[[], Figures]) -> None:
        """Keeps a job running until it is done, restarts included; shows figures meanwhile."""
        self._supervisor.start(name, command, self._environment)
        while (code := self._supervisor.wait(name, _TICK_SECONDS)) is None:
            self._show(figures())
        if code != 0:
            log = self._plan.logs / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise StartError(f"{name} ended with exit code {code}; the end of {log}:\n{tail}")

    def _settle(self) -> None:
        """Waits until every ended rollout is a row: the materialiser is asynchronous."""
        wanted = self._plan.sizes.held_out_rollouts

        def settled() -> bool:
            return self._watcher.ended >= wanted and self._watcher.rows_missing == 0

        self._wait_for(settled, SETTLE_SECONDS, "the last rows in ClickHouse")

    def _wait_for(self, ready: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if failed := [service.name for service in self._supervisor.status() if service.state == "failed"]:
                raise StartError(f"{', '.join(failed)} cannot run (waited for {what}); see {self._plan.logs}")
            if time.monotonic() > deadline:
                raise StartError(f"waited {timeout_seconds:.0f} s for {what}; see {self._plan.logs}")
            figures = self._watcher.figures()
            figures.what = f"waiting for {what}"
            self._show(figures)
            time.sleep(_TICK_SECONDS)

    def _show(self, figures: Figures) -> None:
        figures.rss_bytes = self._supervisor.rss_bytes()
        figures.restarts = {s.name: s.restarts for s in self._supervisor.status() if s.restarts}
        self._screen.show(figures)

    def _report(self, clickhouse: ClickHouseSettings) -> float | None:
        run = {"run_id": self._demo.run_id, "mode": "train"}
        with connect(clickhouse) as client:
            found = client.query(questions.A_GOOD_ROLLOUT, run).result_rows
            example = str(found[0][0]) if found else None
            rise = report(self._screen.console, client, self._demo.run_id, self._plan.data, example)
            if example:
                self._screen.console.print(rollout_tree(client, example))
        return rise

    def _remember(self, **changes: object) -> None:
        self._demo = self._demo.model_copy(update=changes)
        state.save(self._plan.data, self._demo)


def _this_run(data: Path, sizes: Sizes, screen: Screen) -> DemoState:
    """The run to do: an unfinished one goes on, otherwise a new one begins; says which."""
    before = state.load(data)
    if before and not before.finished:
        screen.say(f"Run {before.run_id} in {data} was interrupted: it goes on where it stood, with its own sizes.")
        return before
    run_id = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    finished = [*before.finished_runs, before.run_id] if before else []
    if before:
        screen.say(f"{data} holds {len(finished)} finished run(s); a new run {run_id} begins beside them.")
    fresh = DemoState(run_id=run_id, sizes=sizes, finished_runs=finished)
    state.save(data, fresh)
    return fresh


def _say_what_happens(plan: Plan, screen: Screen) -> None:
    sizes, of_vllm = plan.sizes, plan.serve == "vllm"
    services = [*plan.services, *(["vLLM (its CPU build)"] if of_vllm else [])]
    takes = "about 8 minutes on 2 cores, about 7 GiB" if of_vllm else "about 5 minutes on 2 cores, about 4 GiB"
    rollouts = sizes.steps * sizes.groups_per_step * sizes.group_size
    screen.say(
        f"[bold]Fulgurite demo[/]: an agent with a calculator learns online, over real Kafka and ClickHouse.\n"
        f"  downloads   nothing, or once Kafka's jars (about 110 MB from Maven Central, kept in your cache folder)\n"
        f"  writes      {plan.data} (about 500 MB; remove the folder to begin afresh)\n"
        f"  starts      Kafka, ClickHouse, {', '.join(services)}, a trainer; on loopback only\n"
        f"  takes       {takes} of memory\n"
        f"  trains      {sizes.steps} steps of {sizes.groups_per_step} groups of {sizes.group_size} rollouts "
        f"({rollouts} rollouts), evaluates on {sizes.eval_tasks} held-out tasks before and after\n"
        f"  stop        Ctrl-C at any time; the same command goes on from there",
    )


def _service_event(screen: Screen, name: str, what: str) -> None:
    logging.getLogger(__name__).info("%s %s", name, what)
    if "again" in what or "ended" in what or "failed" in what or "could not" in what:
        screen.say(f"  [yellow]{name} {what}[/]")


def _store_settings(data: Path) -> Settings:
    """A folder that holds topics keeps their number of partitions; a fresh one gets PARTITIONS."""
    if (data / CONFIG_NAME).is_file():
        return load_settings({ENV_HOME: str(data)})
    return Settings(kafka=KafkaSettings(partitions=PARTITIONS))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
