"""What the gateway costs: calls a second, latency and CPU time a call, in front of a policy server that does nothing.

Run: .venv/bin/python -m tests.bench.bench_gateway [calls] [concurrency]. Starts a real broker in a temporary folder,
the gateway and the null backend as processes, and compares calls through the gateway with calls past it. CPU
time is what to compare on a busy machine: 1000 / it is the rate one core sustains.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import orjson
import psutil
from starlette.types import Receive, Scope, Send

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.settings import GatewaySettings, KafkaSettings, Settings

GATEWAY_PORT = 24_750
BACKEND_PORT = 24_760
TOKENS = 24

_ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "policy",
        "prompt_token_ids": list(range(60)),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "CALC((37+56)*74)"},
                "finish_reason": "stop",
                "token_ids": list(range(TOKENS)),
                "logprobs": {"content": [{"token": "x", "logprob": -0.5, "top_logprobs": []}] * TOKENS},
                "weight_versions": [{"version": "17", "start": 0, "end": TOKENS}],
            }
        ],
        "usage": {"prompt_tokens": 60, "completion_tokens": TOKENS, "total_tokens": 60 + TOKENS},
    }
)
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]


async def null_backend(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI app that answers everything with the same completion."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _ANSWER})


async def measure(url: str, calls: int, concurrency: int) -> tuple[float, list[float]]:
    """(calls a second, latency in ms of each)."""
    body = orjson.dumps({"model": "policy", "messages": [{"role": "user", "content": "How much is 93 * 74?"}]})
    headers = {"content-type": "application/json"}
    latencies: list[float] = []
    left = iter(range(calls))

    async def agent(session: aiohttp.ClientSession, number: int) -> None:
        path = url.format(rollout=f"r{number}")
        for _ in left:
            began = time.perf_counter()
            async with session.post(path, data=body, headers=headers) as response:
                await response.read()
                assert response.status == 200, await response.text()
            latencies.append((time.perf_counter() - began) * 1000)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(agent(session, number) for number in range(concurrency)))
        return calls / (time.perf_counter() - began), latencies


async def wait_for(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


def cpu_ms(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return (times.user + times.system) * 1000


async def compare(gateway_pid: int, calls: int, concurrency: int) -> None:
    through = f"http://127.0.0.1:{GATEWAY_PORT}/rollout/{{rollout}}/attempt/a1/v1/chat/completions"
    past = f"http://127.0.0.1:{BACKEND_PORT}/v1/chat/completions"
    await wait_for(f"http://127.0.0.1:{GATEWAY_PORT}/health")
    for many in (1, concurrency):
        for name, url in (("backend alone", past), ("through the gateway", through)):
            await measure(url, calls // 10, many)
            before = cpu_ms(gateway_pid)
            rate, latencies = await measure(url, calls, many)
            p50 = statistics.median(latencies)
            p99 = statistics.quantiles(latencies, n=100)[98]
            cpu = (cpu_ms(gateway_pid) - before) / calls
            figures = f"{rate:7.0f} calls/s   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   gateway {cpu:5.2f} ms CPU a call"
            print(f"{many:4d} at once, {name:20s} {figures}")  # noqa: T201


def main() -> None:
    calls, concurrency = (int(arg) for arg in (*sys.argv[1:], *("2000", "16")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder, EmbeddedKafka(Path(folder)) as kafka:
        settings = Settings(
            kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
            gateway=GatewaySettings(port=GATEWAY_PORT, backend_url=f"http://127.0.0.1:{BACKEND_PORT}"),
        )
        asyncio.run(_with_processes(settings, calls, concurrency))


async def _with_processes(settings: Settings, calls: int, concurrency: int) -> None:
    await create_topics(settings.kafka)
    program = (
        "import sys; from fulgurite.producers.gateway import main; from fulgurite.schemas.settings import Settings;"
        "sys.exit(main(Settings.model_validate_json(sys.argv[1])))"
    )
    backend = ["-m", "uvicorn", "--log-level", "error", "--port", str(BACKEND_PORT), f"{__spec__.name}:null_backend"]
    commands = [backend, ["-c", program, settings.model_dump_json(include={"kafka", "gateway"})]]
    processes = [await asyncio.create_subprocess_exec(sys.executable, *command) for command in commands]
    try:
        async with asyncio.timeout(300):
            await compare(processes[1].pid, calls, concurrency)
    finally:
        for process in processes:
            process.terminate()
            await process.wait()


if __name__ == "__main__":
    main()
