"""Checkpoints: everything a run needs to go on from a version, in one folder that appears at once or not at all.

    <output>/<run_id>/v000017/          written as .tmp-v000017-<random>, fsynced, renamed
        weights/                        Hugging Face folder: what servers load; its URI and sha256 are announced
        optimizer.pt                    the learner's own state (newest checkpoint only)
        state.json                      version, step, next offsets, groups asked for, ledger not yet published; since
                                        which version the weights are these, and whether the sampler was last found to
                                        disagree; and what the other files must be: sha256, of optimizer.pt the length
        groups.jsonl                    open groups: one line a member, with its trajectory
        settings.json                   what the version was made with
    <output>/<run_id>/choice-v000017.json    the groups of the window that the version after this one is made of

A folder that has anything in it was completely written. Whether its version is *committed* the log alone knows: a
folder one newer than the last committed version is a leftover of a crash and is removed before it can be mistaken for
one (`leftovers.py`). Anything more was committed once, on a log that this one is not, and so may be what was written
with other offsets than this run has on this log (`RunState.lineage`): it is never removed, and never gone on from.

Where a predecessor that is fenced, and does not know it yet, was first with the next version: `occupied.py`.
Torch-free: the learner writes its files through a callback.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from fulgurite.schemas.checksum import file_sha256, folder_sha256
from fulgurite.schemas.errors import Fenced, FulguriteError, StartError
from fulgurite.streams.trainer.kept import TEMPORARY
from fulgurite.streams.trainer.leftovers import Leftovers
from fulgurite.streams.trainer.occupied import Occupied, occupied, read_state
from fulgurite.streams.trainer.run_state import STATE, member_lines, of_windows, restored
from fulgurite.streams.trainer.run_state import OpenGroup as OpenGroup
from fulgurite.streams.trainer.run_state import RunState as RunState
from fulgurite.streams.trainer.run_state import SourceState as SourceState
from fulgurite.streams.trainer.samples import ADAPTER_CONFIG
from fulgurite.streams.trainer.windows import Choice, Shape, Windows

WEIGHTS = "weights"
OPTIMIZER = "optimizer.pt"
GROUPS = "groups.jsonl"
SETTINGS = "settings.json"
CHOICE = "choice"

_VERSION: Final = re.compile(r"v(\d{6,})", re.ASCII)
_REMEDY = (
    "put it back as it was written, or start a new run from a version's weights/ (another trainer.run_id, "
    "trainer.model set to that folder)"
)
_COMPANIONS: Final = frozenset({".jinja", ".json", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"})
_CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    state: RunState

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def uri(self) -> str:
        return self.weights.as_uri()


class Checkpoints:
    """The folders of one run. `output` need not exist."""

    def __init__(self, output: Path, run_id: str, settings: Mapping[str, Any] | None = None) -> None:
        self._root = output.resolve() / run_id
        self._settings = dict(settings or {})

    def folder(self, version: int) -> Path:
        return self._root / f"v{version:06d}"

    def write(
        self,
        state: RunState,
        windows: Windows,
        save_weights: Callable[[Path], None],
        save_state: Callable[[Path], None],
    ) -> Checkpoint:
        """`state`'s sha256 and weights_since are those of the version before, if there is one.

        Raises StartError where the disk refuses; then nothing but a temporary folder is left, which the next start
        removes. Both callbacks say OSError then. Raises Fenced where a successor has removed that folder already,
        Occupied where another process was first."""
        final = self.folder(state.version)
        temporary = self._root / f"{TEMPORARY}{final.name}-{secrets.token_hex(4)}"
        try:
            (temporary / WEIGHTS).mkdir(parents=True)
        except OSError as error:
            raise _refused(final, error) from error
        try:
            save_weights(temporary / WEIGHTS)
            save_state(temporary / OPTIMIZER)
            (temporary / SETTINGS).write_text(json.dumps(self._settings, indent=1) + "\n")
            with (temporary / GROUPS).open("w") as file:
                for line in member_lines(windows):
                    file.write(line.model_dump_json() + "\n")
            sha256 = folder_sha256(temporary / WEIGHTS)
            written = {
                "sha256": sha256,
                "weights_since": state.weights_since if sha256 == state.sha256 else state.version,
                "files": {name: file_sha256(temporary / name) for name in (GROUPS, SETTINGS)},
                "optimizer_bytes": _bytes(temporary / OPTIMIZER),
            }
            state = state.model_copy(update={**of_windows(windows), **written})
            (temporary / STATE).write_text(state.model_dump_json(indent=1))
            _fsync_tree(temporary)
        except OSError as error:
            raise _interrupted(final, temporary, error) from error
        return self._publish(Checkpoint(final, state), temporary)

    def replace(self, found: Occupied) -> Checkpoint:
        """What `write` could not finish. Only for who has confirmed, since that was raised, that it owns the run: the
        folder in its way was then a predecessor's, which never commits it."""
        try:
            found.empty()
        except OSError as error:
            raise _refused(found.folder, error) from error
        finally:
            found.close()
        return self._publish(Checkpoint(found.folder, found.state), found.temporary)

    def _publish(self, checkpoint: Checkpoint, temporary: Path) -> Checkpoint:
        final = checkpoint.folder
        try:
            temporary.rename(final)  # an empty folder gives way, no other one does
        except OSError as error:
            if final.exists():
                # Leftovers were removed at the start, so another process of this run wrote it since.
                raise occupied(final, checkpoint.state, temporary) from error
            raise _interrupted(final, temporary, error) from error
        try:
            _fsync(self._root)
        except OSError as error:
            raise _refused(final, error) from error
        return checkpoint

    def choose(self, choice: Choice) -> None:
        """Keeps which groups a window has; by version, for a predecessor that wakes up has an earlier one. Raises
        StartError where the disk refuses, Fenced where a successor has removed what it was about to become."""
        path = self._chosen(choice.version_in)
        temporary = self._root / f"{TEMPORARY}{CHOICE}-{secrets.token_hex(4)}"  # a zombie may be writing one too
        try:
            temporary.write_bytes(_CHOICE.dump_json(choice))
            _fsync(temporary)
            temporary.rename(path)
            _fsync(self._root)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self._root.is_dir():
                raise _taken(temporary) from error
            temporary.unlink(missing_ok=True)
            raise StartError(f"cannot write {path}: {error}. Make room or set trainer.output elsewhere") from error

    def choice(self, version_in: int) -> Choice | None:
        """None where there is none, or it cannot be read: then a window is chosen anew."""
        try:
            return _CHOICE.validate_json(self._chosen(version_in).read_bytes())
        except (OSError, ValueError):
            return None

    def _chosen(self, version_in: int) -> Path:
        return self._root / f"{CHOICE}-{self.folder(version_in).name}.json"

    def settings(self, version: int) -> dict[str, Any]:
        """What a version was made with; nothing where that cannot be read."""
        try:
            return json.loads((self.folder(version) / SETTINGS).read_text())
        except (OSError, ValueError):
            return {}

    def load(self, version: int, lineages: Collection[str] | None = None) -> Checkpoint:
        """The checkpoint of the version that a run goes on from. Raises StartError where it is not there or not whole:
        an open group without one of its members would make a window of others, and name that one nowhere. And where it
        is of none of these lineages: its offsets are those of another log. None: that is not known."""
        folder = self.folder(version)
        try:
            state = RunState.model_validate_json((folder / STATE).read_text())
        except (OSError, ValueError) as error:
            raise StartError(
                f"version {version} is committed, but its checkpoint {folder} cannot be read ({error}). Point "
                "trainer.output at the folder the run wrote to, or start a new run from a version's weights/"
            ) from None
        if _is_foreign(state, lineages):
            raise StartError(
                f"{folder} was not written by this run, but by one of the same name on another log (broker or "
                "topic_prefix): its offsets mean nothing here. Set trainer.output to the folder that this run wrote "
                "to, or start a new run from a version's weights/ (another trainer.run_id, trainer.model set to that "
                "folder)"
            )
        if (found := folder_sha256(folder / WEIGHTS)) != state.sha256:
            raise StartError(
                f"{folder / WEIGHTS} has sha256 {found}; {state.sha256} was written: the files were changed"
            )
        for name, written in state.files.items():
            _compare(folder / name, "sha256", written, file_sha256)
        if state.optimizer_bytes is not None:
            _compare(folder / OPTIMIZER, "length in bytes", state.optimizer_bytes, _bytes)
        return Checkpoint(folder, state)

    def windows(self, checkpoint: Checkpoint, shape: Shape, now_ns: int) -> Windows:
        """The open groups of a checkpoint, as they were; their deadlines count from `now_ns`.

        While the trainer was down nobody may have worked on them, so that time must not count against the missing ones.
        """
        path = checkpoint.folder / GROUPS
        try:
            with path.open() as lines:
                return restored(checkpoint.state, lines, shape, now_ns)
        except (OSError, ValueError) as error:
            raise StartError(f"{path} cannot be read ({error}): {_REMEDY}") from error

    def uncommitted(
        self, committed: int | None, lineages: Collection[str] | None = None, *, begun: bool = False
    ) -> Leftovers:
        """Finds what a crash left: half-written folders, and the one version whose transaction did not commit.

        `committed` is the last version the log knows of this run, None where it does not know the run: then the
        leftover is that of the first transaction, which makes step 0; but not where the run's offsets say that it has
        `begun`: then `training` was wiped. `lineages`: of this run on this log; None where that is not known.
        Refused (`Leftovers.remove`) is more than a crash can leave, or something of another lineage: these versions
        were committed, and the log that says so is missing.
        """

        def judge(folder: Path, opened: int) -> str:
            version, state = int(folder.name[1:]), read_state(opened)
            # Asked in this order: who empties a folder takes its state last.
            is_empty = state is None and not os.listdir(opened)  # about to be replaced
            step = f"step {state.step if state else 'unknown'}"
            if committed is None and not is_empty and (begun or state is None or state.step != 0):
                return self._refusal(folder, step, "does not know this run")
            if state and _is_foreign(state, lineages):
                return self._refusal(folder, step, "has other offsets of this run than it was written with")
            if committed is not None and version > committed + 1:
                return self._refusal(folder, f"version {version}", f"knows this run only up to version {committed}")
            return ""

        half_written = list(self._root.glob(f"{TEMPORARY}*"))
        newer = [folder for version, folder in self._versions() if committed is None or version > committed]
        return Leftovers(half_written, newer, judge)

    def _refusal(self, folder: Path, found: str, what_the_log_knows: str) -> str:
        return (
            f"{folder} is a checkpoint of run {self._root.name} ({found}), but the log {what_the_log_knows}: the run "
            "was trained against another broker or topic_prefix, or its topics were wiped. Nothing was removed. Check "
            "kafka.bootstrap_servers and kafka.topic_prefix; or set another trainer.run_id or trainer.output; or, "
            f"where the topics were wiped on purpose, move {self._root} away"
        )

    def prune(self, committed: int, keep: int) -> None:
        """Keeps the newest `keep` versions' weights, and the learner's state of the newest only: of those up to the
        one that this process has committed. What is newer is a successor's."""
        versions = [(version, folder) for version, folder in self._versions() if version <= committed]
        for _, folder in versions[:-1]:
            (folder / OPTIMIZER).unlink(missing_ok=True)
        for version, _ in versions[:-1]:
            self._chosen(version).unlink(missing_ok=True)
        for _, folder in versions[:-keep]:
            shutil.rmtree(folder, onerror=_but_gone)

    def _versions(self) -> list[tuple[int, Path]]:
        """What else lies here, copies that somebody made of versions for example, is nobody's business."""
        named = [(_VERSION.fullmatch(folder.name), folder) for folder in self._root.glob("v*")]
        return sorted((int(found[1]), folder) for found, folder in named if found and folder.is_dir())


def _but_gone(function: Callable[..., Any], path: str, error: Any) -> None:
    """For rmtree: a predecessor that does not know it yet removes old versions, too."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _refused(folder: Path, error: OSError) -> StartError:
    return StartError(
        f"cannot write the checkpoint {folder}: {error}. Make room or set trainer.output elsewhere; nothing was "
        "announced, the run goes on from the version before"
    )


def _interrupted(folder: Path, temporary: Path, error: OSError) -> FulguriteError:
    return _refused(folder, error) if temporary.is_dir() else _taken(temporary)


def _taken(temporary: Path) -> Fenced:
    """Only a start of the same run removes what has a temporary name."""
    return Fenced(f"another process removed {temporary}: it owns run {temporary.parent.name} now")


def copy_companions(model: Path, weights: Path) -> None:
    """What belongs to a policy beside its weights, unchanged: tokenizer, chat template, generation and processors'
    configs, a model's own code, its licence and card. By what such files are called and not by what weights are: a
    model's folder may hold them in the formats of ten other frameworks, each as large as the model. No subfolders."""
    for path in sorted(model.iterdir()):
        belongs = path.suffix in _COMPANIONS or path.name.startswith(("LICENSE", "NOTICE"))
        is_own = path.name in ("config.json", ADAPTER_CONFIG) or path.name.endswith(".index.json")
        if path.is_file() and belongs and not is_own:
            shutil.copyfile(path, weights / path.name)


def _is_foreign(state: RunState, lineages: Collection[str] | None) -> bool:
    """Whether it is known to have been written for another log."""
    return bool(lineages is not None and state.lineage and state.lineage not in lineages)


def _compare(path: Path, what: str, written: str | int, measure: Callable[[Path], str | int]) -> None:
    """Raises StartError where a file is not what was written."""
    try:
        found = measure(path)
    except OSError as error:
        raise StartError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    if found != written:
        raise StartError(f"{path}: its {what} is {found}, but {written} was written: {_REMEDY}")


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
