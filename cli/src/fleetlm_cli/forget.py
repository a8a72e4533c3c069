"""`fleetlm shards forget`: have the ring go on without a member that is dead for good.

Promise: nothing happens before somebody who named the volume and was told what it means has agreed; what keeps the
member is said, and then nothing is written; the wish stands in the ring's spec, for this volume only. Must not be done
here: leaving it out of the map (the controller does, and looks at everything once more).
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import aiohttp
import msgspec
import typer

from fleetlm_cli import ring
from fleetlm_cli.asking import ask, wait_until
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_common.control import ControlPlaneUnavailable, Forgotten, RingSpec, View
from fleetlm_common.filecontrol import FileControlPlane, Status
from fleetlm_common.forgetting import refusal
from fleetlm_common.ids import ShardName

TIMEOUT_S: Final = 120.0
"""The controller gives the shard 20 s to answer, and as long again when it was started anew meanwhile."""


def forget(
    name: Annotated[str, typer.Argument(metavar="SHARD", help="The shard that is dead for good.")],
    *,
    volume: Annotated[
        str | None, typer.Option("--volume", help="Id of its volume; without it, it is shown and nothing is done.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    take_back: Annotated[
        bool, typer.Option("--take-back", help="Let the ring take this volume again if it comes back.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is no member.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait at the most.")] = TIMEOUT_S,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Have the ring go on without a shard that left, owns nothing and never comes back."""
    folder, shard, printer = data.absolute(), ShardName(name), Printer(as_json=as_json)
    if take_back and volume is None:
        raise Failure("say with --volume which word is taken back", status=Exit.USAGE)
    try:
        view = asyncio.run(FileControlPlane(folder / "control").read())
    except ControlPlaneUnavailable as error:
        raise Failure(f"cannot use the ring in {folder}: {error}", status=Exit.NOT_RUNNING) from error
    if volume is None:
        _tell(view, shard, printer, as_json=as_json)
        return
    word = Forgotten(shard, volume)
    if take_back:
        ask(folder, lambda spec: _without(spec, word))
        _told(printer, word, "taken_back", f"{shard} may join with volume {volume} again", as_json=as_json)
        return
    if not (word in view.spec.forgotten and _is_gone(view, word)):
        _check(view, word)
        if not yes:
            typer.confirm(f"{_consequences(word)} Go on?", abort=True)
        ask(folder, lambda spec: _with(spec, word))
    if wait:

        def done(seen: View, _: Status | None) -> bool:
            why = "" if _is_gone(seen, word) else refusal(seen, word)
            if why:
                raise Failure(f"{shard} is not forgotten: {why}; the word stands (--take-back ends it)")
            return _is_gone(seen, word)

        asyncio.run(wait_until(folder, done, timeout_s=timeout_s, printer=printer, as_json=as_json))
    words = f"the ring {'has forgotten' if wait else 'shall forget'} {shard} and its volume {volume}"
    _told(printer, word, "forgotten", words, as_json=as_json, waited=wait)


def _tell(view: View, shard: ShardName, printer: Printer, *, as_json: bool) -> None:
    """Which volume it is about, and what it would mean."""
    word = Forgotten(shard, _bound(view, shard))
    _check(view, word)
    if as_json:
        printer.record({"shard": shard, "volume": word.volume_id, "forgotten": False})
        return
    printer.line(f"the ring map binds {shard} to volume {word.volume_id}. {_consequences(word)}")
    printer.line(f"nothing was done; to have it forgotten: fleetlm shards forget {shard} --volume {word.volume_id}")


def _consequences(word: Forgotten) -> str:
    return (
        f"{word.shard} owns no slot, so nothing that the ring serves is lost. What else is on volume {word.volume_id} "
        "is not used any more, and the ring does not take that volume back unless you say so. If it can come back, "
        "start it instead: it leaves by itself."
    )


def _check(view: View, word: Forgotten) -> None:
    """Raises Failure if the ring needs the member, or if it answers."""
    _bound(view, word.shard)
    why = refusal(view, word) or asyncio.run(_answer(view, word))
    if why:
        raise Failure(f"{word.shard} is not forgotten: {why}")


def _bound(view: View, shard: ShardName) -> str:
    """The volume that the map binds it to."""
    members = () if view.map is None else view.map.members
    found = next((member for member in members if member.name == shard), None)
    if found is None:
        names = ", ".join(member.name for member in members)
        raise Failure(f"there is no member {shard!r}; there are {names or 'none yet'}", status=Exit.USAGE)
    return found.volume_id


async def _answer(view: View, word: Forgotten) -> str:
    """Why it is not dead, if it says so itself; the word of another volume is not its own."""
    endpoint = view.shards.get(word.shard)
    if endpoint is None or endpoint.volume_id != word.volume_id:
        return ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ring.ASK_TIMEOUT_S)) as http:
        answer = await ring.ask(http, endpoint)
    return f"it answers at {endpoint.ops_url} and is ready: it leaves by itself" if answer.ready else ""


def _is_gone(view: View, word: Forgotten) -> bool:
    member = None if view.map is None else view.map.member(word.shard)
    return member is None or member.volume_id != word.volume_id


def _with(spec: RingSpec, word: Forgotten) -> RingSpec:
    return msgspec.structs.replace(spec, forgotten=tuple(dict.fromkeys((*spec.forgotten, word))))


def _without(spec: RingSpec, word: Forgotten) -> RingSpec:
    if word not in spec.forgotten:
        raise Failure(f"nobody had the ring forget {word.shard} with volume {word.volume_id}", status=Exit.USAGE)
    return msgspec.structs.replace(spec, forgotten=tuple(each for each in spec.forgotten if each != word))


def _told(
    printer: Printer, word: Forgotten, what: str, words: str, *, as_json: bool, waited: bool | None = None
) -> None:
    if as_json:
        more = {} if waited is None else {"waited": waited}
        printer.record({"shard": word.shard, "volume": word.volume_id, what: True, **more})
    else:
        printer.line(words)
