"""`fleetlm ring [watch]`: who owns what, what moves and how far it is, and how each shard is.

Reads the control plane's files and asks each shard's admin API; nothing is changed.

Promise: what a shard says of itself is shown as its word, what the map says as the map's; a shard that does not answer
is shown, not left out. Must not be done here: judging (the controller's sentence stands above the table).
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer, printable
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_common.control import ControlPlaneUnavailable, ShardEndpoint, View
from fleetlm_common.filecontrol import FileControlPlane, read_status
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import Move

ASK_TIMEOUT_S: Final = 2.0
"""One question to a shard; a person waits."""
WATCH_S: Final = 0.5
"""Between two looks of `ring watch`."""
WIDTH_PIPED: Final = 200
"""Columns where there is no terminal to ask."""
MIB: Final = 1024 * 1024


class Serving(msgspec.Struct, frozen=True):
    """What is shown of a shard that serves (more fields are ignored)."""

    term: int
    epoch: int
    sessions_hot: int = msgspec.field(name="hot_sessions", default=0)
    log_bytes: int = msgspec.field(name="log_segment_bytes", default=0)
    damage: list[object] = []


class Answer(msgspec.Struct, frozen=True):
    """`GET /admin/status` of a shard, as far as it is shown."""

    ready: bool
    reason: str
    message: str = ""
    serving: Serving | None = None


class ShardRow(msgspec.Struct, frozen=True, kw_only=True):
    """One shard: the map's word (slots, member) and its own (the rest)."""

    name: str
    member: bool
    slots: int
    ranges: list[tuple[int, int, int]]
    """First and last slot, and the epoch at which the shard got them."""
    ready: bool
    reason: str
    message: str
    term: int | None
    epoch: int | None
    log_bytes: int | None
    damaged: bool


class MoveRow(msgspec.Struct, frozen=True, kw_only=True):
    """One move: the map's word, and its target's (`said` and what follows; "" when it says nothing)."""

    id: str
    slots: list[int]
    source: str
    target: str
    state: str
    said: str
    done: int
    total: int
    behind: int
    reason: str
    message: str


class RingView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer, also as JSON."""

    uid: str
    slots: int
    shards_wanted: int
    epoch: int | None
    sentence: str | None
    said_at: str | None
    shards: list[ShardRow]
    moves: list[MoveRow]
    cordoned: list[str]
    pins: list[tuple[int, int, str]]
    """First and last slot, and the shard that people want them on."""
    forgotten: list[tuple[str, str]]
    """Shard and volume that the ring goes on without, or shall."""


ring = typer.Typer(help="Who owns what, what moves, and how each shard is.")


@ring.callback(invoke_without_command=True)
def show(context: typer.Context, *, data: DataOption = DATA_DEFAULT, as_json: JsonOption = False) -> None:
    """Show which shard owns which slots, what moves, and how each shard is."""
    if context.invoked_subcommand is not None:
        return
    folder = data.absolute()
    found = asyncio.run(look(folder))
    if as_json:
        Printer(as_json=True).record(msgspec.to_builtins(found))
    else:
        _show(found, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_PIPED))


@ring.command()
def watch(*, data: DataOption = DATA_DEFAULT, as_json: JsonOption = False) -> None:
    """Show it again and again, until Ctrl-C; in a pipe a line for each change."""
    with suppress(KeyboardInterrupt):
        asyncio.run(_watch(data.absolute(), as_json=as_json))


async def _watch(folder: Path, *, as_json: bool) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_PIPED)
    printer = Printer(as_json=as_json)
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    shown: object = None
    with live if live is not None else nullcontext():
        while True:
            found = await look(folder)
            if live is not None:
                live.update(_pictured(found), refresh=True)
            elif as_json and shown != found:
                printer.record(msgspec.to_builtins(found))
                shown = found
            elif not as_json and shown != (lines := _changes(found)):
                printer.line("; ".join(lines))
                shown = lines
            await asyncio.sleep(WATCH_S)


def _changes(found: RingView) -> list[str]:
    """What is worth a line."""
    slots = ", ".join(f"{row.name} {row.slots}" for row in found.shards if row.member)
    return [f"epoch {found.epoch or 0}: {slots}", *map(_move_words, found.moves)]


async def look(folder: Path) -> RingView:
    """What the files say, and every shard of itself.

    Raises:
        Failure: there is no ring in `folder`.
    """
    control = folder / "control"
    try:
        view = await FileControlPlane(control).read()
    except ControlPlaneUnavailable as error:
        raise Failure(f"no ring to look at: {error} (`fleetlm up` makes one)", status=Exit.NOT_RUNNING) from error
    status = await asyncio.to_thread(read_status, control)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)) as http:
        rows = await asyncio.gather(*(_row(http, view, name) for name in shard_names(view)))
    return RingView(
        uid=view.spec.uid,
        slots=view.spec.slots,
        shards_wanted=view.spec.shards,
        epoch=None if view.map is None else view.map.epoch,
        sentence=None if status is None else status.sentence,
        said_at=None if status is None else status.at,
        shards=list(rows),
        moves=[] if view.map is None else [_move(view, move) for move in view.map.moves],
        cordoned=list(view.spec.cordoned),
        pins=[(pin.first, pin.last, pin.shard) for pin in view.spec.pins],
        forgotten=[(word.shard, word.volume_id) for word in view.spec.forgotten],
    )


def _move(view: View, move: Move) -> MoveRow:
    target = view.shards.get(move.target)
    said = next((said for said in target.moves if said.id == move.id), None) if target is not None else None
    return MoveRow(
        id=move.id,
        slots=list(move.slots),
        source=move.source,
        target=move.target,
        state=move.state,
        said="" if said is None else said.state,
        done=0 if said is None else said.done,
        total=0 if said is None else said.total,
        behind=0 if said is None else said.behind,
        reason="" if said is None else said.reason,
        message="" if said is None else said.message,
    )


def shard_names(view: View) -> list[ShardName]:
    """Members first, in the map's order; then who has only announced itself."""
    members = [] if view.map is None else [member.name for member in view.map.members]
    return [*members, *sorted(set(view.shards) - set(members))]


async def _row(http: aiohttp.ClientSession, view: View, name: ShardName) -> ShardRow:
    found = [] if view.map is None else [each for each in view.map.ranges if each.owner == name]
    answer = await ask(http, view.shards.get(name))
    serving = answer.serving
    return ShardRow(
        name=name,
        member=view.map is not None and view.map.member(name) is not None,
        slots=sum(each.last - each.first + 1 for each in found),
        ranges=[(each.first, each.last, each.epoch) for each in found],
        ready=answer.ready,
        reason=answer.reason,
        message=answer.message,
        term=None if serving is None else serving.term,
        epoch=None if serving is None else serving.epoch,
        log_bytes=None if serving is None else serving.log_bytes,
        damaged=serving is not None and bool(serving.damage),
    )


async def ask(http: aiohttp.ClientSession, endpoint: ShardEndpoint | None) -> Answer:
    """A shard's own word; silence is one too."""
    if endpoint is None:
        return Answer(ready=False, reason="NotAnnounced")
    try:
        async with http.get(f"{endpoint.ops_url}/admin/status") as response:
            return msgspec.json.decode(await response.read(), type=Answer)
    except (aiohttp.ClientError, TimeoutError):
        return Answer(ready=False, reason="NoAnswer", message=f"nobody answers at {endpoint.ops_url}")
    except msgspec.DecodeError:
        return Answer(ready=False, reason="NoAnswer", message=f"something else answers at {endpoint.ops_url}")


def _show(found: RingView, console: Console) -> None:
    """For people."""
    console.print(_pictured(found))


def _pictured(found: RingView) -> Group:
    epoch = "no map yet" if found.epoch is None else f"epoch {found.epoch}"
    lines = [f"ring {printable(found.uid)}: {found.slots} slots, {epoch}"]
    if found.sentence is not None:
        lines.append(f"controller, {found.said_at}: {printable(found.sentence)}")
    table = Table("shard", "slots", "which (since epoch)", "state", "term", "log", box=None, pad_edge=False)
    for row in found.shards:
        which = ", ".join(f"{first}–{last} ({since})" for first, last, since in row.ranges)
        log = "" if row.log_bytes is None else f"{row.log_bytes / MIB:.1f} MiB{' damaged' if row.damaged else ''}"
        state = "ready" if row.ready else ": ".join(filter(None, [row.reason, printable(row.message)]))
        state += " (cordoned)" if row.name in found.cordoned else ""
        term = "" if row.term is None else str(row.term)
        table.add_row(row.name, str(row.slots), which if row.member else "not a member", state, term, log)
    after = [_move_words(move) for move in found.moves]
    after += [f"pinned: {first}–{last} to {shard}" for first, last, shard in found.pins]
    after += [f"forgotten: {shard} with volume {printable(volume)}" for shard, volume in found.forgotten]
    return Group(*map(Text, lines), table, *map(Text, after))


def _move_words(move: MoveRow) -> str:
    said = f", {move.target} says {move.said}" if move.said else ""
    far = f" {move.done}/{move.total} sessions" if move.total else ""
    why = f" ({move.reason}{': ' * bool(move.message)}{printable(move.message)})" if move.reason else ""
    return f"move {move.id}: {len(move.slots)} slots {move.source} → {move.target}, {move.state}{said}{far}{why}"
