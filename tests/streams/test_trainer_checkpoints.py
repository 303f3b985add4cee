"""Checkpoints that a disk refuses, or that lost something since they were written: said, never taken as whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fulgurite.schemas.errors import Fenced, StartError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner
from fulgurite.streams.trainer.checkpoints import Checkpoint, Checkpoints, RunState
from fulgurite.streams.trainer.groups import Choice
from fulgurite.streams.trainer.occupied import Occupied
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.windows import Windows
from tests.streams.test_windows import SHAPE, add_group, stranger, taken
from tests.streams.trainer_world import build_model

STATE = RunState(run_id="r", resource="policy", version=7, step=2, offsets={0: 9}, asked=2)


def written(output: Path) -> tuple[Checkpoints, Checkpoint]:
    """A checkpoint with two open groups."""
    windows = Windows(SHAPE, asked=2)
    add_group(windows, 0)
    add_group(windows, 1)
    folder = Checkpoints(output, "r", {"loss": "dapo"})

    def weights(to: Path) -> None:
        (to / "w").write_text("weights")

    def optimizer(to: Path) -> None:
        to.write_text("optimizer")

    return folder, folder.write(STATE, windows, weights, optimizer)


def first(output: Path, by: str, lineage: str = "log", then: Callable[[], None] = lambda: None) -> Checkpoint:
    """A run's first version, as whoever writes it; `then` comes when its weights are written."""
    state = STATE.model_copy(update={"version": 1, "step": 0, "lineage": lineage})

    def weights(to: Path) -> None:
        (to / "w").write_text(by)
        then()

    return Checkpoints(output, "r").write(state, Windows(SHAPE), weights, Path.touch)


def two_versions(output: Path) -> Checkpoints:
    """7 and 8."""
    folder, _ = written(output)
    folder.write(STATE.model_copy(update={"version": 8}), Windows(SHAPE), lambda to: (to / "w").touch(), Path.touch)
    return folder


def writer(output: Path) -> str:
    assert [path.name for path in (output / "r").iterdir()] == ["v000001"]
    return (Checkpoints(output, "r").load(1).weights / "w").read_text()


def test_who_owns_the_run_takes_the_place_of_what_a_predecessor_wrote(tmp_path: Path) -> None:
    first(tmp_path, "predecessor")
    with pytest.raises(Occupied) as found:
        first(tmp_path, "owner")
    Checkpoints(tmp_path, "r").replace(found.value)
    assert writer(tmp_path) == "owner"


def test_a_checkpoint_knows_since_which_version_the_weights_are_what_they_are(tmp_path: Path) -> None:
    folder, before = Checkpoints(tmp_path, "r"), STATE
    since: list[int | None] = []
    for version, content in ((7, "a"), (8, "a"), (9, "b"), (10, "b"), (11, "a")):
        state = before.model_copy(update={"version": version})
        folder.write(state, Windows(SHAPE), lambda to, content=content: _write(to / "w", content), Path.touch)
        before = folder.load(version).state
        since.append(before.weights_since)
    assert since == [7, 7, 9, 9, 11]


def test_a_checkpoint_of_before_says_nothing_of_how_long_the_weights_are_what_they_are() -> None:
    fields = json.loads(STATE.model_dump_json())
    del fields["weights_since"], fields["is_mismatched"]
    state = RunState.model_validate_json(json.dumps(fields))
    assert (state.weights_since, state.is_mismatched) == (None, False)


def _write(path: Path, content: str) -> None:
    path.write_text(content)


@pytest.mark.parametrize("written_for", ["another log", ""])
def test_a_version_that_another_log_may_have_committed_is_not_replaced(tmp_path: Path, written_for: str) -> None:
    first(tmp_path, "other", written_for)
    with pytest.raises(Fenced, match="another process wrote") as found:
        first(tmp_path, "owner", "log" if written_for else "")
    assert not isinstance(found.value, Occupied)
    assert (tmp_path / "r" / "v000001" / "weights" / "w").read_text() == "other"


@pytest.mark.parametrize("left", ["another", "empty", "none"])
def test_one_that_sleeps_before_it_empties_a_folder_harms_no_successors(tmp_path: Path, left: str) -> None:
    first(tmp_path, "predecessor")
    with pytest.raises(Occupied) as found:
        first(tmp_path, "sleeper")
    folder = Checkpoints(tmp_path, "r")
    assert len(folder.uncommitted(None).remove()) == 2
    if left == "another":
        first(tmp_path, "successor")
    elif left == "empty":
        (tmp_path / "r" / "v000001").mkdir()
    with pytest.raises(Fenced, match="another process") as then:
        folder.replace(found.value)
    if isinstance(then.value, Occupied):
        then.value.close()
    assert left != "another" or writer(tmp_path) == "successor"


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, done: int) -> Generator[None]:
    """In the middle of emptying a folder, once so many steps of it are done; or then behind it."""
    left = {"steps": done}

    def mortal(act: Callable[..., None]) -> Callable[..., None]:
        def until_dead(*arguments: Any, **options: Any) -> None:
            if left["steps"] == 0:
                raise KeyboardInterrupt
            left["steps"] -= "dir_fd" in options
            act(*arguments, **options)

        return until_dead

    with monkeypatch.context() as patched:
        for module, name in ((shutil, "rmtree"), (os, "unlink"), (Path, "rename"), (Path, "rmdir")):
            patched.setattr(module, name, mortal(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("done", range(7))
def test_a_crash_while_a_folder_is_emptied_leaves_what_a_start_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    first(tmp_path, "predecessor")
    with pytest.raises(Occupied) as found:
        first(tmp_path, "owner")
    folder = Checkpoints(tmp_path, "r")
    with dying(monkeypatch, done):
        folder.replace(found.value)
    assert len(folder.uncommitted(None).remove()) == 2
    first(tmp_path, "heir")
    assert writer(tmp_path) == "heir"


@pytest.mark.parametrize("done", range(7))
def test_a_removal_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    first(tmp_path, "predecessor")
    folder = Checkpoints(tmp_path, "r")
    with dying(monkeypatch, done):
        folder.uncommitted(None).remove()
    assert len(folder.uncommitted(None).remove()) == 1
    assert list((tmp_path / "r").iterdir()) == []


def test_what_another_process_put_there_since_it_was_found_is_not_removed(tmp_path: Path) -> None:
    first(tmp_path, "predecessor")
    (tmp_path / "r" / ".tmp-v000001-found").mkdir()
    folder = Checkpoints(tmp_path, "r")
    found, others = folder.uncommitted(None), folder.uncommitted(None)
    others.remove()
    first(tmp_path, "successor")
    (tmp_path / "r" / ".tmp-v000002-written").mkdir()
    assert len(found.remove()) == 2
    (tmp_path / "r" / ".tmp-v000002-written").rmdir()
    assert writer(tmp_path) == "successor"


def test_one_whose_half_written_choice_a_successor_removed_is_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = Checkpoints(tmp_path, "r"), Path.rename
    (tmp_path / "r").mkdir()

    def rename_late(path: Path, to: Path) -> Path:
        Checkpoints(tmp_path, "r").uncommitted(None).remove()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_late)
    with pytest.raises(Fenced, match=r"another process removed .*tmp-choice-.*: it owns run r now"):
        folder.choose(Choice(1, {}))
    assert folder.choice(1) is None


def test_a_choice_is_of_one_version_and_goes_with_it(tmp_path: Path) -> None:
    """A predecessor that wakes up has chosen for an earlier version, or for the same one, never for a later."""
    folder = two_versions(tmp_path)
    folder.choose(Choice(8, {4: ["a"]}))
    folder.choose(Choice(7, {1: ["b"]}))
    assert folder.choice(8) == Choice(8, {4: ["a"]})
    folder.prune(8, keep=2)
    assert (folder.choice(7), folder.choice(8)) == (None, Choice(8, {4: ["a"]}))


def test_a_copy_of_a_version_beside_them_is_nobodys_business(tmp_path: Path) -> None:
    folder = two_versions(tmp_path)
    best = tmp_path / "r" / "v000007-best"
    shutil.copytree(folder.folder(7), best)
    folder.prune(8, keep=1)
    assert not folder.uncommitted(8)
    assert (folder.folder(7).exists(), (best / "state.json").exists()) == (False, True)


def test_old_versions_may_be_removed_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_versions(tmp_path)
    unlink = os.unlink

    def unlink_what_is_gone(path: Any, **options: Any) -> None:
        unlink(path, **options)
        unlink(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink_what_is_gone)
        folder.prune(8, keep=1)
    assert not folder.folder(7).exists()


def test_one_whose_half_written_folder_a_successor_removed_is_fenced(tmp_path: Path) -> None:
    def start() -> None:
        Checkpoints(tmp_path, "r").uncommitted(None).remove()

    with pytest.raises(Fenced, match=r"another process removed .*: it owns run r now"):
        first(tmp_path, "predecessor", then=start)
    assert list((tmp_path / "r").iterdir()) == []


@contextmanager
def full_disk(free_bytes: int) -> Generator[None]:
    """No file gets longer: what a full disk is to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("lora_rank", "free_bytes", "file"), [(0, 4_000, "weights"), (4, 1_500, "weights"), (0, 20_000, "optimizer.pt")]
)
def test_a_full_disk_is_a_clear_error_whoever_writes(
    tmp_path: Path, lora_rank: int, free_bytes: int, file: str
) -> None:
    model = build_model(tmp_path / "model")
    learner = load_learner(model, TrainerSettings(model=model, lora_rank=lora_rank, max_logprob_difference=1e9))
    learner.step([Sample("a", [1, 2, 3, 4], [0, 1, 1, 1], [-1.0] * 4, [1] * 4, 1.0)], 2)  # now it has moments
    folder = Checkpoints(tmp_path, "r")
    with (
        full_disk(free_bytes),
        pytest.raises(StartError, match=rf"cannot write the checkpoint .*v000007: .*{file}.*\. Make room"),
    ):
        folder.write(STATE, Windows(SHAPE), learner.save_weights, learner.save_state)
    assert [path.name[:5] for path in (tmp_path / "r").iterdir()] == [".tmp-"]


def test_a_gap_in_what_lies_beside_the_weights_is_found(tmp_path: Path) -> None:
    def shorter(path: Path) -> None:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def gone(path: Path) -> None:
        path.unlink()

    harms: list[tuple[str, Callable[[Path], None]]] = [
        ("groups.jsonl", shorter), ("groups.jsonl", cut), ("groups.jsonl", gone), ("settings.json", cut),
        ("settings.json", gone), ("optimizer.pt", cut), ("optimizer.pt", gone),
    ]  # fmt: skip
    for number, (name, harm) in enumerate(harms):
        folder, checkpoint = written(tmp_path / str(number))
        assert folder.load(7) == checkpoint
        harm(checkpoint.folder / name)
        with pytest.raises(StartError, match=rf"v000007/{name}.*put it back .* or start a new run"):
            folder.load(7)


def of_before(checkpoint: Checkpoint, *fields: str) -> None:
    """As an earlier version of this code wrote it, that did not have these fields."""
    path = checkpoint.folder / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in state.items() if name not in fields}))


def test_a_checkpoint_that_says_nothing_of_its_files_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    folder, checkpoint = written(tmp_path)
    of_before(checkpoint, "files", "optimizer_bytes")
    groups = checkpoint.folder / "groups.jsonl"
    assert sorted(folder.windows(folder.load(7), SHAPE, 0).groups) == [0, 1]
    whole = groups.read_text()
    for broken in (whole[:-9], whole.replace('"group":1', '"group":5')):
        groups.write_text(broken)
        with pytest.raises(StartError, match=r"v000007/groups.jsonl cannot be read (?s:.*)put it back"):
            folder.windows(folder.load(7), SHAPE, 0)
    groups.unlink()
    with pytest.raises(StartError, match=r"v000007/groups.jsonl cannot be read (?s:.*)put it back"):
        folder.windows(folder.load(7), SHAPE, 0)


def test_an_optimizer_state_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    state = tmp_path / "optimizer.pt"
    load_learner(model, TrainerSettings(model=model)).save_state(state)
    whole = state.read_bytes()
    for broken in (whole[:500], whole[:3], b"", None):
        state.unlink(missing_ok=True)
        if broken is not None:
            state.write_bytes(broken)
        with pytest.raises(StartError, match=r"optimizer.pt cannot be read .*put it back .* or start a new run"):
            load_learner(model, TrainerSettings(model=model), state)


@pytest.mark.parametrize(("overlap_groups", "again"), [(3, [0, 1, 2]), (2, [1, 2]), (1, [2]), (0, [])])
def test_windows_slide_as_far_as_the_settings_of_now_say(tmp_path: Path, overlap_groups: int, again: list[int]) -> None:
    shape = replace(SHAPE, groups_per_step=1, overlap_groups=3, max_staleness=9)
    windows = Windows(shape, asked=9)
    for group in range(3):
        add_group(windows, group)
        taken(windows, 5)
    folder = Checkpoints(tmp_path, "r")
    folder.write(STATE, windows, lambda to: (to / "w").touch(), lambda to: to.touch())
    back = folder.windows(folder.load(7), replace(shape, overlap_groups=overlap_groups), 0)
    for version in (5, 6):
        add_group(back, version, min_version=5)
        window = taken(back, version)
        assert window
        earlier = [int(group[0].trajectory.group_id.removeprefix("r-g")) for group in window.groups[1:]]
        assert earlier == again
        again = [*again, version][len(again) + 1 - overlap_groups :]


def test_a_stranger_is_remembered_over_a_restart(tmp_path: Path) -> None:
    windows = Windows(SHAPE, asked=9)
    windows.add(stranger("mine-6"), 0)
    add_group(windows, 0)
    add_group(windows, 1)
    taken(windows, 5)
    windows.add(stranger("mine-7"), 0)
    folder = Checkpoints(tmp_path, "r")
    checkpoint = folder.write(STATE, windows, lambda to: (to / "w").touch(), lambda to: to.touch())
    back = folder.windows(folder.load(7), SHAPE, 0)
    for rollout_id in ("mine-6", "mine-7", "mine-8"):
        back.add(stranger(rollout_id), 0)
    assert [each.rollout_id for each in back.dropped] == ["mine-7", "mine-8"]

    of_before(checkpoint, "strangers")
    older = folder.windows(folder.load(7), SHAPE, 0)
    for rollout_id in ("mine-7", "mine-8"):
        older.add(stranger(rollout_id), 0)
    assert [each.rollout_id for each in older.dropped] == ["mine-7", "mine-8"]
