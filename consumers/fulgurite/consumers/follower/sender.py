"""Sends a version's tensors to one vLLM from GPU to GPU, over vLLM's weight-transfer routes. A process of its own: the
follower has neither torch nor a GPU, and a communicator that breaks can only be got rid of by ending its process.

    stdin   a folder a line, as JSON                       stdout  an answer a line, as JSON
            (none)                                                 {"ready": true}, once, when the servers' workers and
                                                                   this process are one group
            {"folder": "/versions/17"}                             {"sent": true}
                                                                   {"error": "…", "status": 400, "touched": false,
                                                                    "answered": true, "joining": false}

Run by an interpreter that has the server's own vLLM (`follower.transfer_python`), by path: it knows nothing of this
package. Everything that vLLM prints goes to stderr. Ends when stdin does, so with the follower, or after an error; not
by the signals that a terminal or a supervisor sends to all of a group, since workers would wait for it for ever.

status: what the server answered, 0 where it did not, or was not the trouble. answered: whether the server is there,
as far as is known. touched: whether its weights may be other than before. joining: whether it was asked to join a
group, in which its engine waits, and may wait on.

--reset: an update of this server began and did not come to its end. vLLM then still has what it was sent, and would
count it as part of the next update; an empty one takes it away. It is not for a server that serves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

API_KEY: Final = "FULGURITE_FOLLOWER_API_KEY"
"""In the environment: other users of the machine see command lines."""
INDEX: Final = "model.safetensors.index.json"
DTYPES: Final = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U8": "uint8",
}
"""Of a safetensors header -> torch."""


class Refused(Exception):
    """What the server answered, or that it did not (status 0)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Routes:
    """The server's control plane, as vLLM's trainer side calls it. Every call takes at most `seconds`.

    `end` is told what became of a call that runs beside this process' part of a collective: that part waits for workers
    who will not come, and nothing but the end of the process ends it.
    """

    def __init__(self, url: str, seconds: float, api_key: str, end: Callable[[Exception], NoReturn]) -> None:
        self._url = url.rstrip("/")
        self._seconds = seconds
        self._end = end
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.touched = False
        """Whether an update has begun since this was last set to False."""
        self.joining = False
        """Whether the server was asked to join a group, and has not."""
        # The environment's proxies are for the world outside; the follower asks its servers without them, too.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def world_size(self) -> int:
        """Workers of the server, over all of its replicas."""
        return int(self._call("GET", "/get_world_size")["world_size"])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.joining = True
        self._in_step("/init_weight_transfer_engine", {"init_info": init_info})
        self.joining = False

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("POST", "/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        try:
            self._call("POST", "/start_weight_update")
        except Refused as error:
            # Of several workers one may have begun.
            self.touched = not 400 <= error.status < 500
            raise
        self.touched = True

    def update_weights(self, update_info: Any) -> None:
        self._in_step("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": weight_version} if weight_version else None)

    def leave(self) -> None:
        """Ends what a sender before this one has left, if any: a group, an update half done."""
        try:
            self.shutdown_weight_transfer_engine()
        except Refused as error:
            if error.status in (0, 404):
                raise
            with contextlib.suppress(Refused):
                self._call("POST", "/update_weights", {"update_info": {}})  # it fails, and with it the update
            self.shutdown_weight_transfer_engine()

    def reset(self) -> None:
        """An update of nothing."""
        self.start_weight_update()
        self.finish_weight_update()

    def _in_step(self, path: str, body: Any) -> None:
        try:
            self._call("POST", path, body)
        except Exception as error:
            self._end(error)

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, self._headers, method=method)
        try:
            with self._opener.open(request, timeout=self._seconds) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            text = error.read(2_000).decode(errors="replace")
            raise Refused(f"{path}: status {error.code}: {text[:500]}", error.code) from None
        except OSError as error:  # URLError and timeouts are such
            raise Refused(f"{path}: {error!r}", 0) from None


def files_of(folder: Path) -> list[Path]:
    """The safetensors files that a server would read."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def folder_source(device: str) -> Any:
    """A vLLM WeightSource over the safetensors of `.folder`, read to `device` one tensor at a time."""
    base: Any = importlib.import_module("vllm.distributed.weight_transfer.base")
    safetensors: Any = importlib.import_module("safetensors")
    torch: Any = importlib.import_module("torch")

    class Folder(base.WeightSource):  # pyright: ignore[reportUntypedBaseClass]
        folder = Path()

        def metadata(self) -> list[Any]:
            found: list[Any] = []
            for path in files_of(self.folder):
                with safetensors.safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no mapping)
                        part = file.get_slice(name)
                        dtype = getattr(torch, DTYPES[part.get_dtype()])
                        found.append(base.ParamMeta(name, dtype, tuple(part.get_shape())))
            return found

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            for path in files_of(self.folder):
                with safetensors.safe_open(path, framework="pt", device=device) as file:
                    for name in file.keys():  # noqa: SIM118
                        yield name, file.get_tensor(name)

    return Folder()


def connect(
    routes: Routes, host: str, device: str, end: Callable[[Exception], NoReturn], *, reset: bool
) -> tuple[Any, Any]:
    """vLLM's trainer side of the transfer, of which this process is rank 0 and the server's workers are the others, and
    the source of what it sends."""
    world_size = 1 + routes.world_size()  # the first question: a server without these routes says so at once
    routes.leave()
    torch: Any = importlib.import_module("torch")
    if device != "cpu":
        torch.cuda.set_device(device)
    plugins: Any = importlib.import_module("vllm.plugins")
    plugins.load_general_plugins()
    factory: Any = importlib.import_module("vllm.distributed.weight_transfer.factory")
    nccl: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    _tell_at_once(nccl, end)
    about = nccl.NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world_size, rank=0)
    source = folder_source(device)
    engine = factory.WeightTransferTrainerFactory.trainer_init(about, client=routes, source=source)
    if reset:
        routes.reset()
    return engine, source


def _tell_at_once(nccl: Any, end: Callable[[Exception], NoReturn]) -> None:
    """What goes wrong on this side of the group: vLLM waits for the server's answer first, which says nothing of it."""
    join = getattr(nccl, "open_trainer_endpoint", None)
    if join is None:
        return

    def joined(about: Any) -> Any:
        try:
            return join(about)
        except Exception as error:
            end(error)

    nccl.open_trainer_endpoint = joined


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description="Sends versions to one vLLM; started by the follower.")
    parser.add_argument("url")
    parser.add_argument("--host", required=True, help="of this machine, where the server's workers reach it")
    parser.add_argument("--device", default="cuda:0", help="where tensors are read to")
    parser.add_argument("--seconds", type=float, required=True, help="longest that a call takes")
    parser.add_argument("--reset", action="store_true", help="an update before did not come to its end")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to stdout
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def answer(**what: object) -> None:
        answers.write(json.dumps(what) + "\n")

    def end(error: Exception) -> NoReturn:
        status, answered = (error.status, error.status != 0) if isinstance(error, Refused) else (0, True)
        said = f"{type(error).__name__}: {error}"[:2_000]
        try:
            answer(error=said, status=status, touched=routes.touched, answered=answered, joining=routes.joining)
        finally:
            os._exit(1)  # a thread of vLLM's may wait for a broken group for ever

    routes = Routes(options.url, options.seconds, os.environ.get(API_KEY, ""), end)
    try:
        engine, source = connect(routes, options.host, options.device, end, reset=options.reset)
        answer(ready=True)
        for line in sys.stdin:
            routes.touched = False
            source.folder = Path(json.loads(line)["folder"])
            engine.send_weights()
            answer(sent=True)
    except Exception as error:  # whatever it is, the follower is told, and this process ends
        end(error)
    os._exit(0)


if __name__ == "__main__":
    main()
