"""`fleetlm move`: want slots on a shard, or no longer.

Promise: the wish is a pin in the ring's spec: it holds until it is taken back, the other shards share the rest evenly.
Must not be done here: moving (the controller and the shards do).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Final

import msgspec
import typer

from fleetlm_cli.asking import ask, is_steady, wait_until
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_common.control import Pin, RingSpec, View, shard_names
from fleetlm_common.filecontrol import Status
from fleetlm_common.ids import ShardName, Slot

TIMEOUT_S: Final = 600.0


def move(
    slots: Annotated[str, typer.Argument(help="Slots, for example 0-15,20.")],
    *,
    to: Annotated[str | None, typer.Option("--to", help="The shard that shall own them.")] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Take the wish back: they count like all others.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is so.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait at the most.")] = TIMEOUT_S,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Move slots to a shard, and keep them there until `--unpin`."""
    if (to is None) is not unpin:
        raise Failure("say either --to SHARD or --unpin", status=Exit.USAGE)
    folder = data.absolute()
    chosen = _slots(slots)

    def change(spec: RingSpec) -> RingSpec:
        _check(spec, chosen, to)
        return msgspec.structs.replace(spec, pins=pinned(spec.pins, chosen, None if to is None else ShardName(to)))

    spec = ask(folder, change)

    def done(view: View, status: Status | None) -> bool:
        if view.spec.pins != spec.pins:
            return True  # somebody else asked for something else meanwhile
        if to is None or view.map is None:
            return is_steady(view, status)
        owners = view.map.owners()
        return all(owners[slot].owner == to for slot in chosen)

    printer = Printer(as_json=as_json)
    if wait:
        asyncio.run(wait_until(folder, done, timeout_s=timeout_s, printer=printer, as_json=as_json))
    if as_json:
        printer.record({"slots": chosen, "to": to, "waited": wait})
    else:
        printer.line(f"{len(chosen)} slots {'are' if wait else 'shall be'} {'unpinned' if to is None else f'on {to}'}")


def _check(spec: RingSpec, slots: list[int], to: str | None) -> None:
    """Refuse what this ring cannot be asked for."""
    if slots[-1] >= spec.slots:
        raise Failure(f"there is no slot {slots[-1]}; the ring has 0 to {spec.slots - 1}", status=Exit.USAGE)
    names = shard_names(spec)
    if to is not None and to not in names:
        raise Failure(f"there is no shard {to!r}; there are {', '.join(names)}", status=Exit.USAGE)
    if to is not None and to in spec.cordoned:
        raise Failure(f"{to} is being emptied for a restart; try again when that is over", status=Exit.TRY_AGAIN)


def pinned(pins: Iterable[Pin], slots: Iterable[int], shard: ShardName | None) -> tuple[Pin, ...]:
    """The pins after a wish: `slots` on `shard`, or nowhere in particular (None)."""
    table = {slot: pin.shard for pin in pins for slot in range(pin.first, pin.last + 1)}
    for slot in slots:
        if shard is None:
            table.pop(slot, None)
        else:
            table[slot] = shard
    found: list[Pin] = []
    # Neighbours with the same shard have the same difference to their place among them.
    for (owner, _), run in groupby(enumerate(sorted(table)), key=lambda each: (table[each[1]], each[1] - each[0])):
        numbers = [slot for _, slot in run]
        found.append(Pin(Slot(numbers[0]), Slot(numbers[-1]), owner))
    return tuple(found)


def _slots(text: str) -> list[int]:
    """`0-15,20` as numbers, ascending."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError as error:
            raise Failure(f"{part!r} is no slot and no range of slots (0-15,20)", status=Exit.USAGE) from error
        if not 0 <= low <= high < 1 << 16:
            raise Failure(f"{part!r} is no range of slots", status=Exit.USAGE)
        chosen.update(range(low, high + 1))
    return sorted(chosen)
