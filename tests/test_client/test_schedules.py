"""The core under seeded random schedules: lost frames, lost answers, TRY_AGAIN, cuts, slow consumers, other writers."""

from __future__ import annotations

import random

import pytest

from fleetlm_client.channel import Channel
from fleetlm_client.events import Gap, Message
from fleetlm_client.settings import Settings
from tests.support.phoenix_model import Fault
from tests.test_client.harness import Harness

FAULTS: list[Fault] = ["none", "none", "none", "none", "try_again", "try_again_done", "answer_lost", "silence"]


class Schedule:
    """One run: random steps, then peace, then the judgement."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        settings = Settings(
            buffer_messages_max=self.random.choice([4, 40, 400]),
            page_messages=2,
            outbox_messages_max=100_000,
        )
        self.harness = Harness(settings=settings, seed=seed, fault=self.fault)
        self.storm = True
        self.channel: Channel = self.harness.channel(cursor=0)
        self.calls: list[list[str]] = []
        self.seen: list[int] = []

    def fault(self, event: str) -> Fault:
        if not self.storm:
            return "none"
        fault = self.random.choice(FAULTS)
        return "none" if event == "phx_leave" else fault

    def step(self) -> None:
        harness = self.harness
        match self.random.randrange(12):
            case 0 | 1 | 2:
                names = [f"{len(self.calls)}.{at}" for at in range(self.random.choice([1, 1, 1, 3]))]
                self.calls.append(names)
                harness.append(self.channel, *names)
            case 3:
                harness.model.add("s", [f"other-{self.random.random()}" for _ in range(self.random.randrange(1, 12))])
            case 4:
                harness.to_server(self.random.randrange(1, 3))
            case 5 | 6:
                harness.to_server()
            case 7 | 8:
                harness.to_client(self.random.randrange(1, 6))
            case 9:
                self.take(self.random.randrange(0, 20))
            case 10:
                harness.advance(self.random.choice([0.001, 0.1, 1.0, 20.0]))
                if harness.link.wants_close:
                    harness.cut()
            case _:
                if self.random.random() < 0.2:
                    harness.cut()
        harness.connect()

    def take(self, count: int) -> None:
        for _ in range(count):
            event = self.channel.reader.take()
            if event is None:
                return
            assert not isinstance(event, Gap), "nothing was trimmed"
            if isinstance(event, Message):
                self.seen.append(event.seq)
            if self.channel.reader.behind:
                self.harness.link.pump(self.channel, self.harness.now_s)

    def judge(self) -> None:
        harness = self.harness
        self.storm = False
        log = harness.model.log("s")
        quiet = 0
        while quiet < 3:
            before = len(self.seen)
            harness.run(20)
            self.take(1_000_000)
            quiet = quiet + 1 if len(self.seen) == before else 0
        assert self.seen == list(range(1, log.last_seq + 1))
        mine = [m["content"] for m in log.messages if not str(m["content"]).startswith("other")]
        assert mine == [name for call in self.calls for name in call], "order of the calls, each exactly once"
        assert harness.answers == len(self.calls)
        for result in harness.results.values():
            assert isinstance(result, list), result
            seqs = [ack.seq for ack in result]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        assert self.channel.outbox.messages == 0
        assert self.channel.outbox.size_bytes == 0


@pytest.mark.parametrize("seed", range(60))
def test_any_schedule_ends_with_everything_once_and_in_order(seed: int) -> None:
    """Whatever happened on the way: each append acknowledged once, in call order; the reader saw 1 … n."""
    schedule = Schedule(seed)
    for _ in range(600):
        schedule.step()
    schedule.judge()


def test_a_seed_runs_the_same_twice() -> None:
    """The core takes time and chance from outside only."""

    def run() -> list[str]:
        schedule = Schedule(7)
        for _ in range(300):
            schedule.step()
        schedule.judge()
        return [message["content"] for message in schedule.harness.model.log("s").messages]

    assert run() == run()
