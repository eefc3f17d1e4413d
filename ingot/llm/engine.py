"""The loop: many requests share a runner's steps. A step is: schedule, begin, record the one before. What fails, fails
alone."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from ingot.errors import EngineError, IngotError
from ingot.llm.answers import Answer, Pooled, Sink, Speaker, Spoken, Ticket, Voice
from ingot.llm.asked import asked, leads
from ingot.llm.batch import Runner
from ingot.llm.counters import Counters
from ingot.llm.flight import Flight, Landed, Spoiled, begin, joined, one_by_one
from ingot.llm.guided import Grammars, Matcher
from ingot.llm.options import EngineOptions
from ingot.llm.request import Finish, Guide, Overloaded, Refused, Request, check
from ingot.llm.sampling import Drawing, logprobs_after
from ingot.llm.scheduler import Limits, Place, Scheduler, Share, Step, Tokens
from ingot.llm.speculation import Gain, drafter_of
from ingot.llm.tables import Cache
from ingot.llm.text import Growing, Stops, Text
from ingot.llm.turns import Turn, draw_all
from ingot.runtime.group import GroupLost

log = logging.getLogger("ingot.llm")


class Engine:
    """Answers requests. `submit`, `cancel` from any thread; `start` runs the loop in one of its own, `step` here."""

    def __init__(
        self, runner: Runner, text: Text | None = None, options: EngineOptions | None = None,
        draft: Runner | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.runner, self.text, self.options, self.clock = runner, text, options or EngineOptions(), clock
        limits = Limits(runner.token_budget, runner.sequence_budget, self.options.interval)
        first, *others = runner.kinds
        if draft is not None:
            first = replace(first, window=0)  # a draft model may begin anew, with blocks of the same numbers
        self.scheduler = Scheduler(limits, Cache([first, *others], runner.block_size))
        self.counters, self.fault = Counters(), ""
        self._runners = [runner] if draft is None else [runner, draft]
        self.longest = min(runner.context, first.blocks * runner.block_size)
        self._unsaid: list[tuple[Turn, Answer, float]] = []
        self._flight: Flight | None = None  # the step under way, where the next one may begin before its end
        self._landed = 0.0  # when a step ended last
        self._speaker = Speaker()
        self._grammars = Grammars(text.source, runner.vocabulary, runner.eos) if text is not None else None
        self._drafter = drafter_of(self.options.drafts, draft, runner, self.longest, self.scheduler.cache.pools[0])
        self._gain = Gain(self.options.drafts)
        self._answers: dict[Tokens, Answer] = {}
        self._tickets: set[Ticket] = set()
        self._numbers = itertools.count()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake, self._began = threading.Event(), 0.0
        self._masks = ThreadPoolExecutor(2, thread_name_prefix="ingot-llm-mask")
        self._threads: list[threading.Thread] = []
        self._closing = self._ended = False
        self._lock = threading.Lock()

    # -- from any thread ----------------------------------------------------------------------------------------------
    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Take a request; `sink` is told of its answers until each has an event with `finish`. Refused, Overloaded."""
        check(request, self.runner.vocabulary, self.longest)
        if request.pooling is not None and not self.runner.hidden:
            raise Refused("this engine gives no hidden states: build it with this Ingot")
        asked = request.sampling
        matchers = [self._matcher(asked.guide) for _ in range(asked.answers)]
        room = self.longest - len(request.tokens)
        ticket = Ticket(request, sink, self.clock(), room if asked.max_tokens is None else min(asked.max_tokens, room))
        ticket.left = ticket.untold = asked.answers
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        ticket.voices = [self._voice(ticket, index, seed, matcher) for index, matcher in enumerate(matchers)]
        self._admit(ticket)
        self._post(partial(self._enter, ticket))
        return ticket

    def _matcher(self, guide: Guide | None) -> Matcher | None:
        if guide is None:
            return None
        if self._grammars is None:
            raise Refused("answers cannot be guided without a tokenizer")
        return self._grammars.matcher(guide)

    def _admit(self, ticket: Ticket) -> None:
        with self._lock:
            if self._closing or self.fault:
                raise Overloaded(self.fault or "the engine is ending; ask another one")
            if len(self._tickets) >= self.options.requests:
                raise Overloaded(f"{len(self._tickets)} requests are being answered; ask again later")
            self._tickets.add(ticket)

    def _voice(self, ticket: Ticket, index: int, seed: int, matcher: Matcher | None) -> Voice:
        asked, tokens = ticket.request.sampling, ticket.request.tokens
        if asked.answers > asked.n:
            asked = replace(asked, logprobs=asked.logprobs or 0)  # the likeliest are chosen by them
        ends = asked.stop_tokens | (frozenset() if asked.ignore_eos else self.runner.eos)
        drawing = Drawing(asked, seed + index * 0x51ED2701, np.asarray(tokens, np.int64), ends)
        growing = Growing(self.text, tokens) if self.text is not None else None
        stops = Stops(asked.stop, asked.include_stop)
        return Voice(ticket, index, drawing, matcher, growing, stops, self._stopped)

    def _stopped(self, voice: Voice) -> None:
        self._post(partial(self._stop, voice))

    def cancel(self, ticket: Ticket) -> None:
        """Its answers end as they are, with finish "cancelled"; nothing if they have ended."""
        self._post(partial(self._cancel, ticket))

    @property
    def health(self) -> str:
        """What is wrong; empty if nothing is."""
        if self._began and self.clock() - self._began > self.options.patience:
            return f"a step has been running for {self.clock() - self._began:.0f} s"
        return self.fault

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    def _post(self, action: Callable[[], None]) -> None:
        self._posted.append(action)
        self._wake.set()

    # -- threads ------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Run the loop in a thread, and watch it in another."""
        self._speaker.start()
        for name, target in (("loop", self._run), ("watchdog", self._watch)):
            self._threads.append(threading.Thread(target=target, name=f"ingot-llm-{name}", daemon=True))
            self._threads[-1].start()

    def _run(self) -> None:
        while not self._ended and not self.fault:
            self._wake.clear()
            try:
                busy = self.step()
            except Exception as error:  # a fault of ours: nothing that is cached can be trusted any more
                log.exception("the loop has ended")
                self._give_up(f"the engine has failed: {type(error).__name__}: {error}")
                return
            if not busy and not self._posted and not self._ended:
                self._wake.wait()

    def _watch(self) -> None:
        while not self._ended and not self.fault:
            time.sleep(min(self.options.patience / 4, 1.0))
            if not self.fault and (late := self.health):
                self._give_up(f"the engine hangs: {late}")

    def _give_up(self, fault: str) -> None:
        """Every request fails, and none is taken any more."""
        log.error("%s", fault)
        with self._lock:
            self.fault, failed, self._tickets = fault, self._tickets, set()
        for ticket in failed:
            for voice in ticket.voices:
                self._speaker.say(Spoken(voice, finish="error", error=fault))
        self._speaker.release()

    def close(self, patience: float = 0.0) -> None:
        """Take no more, give what runs so many seconds to end, cancel the rest; idempotent."""
        with self._lock:
            self._closing = True
        until = self.clock() + patience
        while self._tickets and not self.fault and self._threads and self.clock() < until:
            time.sleep(0.01)
        self._post(self._end)
        for thread in self._threads[:1]:
            thread.join(self.options.patience)
        if not self._threads:
            self._obey()
            self._land(None)
        self._speaker.close()
        self._masks.shutdown(wait=False)
        for runner in self._runners:
            runner.close()

    def _end(self) -> None:
        for ticket in list(self._tickets):
            self._cancel(ticket)
        self._ended = True

    # -- the loop -----------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Schedule, begin, record the step before; False if nothing is to be done. A step that the next one depends on
        is recorded at once."""
        self._obey()
        self._propose()
        step, before = self.scheduler.schedule(self._ready()), self._flight
        flight = self._begin(step) if step.shares else None
        if flight is None and before is None and not self.scheduler.idle and not step.preempted:
            raise IngotError("requests wait that no empty cache can hold")
        self._say()
        self._land(flight)
        if flight is not None and before is not None and self._refused(flight):
            self._flight = flight = self._begin(step)  # now that nothing else is under way there may be room
        if flight is not None and not self._leads(flight):
            self._land(None)
        if self._flight is not None or not self.scheduler.idle:
            return True
        self._say()
        if step.shares or before is not None:
            self.scheduler.check_integrity()
        return False

    def _obey(self) -> None:
        while self._posted:
            self._posted.popleft()()

    def _enter(self, ticket: Ticket) -> None:
        request = ticket.request
        whole = request.sampling.prompt_logprobs is not None or request.pooling == "mean"
        sequence = Tokens(
            next(self._numbers), list(request.tokens), len(request.tokens), request.priority, request.client,
            request.salt, whole, request.pooling is not None,
        )  # fmt: skip
        ticket.later = ticket.voices[1:]
        for voice in ticket.voices:
            if voice.matcher is not None:
                voice.matcher.prepare(self._masks)
        pooled = Pooled() if sequence.silent else None
        self._answers[sequence] = Answer(ticket.voices[0], sequence, pooled=pooled)
        if not sequence.silent:
            sequence.most = sequence.prompt + max(ticket.limit, 1)
        self.scheduler.add(sequence, self.clock())
        if not (ticket.limit or sequence.silent or sequence.whole):
            self._finish(self._answers[sequence], "length")

    def _propose(self) -> None:
        """Drafts for the answers that have begun, as many as pay."""
        if self._drafter is None:
            return
        answers = [self._answers[sequence] for sequence in self.scheduler.running if sequence.decoding]
        count = self._gain.length(len(answers), self.scheduler.pace) if answers else 0
        wanted = [(each.sequence, self.scheduler.reserve(each.sequence, min(count, each.left - 1))) for each in answers]
        began = self.clock()
        self._drafter.propose(wanted)
        if count:
            self._gain.proposing.observe(sum(most for _, most in wanted) or 1, self.clock() - began)
        for answer in answers:
            if answer.voice.matcher is not None:
                answer.sequence.draft = answer.voice.matcher.allowed(answer.sequence.draft)

    # -- a step's way -------------------------------------------------------------------------------------------------
    def _ready(self) -> float:
        """When a step that is scheduled now begins."""
        now, flight = self.clock(), self._flight
        if flight is None:
            return now
        return max(now, max(flight.since, self._landed) + (self.scheduler.pace.seconds(flight.step.tokens) or 0.0))

    def _begin(self, step: Step) -> Flight:
        now = self.clock()
        self._began = self._began or now
        for share in step.shares:
            self._entered(share, now)
        return begin(self.runner, step, asked(step.shares, self._answers, self.runner.draws), now)

    def _refused(self, flight: Flight) -> bool:
        """Whether it could not be begun, though all that it computes is still wanted."""
        running = all(share.sequence.place is Place.RUNNING for share in flight.step.shares)
        return running and isinstance(flight.begun, Exception)

    def _leads(self, flight: Flight) -> bool:
        """Whether the next step may begin before this one has ended: what it draws is not asked for here, and no
        sequence becomes several. Drafts are guessed from what was drawn."""
        if not self.runner.ahead or self._drafter is not None or flight.asked is None or flight.spoiled:
            return False
        if isinstance(flight.begun, Exception):
            return False
        return all(leads(share, self._answers.get(share.sequence)) for share in flight.step.shares)

    def _land(self, following: Flight | None) -> None:
        """Wait for the step under way, and record it; `following` was begun behind it, and is under way now."""
        flight, self._flight = self._flight, following
        if flight is None:
            return
        try:
            landed = Landed.of(flight.step.shares, flight.result(), flight.told)
        except (GroupLost, EngineError):
            raise  # a rank is gone, weights are damaged: no step can be computed any more
        except Exception as error:  # noqa: BLE001 - logged, and becomes the end of requests that fail alone too
            if following is not None:
                following.spoiled = True
            landed = self._apart(flight, error)
        now = self.clock()
        elapsed, self._landed = now - max(flight.since, self._landed), now
        self._began = now if following is not None else 0.0
        self.scheduler.pace.observe(flight.step.tokens, elapsed)
        self.counters.step.observe(elapsed)
        self.counters.steps += 1
        self._record(landed)

    def _apart(self, flight: Flight, error: Exception) -> Landed:
        """Each share alone: one that fails alone too is at fault, its request ends."""
        if not isinstance(error, Spoiled):
            log.error("a step of %d sequences failed; they are computed one by one", len(flight.step.shares),
                      exc_info=error)  # fmt: skip
            self.counters.faults += 1
        for share in flight.step.shares:
            self.scheduler.lose(share)
        shares = [share for share in flight.step.shares if share.sequence.place is Place.RUNNING]
        found = list[tuple[Share, Landed]]()
        for share, each in one_by_one(self.runner, flight, shares):
            if isinstance(each, Exception):
                self._fail(self._answers[share.sequence], f"the model failed on this request: {each}")
            else:
                found.append((share, each))
        return joined(self.runner.vocabulary, found)

    def _entered(self, share: Share, now: float) -> None:
        ticket = self._answers[share.sequence].ticket
        if ticket.entered is None:
            ticket.entered, ticket.cached = now, share.sequence.cached
            self.counters.queued.observe(now - ticket.arrived)
            self.counters.prompt_tokens += share.sequence.prompt

    # -- what was computed --------------------------------------------------------------------------------------------
    def _record(self, landed: Landed) -> None:
        """Draw, go on. What was computed of answers that have ended meanwhile is for nobody."""
        turns = list[Turn]()
        for share in landed.shares:
            answer = self._answers.get(share.sequence)
            if answer is None:
                continue
            if not share.draws:
                self.scheduler.advance(share, [], self.clock())
            if answer.pooled is not None:
                self._embed(answer, answer.pooled, share, landed)
                continue
            self._note_prompt(answer, share, landed)
            if share.draws and not answer.ticket.limit:  # all of its prompt is told
                self.scheduler.advance(share, [], self.clock())
                self._finish(answer, "length")
            elif share.draws:
                first = share.row + share.rows - 1 - share.drafts
                turns += [Turn(share, voice, first) for voice in (answer.voice, *answer.ticket.later)]
        draw_all(turns, landed)
        self._go_on(turns)

    def _embed(self, answer: Answer, pooled: Pooled, share: Share, landed: Landed) -> None:
        """Take the share's hidden states; tell a text's vector, once all of it is computed."""
        if share.rows:
            pooled.take(share.start, landed.own(share))
        if answer.sequence.computed < answer.sequence.prompt:
            return
        try:
            vector = pooled.vector()
        except Refused as error:
            self._fail(answer, str(error))
            return
        self._close(answer, "stop")
        self._speaker.say(Spoken(answer.voice, finish="stop", vector=vector))

    def _note_prompt(self, answer: Answer, share: Share, landed: Landed) -> None:
        """Log-probabilities of the prompt's own tokens."""
        top = answer.ticket.request.sampling.prompt_logprobs
        if top is None or not share.sequence.whole:
            return
        end = max(min(share.start + share.rows, share.sequence.prompt - 1), share.start)
        tokens = share.sequence.tokens[share.start + 1 : end + 1]
        found = logprobs_after(landed.own(share)[: len(tokens)], tokens, top)
        answer.ticket.prompt_logprobs.update(zip(range(share.start + 1, end + 1), found, strict=True))

    def _go_on(self, turns: Sequence[Turn]) -> None:
        """Sequences get their tokens; those that begin with the first one's logits become sequences of their own."""
        now, leader = self.clock(), dict[Share, Tokens]()
        for turn in turns:
            tokens = turn.tokens
            if turn.share not in leader:
                leader[turn.share] = sequence = turn.share.sequence
                self.scheduler.advance(turn.share, tokens, now)
                self._count_drafts(turn.share.drafts, len(tokens) - 1)
            elif tokens:
                sequence = self.scheduler.fork(leader[turn.share], next(self._numbers), tokens[-1])
                turn.voice.ticket.later.remove(turn.voice)
                self._answers[sequence] = Answer(turn.voice, sequence)
            else:
                continue  # its logits are the first one's: it fails with it
            turn.answer = self._answers[sequence]
        for turn in turns:
            if turn.answer is not None:
                self._settle(turn, turn.answer, now)

    def _count_drafts(self, proposed: int, accepted: int) -> None:
        if proposed and accepted >= 0:
            self._gain.observe(proposed, accepted)
            self.counters.proposed += proposed
            self.counters.accepted += accepted

    def _settle(self, turn: Turn, answer: Answer, now: float) -> None:
        """What the next step depends on; the client is told while it is computed."""
        if turn.fault:
            self._time(answer, len(turn.tokens), now)
            self._fail(answer, turn.fault)
            return
        if turn.end is not None:
            self._close(answer, turn.end[0])
        elif answer.voice.matcher is not None:
            answer.voice.matcher.prepare(self._masks)
        self._unsaid.append((turn, answer, now))

    def _say(self) -> None:
        """Tell what was drawn, in its order."""
        unsaid, self._unsaid = self._unsaid, []
        for turn, answer, now in unsaid:
            tokens = tuple(turn.tokens)
            self._time(answer, len(tokens), now)
            finish, stop = turn.end or (None, None)
            logprobs = tuple(each.logprob for each in turn.drawn if each.logprob is not None)
            self._speaker.say(Spoken(answer.voice, tokens, logprobs, finish, stop))
        self._speaker.release()

    def _time(self, answer: Answer, tokens: int, now: float) -> None:
        ticket = answer.ticket
        self.counters.answer_tokens += tokens
        if ticket.first is None:
            ticket.first = now
            self.counters.first_token.observe(now - ticket.arrived)
        elif answer.last and tokens:
            for _ in range(tokens):
                self.counters.between_tokens.observe((now - answer.last) / tokens)
        answer.last = now

    # -- ends ---------------------------------------------------------------------------------------------------------
    def _close(self, answer: Answer, finish: str) -> None:
        """The sequence is no more."""
        self.scheduler.end(answer.sequence)
        if self._drafter is not None:
            self._drafter.forget(answer.sequence)
        del self._answers[answer.sequence]
        self._count_end(answer.ticket, finish)

    def _count_end(self, ticket: Ticket, finish: str) -> None:
        ticket.left -= 1
        self.counters.finished[finish] += 1
        if ticket.left == 0:
            self.counters.whole.observe(self.clock() - ticket.arrived)
            with self._lock:
                self._tickets.discard(ticket)

    def _fail(self, answer: Answer, error: str) -> None:
        log.warning("request failed: %s", error)
        self._finish(answer, "error", error)

    def _finish(self, answer: Answer, finish: Finish, error: str = "") -> None:
        """End an answer before its end, and with the first one those that have not begun."""
        self._say()
        self._close(answer, finish)
        self._speaker.say(Spoken(answer.voice, finish=finish, error=error))
        later, answer.ticket.later = answer.ticket.later, []
        for voice in later:
            self._count_end(answer.ticket, finish)
            self._speaker.say(Spoken(voice, finish=finish, error=error))

    def _cancel(self, ticket: Ticket) -> None:
        for answer in self._of(ticket):
            self._finish(answer, "cancelled")

    def _stop(self, voice: Voice) -> None:
        """The speaker has found a stop string: what is drawn after it is told to nobody."""
        for answer in self._of(voice.ticket):
            if answer.voice is voice:
                self._close(answer, "stop")

    def _of(self, ticket: Ticket) -> list[Answer]:
        return [answer for answer in self._answers.values() if answer.ticket is ticket]
