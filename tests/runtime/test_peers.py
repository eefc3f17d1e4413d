"""Sums of ranks by each other's memory: values of the kernel's PTX, all ranks by turns; what is left to NCCL."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.errors import DeviceError
from ingot.runtime import cuda, nccl, peers
from ingot.runtime.group import GroupLost, shared_groups
from tests.kernels.cuda.ptx import Block, Module

BF = numpy_dtype("bfloat16")


@pytest.mark.parametrize(("ranks", "count"), [(2, 1280), (3, 256)])
def test_all_ranks_have_the_sum(ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sums, so that both halves of an inbox come again; elements beyond the row stay as they are."""
    monkeypatch.setattr(peers, "MOST", 2048)
    rng = np.random.default_rng(ranks)
    inboxes = [np.zeros(2 * ranks * 1024 * 8, np.uint8) for _ in range(ranks)]
    counts = [np.zeros(8, np.uint8) for _ in range(ranks)]
    blocks = -(-count // 1024)
    for number in range(3):
        rows = [(rng.standard_normal(count) * 9).astype(BF) for _ in range(ranks)]
        sums = [np.full(count + 8, -1, BF) for _ in range(ranks)]
        running = list[Block]()
        for rank in range(ranks):
            # a rank's own arguments, then the others' inboxes: their places are what `boxes` says
            boxes = np.array([(8 + other) << 40 for other in range(ranks)], np.uint64)
            size = np.array([count // 8], np.uint32)
            given = [rows[rank], sums[rank], inboxes[rank], boxes, counts[rank], np.zeros(1, np.uint32), size, *inboxes]
            module = Module(peers.ptx(ranks, rank))
            running += [Block(module, k, [a.view(np.uint8) for a in given], 64, {}) for k in range(blocks)]
        chance = random.Random(number)
        while running:
            block = chance.choice(running)
            block.go_on(chance)
            running = [one for one in running if not one.ended]
        wanted = sum(row.astype(np.float32) for row in rows[1:])
        wanted = (rows[0].astype(np.float32) + wanted).astype(BF) if ranks == 2 else None
        for mine in sums:
            assert (mine[count:] == -1).all() and (mine == sums[0]).all()
            assert wanted is None or (mine[:count] == wanted).all()
            np.testing.assert_allclose(mine[:count].astype(np.float64), sum(r.astype(np.float64) for r in rows),
                                       rtol=8e-3, atol=0.05)  # fmt: skip
        assert all((c.view(np.uint32)[:blocks] == number + 1).all() for c in counts)


def test_long_rows_and_other_types_are_left_to_nccl() -> None:
    takes = peers.Peers.takes
    some: Any = None
    assert takes(some, "all_reduce", 8192, "bfloat16") and takes(some, "all_reduce", peers.MOST, "bfloat16")
    assert not takes(some, "all_gather", 8192, "bfloat16") and not takes(some, "all_reduce", 8192, "float32")
    assert not takes(some, "all_reduce", peers.MOST + 8, "bfloat16") and not takes(some, "all_reduce", 8196, "bfloat16")


def test_short_sums_are_peers_and_what_waits_for_one_that_ended_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    done, ended = list[Any](), threading.Event()

    class Shared:
        takes = peers.Peers.takes

        def put(self, *what: Any) -> None:
            done.append(("put", *what))

        def stop(self) -> None:
            done.append("stop")

        def close(self) -> None:
            done.append("close")

    def noted(*what: Any) -> None:
        done.append(what)

    monkeypatch.setattr(peers, "connect", lambda context, group: Shared())
    library = SimpleNamespace(comm_init_rank_scalable=lambda *rest: 7, all_reduce=noted, all_gather=noted,
                              comm_abort=noted, comm_destroy=noted, NCCLError=ValueError)  # fmt: skip
    group: Any = SimpleNamespace(rank=0, ranks=2, ended=lambda patience: ended.wait(5) and "rank 1 has ended")
    context: Any = SimpleNamespace(activate=lambda: None)
    ranks = nccl.Communicator(context, group, library, np.zeros(128, np.uint8))
    ranks.put("all_reduce", (1, 2), 4096, "bfloat16", 3)
    ranks.put("all_reduce", (1, 2), 4096, "float32", 3)
    ranks.put("all_gather", (1, 2), 4096, "bfloat16", 3)
    assert done == [("put", 1, 2, 4096, 3), (1, 2, 4096, 7, 0, 7, 3), (1, 2, 4096, 9, 7, 3)]
    ended.set()
    ranks._watcher.join(5)
    assert done[3:] == ["stop", (7,)]
    with pytest.raises(GroupLost, match="rank 1 has ended"):
        ranks.put("all_reduce", (1, 2), 4096, "bfloat16", 3)
    ranks.close()
    assert done[5:] == ["close"]


@pytest.mark.parametrize(("capability", "broken"), [(80, ""), (90, "open"), (90, "made")])
def test_without_each_others_memory_there_are_none(capability: int, broken: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """On no rank, whichever cannot."""

    class Unshared:
        def __init__(self, context: cuda.Context, group: Any) -> None:
            if broken == "made" and group.rank == 1:
                raise DeviceError("operation not supported")
            self.handle = np.full(64, group.rank, np.uint8)

        def open(self, handles: Any, rank: int) -> None:
            assert [h[0] for h in handles] == [0, 1]
            if broken == "open" and rank == 0:
                raise DeviceError("peer access is not supported")

    monkeypatch.setattr(peers, "Peers", Unshared)
    context: Any = SimpleNamespace(device=SimpleNamespace(capability=capability))
    groups = shared_groups(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda group: peers.connect(context, group), groups)) == [None, None]
    for group in groups:
        group.close()
