"""One model on several ranks: rank 0 leads, the others follow the same stream of steps.

`open_ranks` gives each other rank a process of its own: `python -m ingot.llm.parallel '{"engine": …}'`. `local_ranks`
gives it a thread of this one, which is how engines are verified before anybody has them. A rank that ends takes the
others along: whoever waits for it gets GroupLost, and nothing is computed any more.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ingot.engine import Engine
from ingot.errors import EngineError
from ingot.llm.batch import Batch, Copy, Wanted
from ingot.llm.runner import EngineRunner, Stepping
from ingot.runtime.cpu import usable_threads
from ingot.runtime.group import Group, GroupLost, SharedGroup, shared_groups

log = logging.getLogger("ingot.llm")
_WAIT = 10.0  # seconds for a rank to end by itself


def rank_path(path: str | Path, rank: int) -> Path:
    """Where a rank's engine lies: model.engine is rank 0's, model.rank1.engine the next."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


class RankRunner(EngineRunner):
    """A rank's runner: its pools have as many blocks as the others'."""

    def __init__(self, engine: Engine, group: SharedGroup, threads: int | None, blocks: int | None,
                 device: str | None, alike: bool = False) -> None:  # fmt: skip
        self.group = group
        _check_alike(engine, group)
        if device is not None and device.partition(":")[0] == "cuda":
            device = f"cuda:{group.rank}"
        super().__init__(engine, threads or max(usable_threads() // group.ranks, 1), blocks, device, group, alike)

    def _affordable(self) -> int:
        mine = super()._affordable() // (1 if self.session.on_device else self.group.ranks)
        return max(int(self.group.all_gather(np.array([mine])).min()), 1)

    def close(self) -> None:
        """Stop the session's threads, leave the group; idempotent."""
        super().close()
        self.group.close()


class LeadingRunner(RankRunner):
    """Rank 0's: what it is asked, all do. `ended` is called once when it has left."""

    ended: Callable[[], None] | None = None
    processes: Sequence[subprocess.Popen[bytes]] = ()

    def begin(self, batch: Batch, *wanted: Wanted) -> Stepping:
        """Begin a step, on every rank."""
        self._check(batch)
        self.group.tell(_written({"do": "step", "wanted": wanted}, astuple(batch)))
        with self._together():
            begun = super().begin(batch, *wanted)
        return Stepping(partial(self._finished, begun))

    def _finished(self, begun: Stepping) -> Mapping[str, Any]:
        with self._together():
            return begun.result()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Where it fails here the group ends: the others wait for a sum that does not come."""
        try:
            yield
        except Exception:
            self.group.close()
            raise

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """Copy the keys and values of block a into block b of a kind, for every (kind, a, b), on every rank."""
        if copies:
            self.group.tell(_written({"do": "copy"}, [np.array(copies, np.int32)]))
            super().copy_blocks(copies)

    def close(self) -> None:
        """End all ranks; idempotent."""
        if not self.group.lost:
            with suppress(GroupLost):
                self.group.tell(_written({"do": "end"}, []))
        super().close()
        ended, self.ended = self.ended, None
        if ended is not None:
            ended()


def follow(runner: RankRunner) -> None:
    """What another rank than 0 does with its life. Raises what a step of its own failed with, or GroupLost."""
    waiting = _Waiting(runner) if runner.ahead else None
    try:
        for asked, arrays in _told(runner.group):
            if asked["do"] == "copy":
                runner.copy_blocks([(kind, a, b) for kind, a, b in arrays[0].tolist()])
                continue
            begun = runner.begin(Batch(*arrays), *asked["wanted"])
            if waiting is None:
                begun.result()
            else:
                waiting.steps.put(begun)
    finally:
        if waiting is not None:
            waiting.close()


def _told(group: SharedGroup) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """What rank 0 tells, until the end."""
    while (told := _read(group.hear()))[0]["do"] != "end":
        yield told


class _Waiting:
    """Waits for steps in a thread, while this one begins those behind them. Where one fails the group ends."""

    def __init__(self, runner: RankRunner) -> None:
        self.runner, self.error = runner, None
        self.steps = queue.SimpleQueue[Stepping | None]()
        self._thread = threading.Thread(target=self._run, name="ingot-llm-rank", daemon=True)
        self._thread.start()

    error: Exception | None

    def _run(self) -> None:
        while (step := self.steps.get()) is not None:
            try:
                self.runner.session.context.activate()
                step.result()
            except Exception as error:  # noqa: BLE001 - raised by `close`
                self.error = error
                self.runner.group.end()
                return

    def close(self) -> None:
        """When those that were begun have ended; raises what one of them failed with."""
        self.steps.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error


def _written(asked: dict[str, Any], arrays: Sequence[Any]) -> bytes:
    head = json.dumps({**asked, "shapes": [array.shape for array in arrays]}).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *(array.tobytes() for array in arrays)])


def _read(data: bytes) -> tuple[dict[str, Any], list[Any]]:
    place = 4 + int.from_bytes(data[:4], "little")
    asked, arrays = json.loads(data[4:place]), []
    for shape in asked["shapes"]:
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(data, np.int32, count, place).reshape(shape))
        place += 4 * count
    return asked, arrays


def _check_alike(engine: Engine, group: Group) -> None:
    """All ranks must be of one build: EngineError on each of them."""
    facts = engine.details["llm"]
    mine = np.frombuffer(bytes.fromhex(facts["identity"]), np.uint8)
    same = (group.all_gather(mine) == mine).all()
    if not same or facts["ranks"] != group.ranks or facts["rank"] != group.rank:
        raise EngineError(f"{engine.source} is rank {facts['rank']} of {facts['ranks']} and was asked to be rank "
                          f"{group.rank} of {group.ranks}, or it is of another build than the others; build all ranks "
                          "together")  # fmt: skip


def local_ranks(
    engines: Sequence[Engine], blocks: int | None = None, patience: float = 60.0, alike: bool = False
) -> LeadingRunner:
    """All ranks in this process, a thread for each of the others."""
    groups = shared_groups(len(engines), patience)

    def live(engine: Engine, group: SharedGroup) -> None:
        try:
            runner = RankRunner(engine, group, 1, blocks, None, alike)
            try:
                follow(runner)
            finally:
                runner.close()
        except GroupLost:
            pass  # the leader has the same, and raises it
        except Exception:
            log.exception("rank %d has failed", group.rank)
        finally:
            group.close()

    pairs = list(zip(engines, groups, strict=True))
    threads = [threading.Thread(target=live, args=pair, daemon=True) for pair in pairs[1:]]
    for thread in threads:
        thread.start()
    try:
        leader = LeadingRunner(engines[0], groups[0], 1, blocks, None, alike)
    except BaseException:
        groups[0].close()
        _join(threads)
        raise
    leader.ended = partial(_join, threads)
    return leader


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(_WAIT)


def open_ranks(path: Path, engine: Engine, threads: int | None, blocks: int | None, device: str | None,
               alike: bool = False) -> LeadingRunner:  # fmt: skip
    """Rank 0 here, the others in processes of their own. EngineError where one's file is missing."""
    ranks = int(engine.details["llm"]["ranks"])
    missing = [str(rank_path(path, rank)) for rank in range(ranks) if not rank_path(path, rank).is_file()]
    if missing:
        raise EngineError(f"{path} is one of {ranks} ranks; {', '.join(missing)} must lie beside it")
    groups = shared_groups(ranks)
    processes = [_started(path, group, threads, blocks, device, alike) for group in groups[1:]]
    for group in groups[1:]:
        group.close()  # theirs are the others' now: ends that nobody else holds tell when they have ended
    try:
        leader = LeadingRunner(engine, groups[0], threads, blocks, device, alike)
    except BaseException:
        groups[0].close()
        _end(processes)
        raise
    leader.processes, leader.ended = processes, partial(_end, processes)
    return leader


def _started(path: Path, group: SharedGroup, threads: int | None, blocks: int | None, device: str | None,
             alike: bool) -> subprocess.Popen[bytes]:  # fmt: skip
    sockets = {rank: each.fileno() for rank, each in group.sockets.items()}
    told = {
        "engine": str(rank_path(path, group.rank)), "rank": group.rank, "ranks": group.ranks, "memory": group.memory,
        "sockets": sockets, "threads": threads, "blocks": blocks, "device": device, "alike": alike,
    }  # fmt: skip
    command = [sys.executable, "-m", "ingot.llm.parallel", json.dumps(told)]
    return subprocess.Popen(command, pass_fds=(group.memory, *sockets.values()), stdin=subprocess.DEVNULL)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        try:
            process.wait(_WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(text: str) -> int:
    """A rank's process: 0 when it was told to end or the leader has gone."""
    told = json.loads(text)
    sockets = {int(rank): socket.socket(fileno=number) for rank, number in told["sockets"].items()}
    group = SharedGroup(told["rank"], told["ranks"], told["memory"], sockets)
    try:
        runner = RankRunner(Engine.load(told["engine"]), group, told["threads"], told["blocks"], told["device"],
                            told["alike"])  # fmt: skip
        follow(runner)
        runner.close()
    except GroupLost as lost:
        print(f"rank {told['rank']}: {lost}", file=sys.stderr)
    finally:
        group.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
