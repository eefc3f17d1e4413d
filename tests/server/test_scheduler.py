"""The scheduler around the batcher: queue limits, failures, order, cancellation, closing; on threads and on a loop."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from ingot.server.app import new_loop
from ingot.server.batcher import QueuePolicy, Rules
from ingot.server.mailbox import Mailbox
from ingot.server.request import Code, ServerError
from ingot.server.scheduler import Closed
from tests.server.fakes import Answers, HeldInstance, opened, request, scheduler, value_of


def test_one_executes_ten_wait_twelve_arrive_two_are_rejected() -> None:
    instance, answers, rejected = HeldInstance(), Answers(), []
    running = scheduler(instance, rules=Rules(max_rows=1, policy=QueuePolicy(max_size=10)))
    running.submit(request(0), answers)
    assert instance.begun.acquire(timeout=60)
    for number in range(12):
        try:
            running.submit(request(number), answers)
        except ServerError as error:
            rejected.append((str(error), error.code, error.reason))
    assert rejected == [("Exceeds maximum queue size", Code.UNAVAILABLE, "REJECTED")] * 2
    instance.gate.set()
    assert [value_of(outcome) for outcome in answers.wait(11)] == [0, *[number * 2.0 for number in range(10)]]
    running.close()


def test_what_waits_runs_together() -> None:
    instance, answers = HeldInstance(), Answers()
    running = scheduler(instance)
    running.submit(request(1), answers)
    assert instance.begun.acquire(timeout=60)
    for number in range(5):
        running.submit(request(number, rows=2), answers)
    instance.gate.set()
    answers.wait(6)
    assert instance.rows == [1, 8, 2]
    running.close()


def test_a_failing_batch_answers_its_own_requests_and_no_others() -> None:
    instance, answers = opened(), Answers()
    running = scheduler(instance)
    running.submit(request(-1), answers)
    (error,) = answers.wait(1)
    assert isinstance(error, ServerError) and error.code is Code.INTERNAL and "negative" in str(error)
    running.submit(request(4), answers)
    assert value_of(answers.wait(2)[1]) == 8
    running.close()


def test_closing_answers_what_waits() -> None:
    instance, answers = HeldInstance(), Answers()
    running = scheduler(instance, rules=Rules(max_rows=2, max_delay=10**15))
    for number in range(7):
        running.submit(request(number), answers)
    closing = threading.Thread(target=running.close)
    closing.start()
    instance.gate.set()
    closing.join(60)
    assert sorted(value_of(outcome) for outcome in answers.wait(7)) == [number * 2.0 for number in range(7)]
    assert instance.closed
    with pytest.raises(Closed):
        running.submit(request(1), answers)


def test_a_cancelled_request_is_answered_once_and_not_run() -> None:
    instance, answers = HeldInstance(), Answers()
    running = scheduler(instance, rules=Rules(max_rows=1))
    held = running.submit(request(1), answers)
    assert instance.begun.acquire(timeout=60)
    cancel = running.submit(request(2), answers)
    assert cancel() and not cancel() and not held()
    (cancelled,) = answers.wait(1)
    assert isinstance(cancelled, ServerError) and cancelled.code is Code.CANCELLED
    instance.gate.set()
    assert value_of(answers.wait(2)[1]) == 2
    running.close()
    assert instance.rows == [1]


def test_order_is_preserved_across_instances_where_asked() -> None:
    slow, fast, answers = HeldInstance(), HeldInstance(), Answers()
    running = scheduler(slow, fast, rules=Rules(max_rows=1), ordered=True)
    running.submit(request(1), answers)
    running.submit(request(2), answers)
    assert slow.begun.acquire(timeout=60) and fast.begun.acquire(timeout=20)
    fast.gate.set()
    slow.gate.set()
    assert [value_of(outcome) for outcome in answers.wait(2)] == [2, 4]
    running.close()


def test_a_timeout_in_the_queue() -> None:
    instance, answers = HeldInstance(), Answers()
    running = scheduler(instance, rules=Rules(max_rows=1, policy=QueuePolicy(allow_override=True)))
    running.submit(request(1), answers)
    assert instance.begun.acquire(timeout=60)
    running.submit(request(2, timeout_us=1), answers)
    instance.gate.set()
    (late,) = (outcome for outcome in answers.wait(2) if isinstance(outcome, ServerError))
    assert str(late) == "Request timeout expired" and late.code is Code.UNAVAILABLE
    running.close()


@pytest.fixture
def loop() -> Iterator[tuple[asyncio.AbstractEventLoop, Mailbox]]:
    running, mailbox = new_loop(), Mailbox()
    thread = threading.Thread(target=running.run_forever)
    running.call_soon(mailbox.open, running)
    thread.start()
    yield running, mailbox
    running.call_soon_threadsafe(running.stop)
    thread.join()
    running.close()


def test_on_a_loop_what_arrives_together_runs_together(loop: tuple[asyncio.AbstractEventLoop, Mailbox]) -> None:
    running_loop, mailbox = loop
    instance, answers = opened(), Answers()
    running = scheduler(instance, loop=mailbox)
    running_loop.call_soon_threadsafe(lambda: [running.submit(request(number), answers) for number in range(6)])
    assert sorted(value_of(outcome) for outcome in answers.wait(6)) == [0, 2, 4, 6, 8, 10]
    assert instance.rows == [6]
    running.close()
    assert instance.closed


def test_on_a_loop_a_delay_is_kept_and_closing_ends_it(loop: tuple[asyncio.AbstractEventLoop, Mailbox]) -> None:
    _, mailbox = loop
    instance, answers = opened(), Answers()
    running = scheduler(instance, rules=Rules(max_rows=8, max_delay=30_000_000), loop=mailbox)
    running.submit(request(1), answers)
    answers.wait(1)
    long = scheduler(opened(), rules=Rules(max_rows=8, max_delay=10**15), loop=mailbox)
    long.submit(request(2), answers)
    long.close()
    assert [value_of(outcome) for outcome in answers.wait(2)] == [2, 4]
    running.close()


@pytest.mark.parametrize("instances", [1, 3])
def test_thirty_two_threads_lose_nothing_while_it_closes(instances: int) -> None:
    answers, refused = Answers(), []
    running = scheduler(*(opened() for _ in range(instances)))
    started = threading.Barrier(33)

    def submit(first: int) -> None:
        started.wait()
        for number in range(50):
            try:
                running.submit(request(first + number), answers)
            except Closed:
                refused.append(first + number)

    threads = [threading.Thread(target=submit, args=(1000 * number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    started.wait()
    answers.wait(100)
    running.close()
    for thread in threads:
        thread.join()
    outcomes = answers.wait(32 * 50 - len(refused))
    assert sorted([value_of(outcome) / 2 for outcome in outcomes] + refused) == sorted(
        1000 * first + number for first in range(32) for number in range(50)
    )
