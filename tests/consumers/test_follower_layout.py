"""Headers of safetensors: what is whole passes, and each way to be not whole is named."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fulgurite.consumers.follower.layout import INDEX, check_alike, is_tied, read_layout
from fulgurite.consumers.follower.store import StoreTrouble, Unusable
from tests.consumers.follower_support import write_safetensors


def test_what_the_library_writes_is_read(tmp_path: Path):
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float16), "c": np.zeros((0, 4), np.int64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    assert read_layout(tmp_path) == {"a": (2, 3), "b": (), "c": (0, 4)}


def test_a_folder_of_another_format_has_no_layout(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"?")
    assert read_layout(tmp_path) == {}


def sharded(folder: Path, index: Any) -> Path:
    write_safetensors(folder / "one.safetensors", {"a": (2,)})
    write_safetensors(folder / "two.safetensors", {"b": (3,)})
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_of_several_files_those_in_the_index_count(tmp_path: Path):
    assert read_layout(sharded(tmp_path, {"weight_map": {"a": "one.safetensors"}})) == {"a": (2,)}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}}, "'three.safetensors', which is not there"),
        ({"weight_map": {"a": "../one.safetensors"}}, "which is not there"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "b are in no file"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
        ("{", "not JSON"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, index: Any, message: str):
    with pytest.raises(Unusable, match=message):
        read_layout(sharded(tmp_path / "v1", index))


def with_header(header: Any, tensors: int = 4) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + bytes(tensors)


def tensor(**about: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | about}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off in its header"),
        (b"no weights", "no safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut off in its header"),
        (with_header(b"{]"), "not JSON"),
        pytest.param(with_header(b"[" * 200_000), "not JSON", id="deep"),
        (with_header([]), "no JSON object"),
        (with_header(tensor(), tensors=3), "was cut off"),
        (with_header(tensor(), tensors=5), "holds 5 bytes"),
        (with_header(tensor(shape=[2, 3])), r"a is U8 \[2, 3\], but has 4 bytes"),
        (with_header(tensor(dtype="F32")), "but has 4 bytes"),
        (with_header(tensor(data_offsets=[1, 5])), "leave a gap at byte 0"),
        (with_header(tensor(data_offsets=[4, 0])), "has -4 bytes"),
        (with_header(tensor(data_offsets=[0])), "does not say"),
        (with_header(tensor(shape="four")), "does not say"),
        (with_header(tensor(shape=[True, 4])), "does not say"),
        (with_header(tensor(dtype=["U8"])), "does not say"),
        (with_header({"a": 1}), "does not say"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Unusable, match=message) as error:
        read_layout(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_a_dtype_that_is_not_known_here_may_be_to_a_server(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(with_header(tensor(dtype="F6")))
    assert read_layout(tmp_path) == {"a": (4,)}


def test_another_dtype_is_no_other_tensor():
    check_alike({"a": (2,)}, {"a": (2,)})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"a": (2,)}, "b are missing"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "c are new"),
        ({"a": (3,), "b": (3,)}, "a have another shape"),
        ({f"x{number}": (1,) for number in range(9)}, "a, b are missing; x0, x1, x2, x3, x4 and 4 more are new"),
    ],
)
def test_other_tensors_than_before_are_named(layout: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(Unusable, match=message):
        check_alike(layout, {"a": (2,), "b": (3,)})


@pytest.mark.parametrize(
    ("config", "tied"),
    [('{"tie_word_embeddings": true}', True), ('{"tie_word_embeddings": false}', False), ("[]", False), ("{", False)],
)
def test_a_tied_model_says_so(tmp_path: Path, config: str, tied: bool):
    assert not is_tied(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert is_tied(tmp_path) is tied


def test_an_error_of_the_disk_is_trouble_and_a_file_that_went_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model.safetensors").write_bytes(with_header(tensor()))
    for number, expected in ((errno.EIO, StoreTrouble), (errno.ENOENT, Unusable)):
        error = OSError(number, "of the disk")

        def fail(path: Path, mode: str, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(expected, match="of the disk"):
            read_layout(tmp_path)
