"""Mistakes planted into a copy of the source, and the proof that seeds find them (`make plants`).

    python -m tests.sim.plants                  every plant, from seed 1, as the table of docs/simulator.md
    python -m tests.sim.plants look --seeds 200

Place: a mutation is a piece of text in one file, which must stand there exactly once; the copy lies in a temporary
folder that comes first in the path of a process of its own, so nothing in the product knows of it. Promise: a plant
whose text is not there any more fails loudly. Must not be done here: changing the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
COMPONENTS: Final = ("common", "shard", "gateway", "operator", "client")
SEEDS_MAX: Final = 100
"""Seeds within which each plant must be found; the aim is 50, and which ones they are shifts with the code."""


@dataclass(frozen=True)
class Plant:
    """One mistake.

    Attributes:
        name: of the mistake.
        path: file, without `<component>/src/`.
        old: what stands there, once.
        new: the mistake.
        cheap: found so early that `make test` looks for it each time.
    """

    name: str
    path: str
    old: str
    new: str
    cheap: bool = False

    @property
    def file(self) -> Path:
        """In the checkout."""
        package = self.path.partition("/")[0]
        return ROOT / package.removeprefix("fleetlm_") / "src" / self.path

    def check(self) -> None:
        """The text is there once.

        Raises:
            ValueError: it is not: the code has moved on, and the plant must too.
        """
        count = self.file.read_text().count(self.old)
        if count != 1:
            raise ValueError(f"plant {self.name!r}: its text stands {count} times in {self.path}")


PLANTS: Final = (
    Plant(
        "acknowledged before the sync",
        "fleetlm_shard/writer.py",
        "            self.file.sync()\n            sync_s =",
        "            sync_s =",
        cheap=True,
    ),
    Plant(
        "the look is left out",
        "fleetlm_shard/writer.py",
        "        self.fence.look()\n        return Finished",
        "        return Finished",
    ),
    Plant(
        "keys are forgotten at boot",
        "fleetlm_shard/rebuild.py",
        "            _remember(record, pos, keys, log_time)\n",
        "            log_time.at(record.inserted_at_us)\n",
        cheap=True,
    ),
    Plant(
        "a key is as old as the wall clock says",
        "fleetlm_shard/rebuild.py",
        "    keys.restored(log_s=log_time.now_s, now_s=clock.monotonic_s())",
        "    late_us = max(0, clock.now_us() - (log_time._last_us or clock.now_us()))\n"
        "    keys.restored(log_s=log_time.now_s + late_us / 1e6, now_s=clock.monotonic_s())\n"
        "    keys.evict(clock.monotonic_s())",
    ),
    Plant(
        "expected_seq is checked before dedupe",
        "fleetlm_shard/sequencer.py",
        "        hits = self._hits(call, session.id, drafts)\n",
        "        if entry.expected_seq is not None and entry.expected_seq != session.seq_assigned:\n"
        "            call.conflict(session)\n"
        "            return _UNFILLED\n"
        "        hits = self._hits(call, session.id, drafts)\n",
    ),
    Plant(
        "published before it is durable",
        "fleetlm_shard/writes.py",
        "        self.queued_pos = last_pos\n",
        "        self.queued_pos = last_pos\n"
        "        if session.subscribers:\n"
        "            durable, session.seq_durable = session.seq_durable, messages[-1].seq\n"
        "            self._publisher.publish(session, [message.json for message in messages])\n"
        "            session.seq_durable = durable\n",
        cheap=True,
    ),
    Plant(
        "answered before it is durable",
        "fleetlm_shard/sequencer.py",
        "        if not call.rests_on_log:\n",
        "        if True:\n",
        cheap=True,
    ),
    Plant(
        "readers are not brought on by a new subscription",
        "fleetlm_gateway/streams.py",
        "        for reader in list(self._readers):\n            self.advance(reader)\n\n    def _on_ended",
        "\n    def _on_ended",
        cheap=True,
    ),
    Plant(
        "read cursors are forgotten at boot",
        "fleetlm_shard/rebuild.py",
        "    elif isinstance(record, CursorMoved):\n",
        "    elif record is None:\n",
    ),
    Plant(
        "a hole in the pushes is passed on",
        "fleetlm_gateway/streams.py",
        "        if reply.start_seq > self._tail.last_seq:\n",
        "        if reply.start_seq < 0:\n",
        cheap=True,
    ),
    Plant(
        "a retry has a new key",
        "fleetlm_gateway/lanes.py",
        "        lane.waiting[:0] = [entry for entry in batch if entry.done is not None]\n",
        "        for entry in batch:\n"
        "            drafts = [rpc.Draft(draft.key + '+', draft.fragment) for draft in entry.entry.drafts]\n"
        "            entry.entry = rpc.Entry(drafts, entry.entry.expected_seq)\n"
        "        lane.waiting[:0] = [entry for entry in batch if entry.done is not None]\n",
    ),
    Plant(
        "a lost wakeup: a full lane waits for its next append",
        "fleetlm_gateway/lanes.py",
        "        lane.timer = self._loop.call_later(delay_s, self._pump, lane)\n",
        "        lane.timer = None\n",
        cheap=True,
    ),
    Plant(
        "a link that is lost tells nobody",
        "fleetlm_gateway/shardlink.py",
        '                on_reply(LOST, b"")\n            except Exception as error:',
        "                pass\n            except Exception as error:",
        cheap=True,
    ),
    Plant(
        "caught_up is said again",
        "fleetlm_gateway/readers.py",
        "            self._told_caught_up = True\n            self._sink.caught_up(",
        "            self._sink.caught_up(",
    ),
    Plant(
        "a failed sync is taken for one that worked",
        "fleetlm_shard/writer.py",
        "            self.file.sync()\n            sync_s =",
        "            try:\n                self.file.sync()\n            except OSError:\n                pass\n"
        "            sync_s =",
    ),
    Plant(
        "what an elder wrote after the cut is read",
        "fleetlm_shard/chain.py",
        "chain.links.append(Link(found, header.prev.cut_pos))",
        "chain.links.append(Link(found, found.end_pos_max))",
        cheap=True,
    ),
    Plant(
        "boot serves what it read without syncing it",
        "fleetlm_shard/recovery.py",
        "            _write_filled(file, framing.encode_header(header) + data, header.size)\n            file.sync()\n",
        "            _write_filled(file, framing.encode_header(header) + data, header.size)\n",
    ),
    Plant(
        "the SDK forgets what was in flight when its connection is lost",
        "fleetlm_client/outbox.py",
        '        """The connection is gone: whatever was in flight will be sent again as it is."""\n',
        '        """The connection is gone."""\n        self._group = []\n',
    ),
    Plant(
        "unsealed by a map that still seals",
        "fleetlm_shard/ownership.py",
        "frozenset(mine.keys() - fresh.keys() - sealing.keys())",
        "frozenset(mine.keys() - fresh.keys() - sealing.keys()) | (sealing.keys() & self.held.slots)",
    ),
    Plant(
        "keys that a move brought are not known",
        "fleetlm_shard/importer.py",
        "            parts.keys.take(record.session, record.key, known, pos=pos, at_s=parts.clock.monotonic_s())\n",
        "            pass\n",
    ),
    Plant(
        "a seal does not wait for what is in flight",
        "fleetlm_shard/exporter.py",
        "            await self._writes.all_settled()\n            await self._shown()\n        except LogStopped:\n",
        "            await self._shown()\n        except LogStopped:\n",
    ),
    Plant(
        "an import does not wait for a clean-up in flight",
        "fleetlm_shard/importer.py",
        "            await self._parts.writes.all_settled()\n            if self._is_confirmed():\n",
        "            if self._is_confirmed():\n",
    ),
    Plant(
        "the SDK forgets that its buffer was full",
        "fleetlm_client/reader.py",
        "            if message.seq != received + 1 or full:\n                self.behind = True\n",
        "            if message.seq != received + 1 or full:\n",
    ),
    Plant(
        "a page that goes on is taken for the whole",
        "fleetlm_shard/importer.py",
        "        return after >= state.last_seq or not page.more\n",
        "        return True\n",
    ),
    Plant(
        "a compaction takes what came back, too",
        "fleetlm_shard/compaction.py",
        "(kind in OF_A_SLOT and pos < released.get(slot, 0))\n",
        "(kind in OF_A_SLOT and slot in released)\n",
    ),
    Plant(
        "who is dead for good is not forgotten",
        "fleetlm_operator/forgetting.py",
        "for word in left_s if word not in waiting",
        "for word in left_s if word in waiting and not word.volume_id",
    ),
)


def plant_into(folder: Path, plant: Plant) -> str:
    """Copy the source with the mistake in it; returns the `PYTHONPATH`."""
    plant.check()
    paths: list[str] = []
    for component in COMPONENTS:
        there = folder / component
        shutil.copytree(ROOT / component / "src", there, ignore=shutil.ignore_patterns("__pycache__"))
        paths.append(str(there))
    package = plant.path.partition("/")[0].removeprefix("fleetlm_")
    file = folder / package / plant.path
    file.write_text(file.read_text().replace(plant.old, plant.new))
    return os.pathsep.join(paths)


def find(plant: Plant, *, first: int, seeds: int, timeout_s: float = 900.0) -> tuple[int, list[str]] | None:
    """The first seed that notices the mistake, and how; None: no seed did."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": plant_into(Path(folder), plant)}
        command = [sys.executable, "-m", "tests.sim", "--first", str(first), "--seeds", str(seeds), "--stop", "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    if done.returncode not in {0, 1} or not done.stdout:
        raise RuntimeError(f"plant {plant.name!r}: the simulator itself broke:\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    # What an application dies of (its cursor is ahead, say) is a fault of its task; the text is in the run's report.
    found = [*row["kinds"], *(["fault"] if row["faults"] else [])]
    return (row["seed"], found) if found else None


def main() -> int:
    """Returns 1 when a plant was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.plants", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="part of a plant's name")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX)
    options = parser.parse_args()
    missed = 0
    for plant in PLANTS:
        if options.name not in plant.name:
            continue
        found = find(plant, first=1, seeds=options.seeds)
        missed += found is None
        words = f"NOT FOUND in {options.seeds} |" if found is None else f"{found[0]} | {', '.join(found[1])}"
        sys.stdout.write(f"| {plant.name} | {words} |\n")
        sys.stdout.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
