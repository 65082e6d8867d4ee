"""A server that is killed while it serves: nothing can answer its clients any more, so what is right is less.

Every stream ends with an error at once, after a part of what it would have been. Every process of the command ends, its
port is free again, and nothing is left over. A server started anew serves the same streams.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from phalanx.errors import DeadlineError, PeerDiedError, StartError, UserError
from phalanx.testing.blows import Blow
from phalanx.testing.checker import Round
from phalanx.testing.holdings import children_of, listening_ports, shared_files
from phalanx.testing.streams import Asked, Seen, difference, requests
from phalanx.transport.liveness import Party

START_S = 120.0
TOLD_S = 2.0
"""For clients to hear that their server is gone."""
GONE_S = 10.0
"""For its processes to end."""
STREAM_S = 120.0
LOOK_S = 0.02
PORTS = range(20_000, 30_000)
VOCAB_SIZE, MAX_LEN = 256, 256

_SERVE = """
import sys
from phalanx.executor.shared_fate import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
from phalanx.cli.main import main
main()
"""


class ServedChecker:
    """One `phalanx serve` after the other, and the same streams from each. Use `start`."""

    def __init__(self, model: Path, settings: Mapping[str, object], num_streams: int, seed: int, log: Path | None):
        self._flags = [word for name, value in settings.items() for word in _flag(name, value)]
        self._model = model
        self._log = log or Path(os.devnull)
        self._asked = [one._replace(cancelled_after=None) for one in requests(seed, num_streams, VOCAB_SIZE, MAX_LEN)]
        self._port = _free_port(random.Random(os.getpid()))
        self._url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._expected: Sequence[Seen] = ()
        self._num_tokens = 0

    @classmethod
    async def start(
        cls, model: Path, settings: Mapping[str, object], *, num_streams: int, seed: int, log: Path | None = None
    ) -> ServedChecker:
        """Start the server and see what its streams are. Raises StartError, and UserError if two runs differ."""
        checker = cls(model, settings, num_streams, seed, log)
        try:
            await checker._start()
            checker._expected = await checker._streams()
            if complaints := checker._complaints(await checker._streams()):
                raise UserError(f"two runs of the same requests are not the same: {'; '.join(complaints)}")
        except BaseException:
            await checker.close()
            raise
        return checker

    @property
    def is_alive(self) -> bool:
        """Whether another round makes sense."""
        return self._process is not None and self._process.poll() is None

    async def round(self, index: int, blow: Blow) -> Round:
        """Kill the server while streams run, and start the next one. `pause_s` is until that serves, and `gap_s` what
        the last client has waited to hear of it."""
        began_at = time.monotonic()
        assert self._process is not None
        family, files = _family(self._process.pid), shared_files()
        total, self._num_tokens = sum(len(one.text) for one in self._expected), 0
        running = asyncio.create_task(self._streams())
        while self._num_tokens < blow.after * total and not running.done():
            await asyncio.sleep(LOOK_S / 10)
        family = _family(self._process.pid)
        self._process.kill()
        killed_at = time.monotonic()
        left: list[str] = []
        try:
            found = await asyncio.wait_for(running, TOLD_S + GONE_S)
        except TimeoutError:
            found = []
        told_s = time.monotonic() - killed_at
        self._process.wait()
        wrong, lost = self._judged(found, told_s)
        left += await _left(family, files, self._port)
        again: list[str] = []
        try:
            await self._start()
            pause_s = time.monotonic() - killed_at
            again = self._complaints(await self._streams())
        except (StartError, DeadlineError, OSError) as error:
            pause_s, again = 0.0, [str(error)]
        return Round(
            index=index,
            blow=blow,
            has_happened=True,
            violations=(*wrong, *lost, *left, *(f"the next server: {one}" for one in again)),
            rungs=("another server",) if not again else (),
            pause_s=pause_s,
            gap_s=told_s,
            num_streams=2 * len(self._asked),
            num_wrong=len(wrong) + len(again),
            num_lost=len(lost),
            num_left=len(left),
            took_s=time.monotonic() - began_at,
        )

    async def close(self) -> list[str]:
        """End the server; what is left of it, in words."""
        if self._process is None:
            return []
        family, files = _family(self._process.pid), shared_files()
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return [f"the server has not ended {START_S:.0f} s after SIGTERM"]
        finally:
            self._process = None
        return await _left(family, files, self._port)

    # ------------------------------------------------------------------------------------- streams

    async def _streams(self) -> list[Seen]:
        limits = httpx.Limits(max_connections=len(self._asked))
        async with httpx.AsyncClient(timeout=STREAM_S, limits=limits) as client:
            return await asyncio.gather(*(follow_url(client, self._url, one, self._count) for one in self._asked))

    def _count(self, num_letters: int) -> None:
        self._num_tokens += num_letters

    def _complaints(self, found: Sequence[Seen]) -> list[str]:
        differences = map(difference, self._asked, self._expected, found)
        return [f"stream {number}: {one}" for number, one in enumerate(differences) if one is not None]

    def _judged(self, found: Sequence[Seen], told_s: float) -> tuple[list[str], list[str]]:
        """Streams that are not the beginning of what they would have been, and those whose clients were not told."""
        if not found:
            return [], [f"streams have not ended {told_s:.0f} s after their server"] * len(self._asked)
        wrong, lost = [], []
        if told_s > TOLD_S:
            lost.append(f"the last stream has ended {told_s:.1f} s after its server")
        for number, (seen, whole) in enumerate(zip(found, self._expected, strict=True)):
            if not whole.text.startswith(seen.text):
                wrong.append(f"stream {number} is not the beginning of what it was")
            is_whole = bool(seen.reasons) and seen.text == whole.text
            if seen.error is None and not is_whole:
                lost.append(f"stream {number} has ended without an error")
        return wrong, lost

    # ------------------------------------------------------------------------------------- the server

    async def _start(self) -> None:
        command = [sys.executable, "-c", _SERVE, str(os.getpid()), "serve", str(self._model)]
        command += ["--port", str(self._port), *self._flags]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        expires_at = time.monotonic() + START_S
        async with httpx.AsyncClient(timeout=1.0) as client:
            while time.monotonic() < expires_at:
                if self._process.poll() is not None:
                    raise StartError("the server", "starting", f"it ended with {self._process.returncode}")
                try:
                    if (await client.get(f"{self._url}/health")).status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(LOOK_S)
        raise DeadlineError("a server that serves", f"process {self._process.pid}", START_S)


async def follow_url(client: httpx.AsyncClient, url: str, asked: Asked, on_text: Callable[[int], None]) -> Seen:
    """As streams.follow, over HTTP: what comes is text, and no tokens."""
    seen, last = Seen(), 0.0
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=_body(asked)) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece, now = json.loads(line[6:]), time.monotonic()
                if "error" in piece:
                    seen.error = str(piece["error"])
                    break
                seen.gap_s, last = max(seen.gap_s, now - last if last else 0.0), now
                for choice in piece["choices"]:
                    seen.text += choice["text"]
                    seen.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
                    on_text(len(choice["text"]))
                    if choice["finish_reason"] is not None:
                        seen.reasons.append(choice["finish_reason"])
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


def _body(asked: Asked) -> dict[str, Any]:
    default = type(asked.sampling)()
    changed = {
        name: value for name, value in msgspec.structs.asdict(asked.sampling).items() if value != getattr(default, name)
    }
    return {"prompt": list(asked.prompt), "stream": True, **changed}


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def _family(pid: int) -> list[Party]:
    """A process and all that it has started, however far down."""
    found: list[Party] = []
    for one in (pid, *children_of(pid)):
        try:
            found += [Party.of("a process of the server", one)] if one == pid else _family(one)
        except PeerDiedError:  # it has just ended
            continue
    return found


async def _left(family: Sequence[Party], files: set[str], port: int) -> list[str]:
    """What is left of a server that has ended, when that has had time to go."""
    expires_at = time.monotonic() + GONE_S
    while True:
        found = [f"left over: process {one.pid}" for one in family if one.is_alive()]
        found += [f"left over: {name} in /dev/shm" for name in sorted(shared_files() - files)]
        found += ["left over: the server's port"] if port in listening_ports() else []
        if not found or time.monotonic() > expires_at:
            return found
        await asyncio.sleep(LOOK_S)


def _free_port(dice: random.Random) -> int:
    """Of those that the kernel gives to nobody by itself."""
    ports: list[int] = sorted(set(PORTS).difference(listening_ports()))
    return dice.choice(ports)
