"""Work from other threads arrives, all of it, in order."""

import asyncio
import threading
from functools import partial

from ingot.server.app import new_loop
from ingot.server.mailbox import Mailbox


def test_what_many_threads_post_is_run() -> None:
    loop, mailbox = new_loop(), Mailbox()
    seen = [list[int]() for _ in range(4)]
    done = threading.Semaphore(0)

    def post(number: int) -> None:
        for place in range(5000):
            mailbox.post(partial(seen[number].append, place))
        mailbox.post(done.release)

    running = threading.Thread(target=loop.run_forever)
    posting = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    posting[0].start()  # also before it is open
    loop.call_soon(mailbox.open, loop)
    running.start()
    for thread in posting[1:]:
        thread.start()
    assert all(done.acquire(timeout=60) for _ in posting)
    loop.call_soon_threadsafe(loop.stop)
    for thread in (running, *posting):
        thread.join()
    loop.close()
    assert seen == [list(range(5000))] * 4


def test_what_an_action_posts_runs_in_a_later_turn() -> None:
    loop, mailbox = asyncio.new_event_loop(), Mailbox()
    seen: list[str] = []

    def last() -> None:
        seen.append("posted")
        loop.stop()

    def first() -> None:
        seen.append("first")
        mailbox.post(last)

    mailbox.post(first)
    mailbox.post(lambda: seen.append("second"))
    loop.call_soon(mailbox.open, loop)
    loop.run_forever()
    loop.close()
    assert seen == ["first", "second", "posted"]
