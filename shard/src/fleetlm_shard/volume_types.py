"""What stands on a volume beside the log: names, the form of the small files, and the refusals of the fence.

    VolumeError
    ├── ForeignVolume     attach the volume that belongs here; this one is somebody else's and stays as it is
    ├── VolumeUnreadable  a person must look: no identity although there is data, or it is damaged or of a newer format
    ├── VolumeFailed      the disk refused an operation: end the process, only a restart learns what is there
    ├── Fenced            a younger process holds the volume: end at once, without a further word
    ├── StaleMap          the control plane answered with an older map than one already stored: wait for the newer one
    └── MapUnavailable    the control plane did not answer and the stored map may not stand in: ask again

A *paper* is a small immutable file: one line of JSON, then `crc32c <8 hex digits>` of that line.
Promise: any flipped byte in a paper is noticed. Must not be done here: I/O.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec
from crc32c import crc32c

from fleetlm_common.ids import Epoch, ShardName, Term
from fleetlm_common.ring import RingMap

VOLUME_FORMAT: Final = 1
_CHECKSUM_BYTES: Final = len(b"\ncrc32c 00000000\n")
PAPER_BYTES_MAX: Final = 16 * 1024 * 1024
"""More than the largest ring map (1024 ranges, 256 members, 64 moves) by far: a longer file is not ours."""
HEARTBEAT_OFFSET: Final = 4096
"""The heartbeat has a page of its own, so that a torn write of it cannot touch the paper before it."""
HEARTBEAT_BYTES: Final = 21

IDENTITY: Final = "identity"
LOG_FOLDER: Final = "log"
ASIDE_FOLDER: Final = "aside"

_TERM: Final = re.compile(r"term-\d{10,}")
_TERM_NAMED: Final = re.compile(r"term-(\d{10,})|map-(\d{10,})-\d{10,}\.json")
_TERM_NAMED_IN_LOG: Final = re.compile(r"(\d{10,})-\d{10,}\.(?:seg|idx|ckpt)|tmp-(\d{10,})-.*")
_MAP: Final = re.compile(r"map-(\d{10,})-(\d{10,})\.json")
_LEAVE: Final = re.compile(r"leave-(\d{10,})")
_TEMPORARY: Final = re.compile(r"tmp-(?:identity-.+|term-(\d{10,})-.+|map-(\d{10,})-\d{10,})")
BOOT_ID: Final = re.compile(r"[0-9A-Za-z.-]{1,64}")


class VolumeError(Exception):
    """Base of the fence's refusals."""


class ForeignVolume(VolumeError):
    """The volume belongs to another ring or shard; `field` names which, `found` and `wanted` say both sides."""

    def __init__(self, *, field: str, found: str, wanted: str, volume_id: str) -> None:
        super().__init__(
            f"volume {volume_id} belongs to {field} {found!r}, this process is of {field} {wanted!r}; "
            "attach the right volume (nothing was written to this one)"
        )
        self.field = field
        self.found = found
        self.wanted = wanted
        self.volume_id = volume_id


class VolumeUnreadable(VolumeError):
    """What is on the volume does not say whose it is."""


class VolumeFailed(VolumeError):
    """The disk refused an operation; `__cause__` is the `OSError`."""


class Fenced(VolumeError):
    """A younger process holds the volume; `term` is the one that has ended."""

    def __init__(self, term: Term) -> None:
        super().__init__(f"term {term} has ended: a younger process holds the volume")
        self.term = term


class StaleMap(VolumeError):
    """The control plane's map contradicts the newest one stored on this volume."""


class MapUnavailable(VolumeError):
    """There is no map to boot with."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Whose volume it is. `volume_id` is made when the volume is formatted and tells it from a fresh one."""

    ring_uid: str
    shard: ShardName
    volume_id: str
    format: int = VOLUME_FORMAT


class TermPaper(msgspec.Struct, frozen=True, kw_only=True):
    """Who took a term: for people, and for a taker to know whether the owner's pod replaced its own.

    The fence needs only the file's name, its lock and its heartbeat.
    """

    term: Term
    ring_uid: str
    shard: ShardName
    volume_id: str
    pod_uid: str
    boot_id: str
    format: int = VOLUME_FORMAT


class MapPaper(msgspec.Struct, frozen=True, kw_only=True):
    """A ring map as a process saw it, and in which pod that was."""

    pod_uid: str
    ring: RingMap
    format: int = VOLUME_FORMAT


class StoredMap(msgspec.Struct, frozen=True, kw_only=True):
    """The newest map on the volume; `paper` is None if its file cannot be read, its epoch binds all the same."""

    term: Term
    epoch: Epoch
    paper: MapPaper | None


class _Format(msgspec.Struct):
    format: int


PaperT = TypeVar("PaperT", Identity, TermPaper, MapPaper)


def encode_paper(paper: Identity | TermPaper | MapPaper, *, size_bytes: int = 0) -> bytes:
    """The file's bytes; `size_bytes` of them, if the paper is not longer."""
    line = msgspec.json.encode(paper).ljust(size_bytes - _CHECKSUM_BYTES)
    return line + b"\ncrc32c %08x\n" % crc32c(line)


def decode_paper(data: bytes, kind: type[PaperT]) -> PaperT:
    """The inverse of `encode_paper`.

    Raises:
        ValueError: damaged, or of a format that this build does not know; says which.
    """
    line, newline, rest = data.partition(b"\n")
    if not newline or rest != b"crc32c %08x\n" % crc32c(line):
        raise ValueError("damaged: the checksum does not fit")
    found = msgspec.json.decode(line, type=_Format).format
    if found != VOLUME_FORMAT:
        raise ValueError(f"of format {found}, this build reads {VOLUME_FORMAT}")
    return msgspec.json.decode(line, type=kind)


def term_file(paper: TermPaper) -> bytes:
    """A term's file: the paper, then the heartbeat at its fixed place."""
    data = encode_paper(paper)
    assert len(data) <= HEARTBEAT_OFFSET, "ids are bounded; the paper fits its page"
    return data.ljust(HEARTBEAT_OFFSET, b"\0") + heartbeat(0)


def heartbeat(count: int) -> bytes:
    """The heartbeat's bytes: of fixed length, so that it is rewritten in place and the file never grows."""
    return b"%020d\n" % count


def term_path(term: int) -> str:
    """File of a term."""
    return f"term-{term:010d}"


def term_names(names: list[str]) -> list[str]:
    """The terms' files among the names, oldest first."""
    return sorted((name for name in names if _TERM.fullmatch(name)), key=lambda name: int(name.removeprefix("term-")))


def leave_path(term: int) -> str:
    """The request to that term's owner to leave; one name a term: asking twice is asking once, a look is one stat."""
    return f"leave-{term:010d}"


def map_path(term: int, epoch: int) -> str:
    """File of a ring map stored by the process of that term."""
    return f"map-{term:010d}-{epoch:010d}.json"


def spare_path(term: int) -> str:
    """File into which that process will write its next ring map; a temporary name."""
    return f"tmp-map-{term:010d}-{0:010d}"


def highest_term(names: list[str], log_names: list[str]) -> Term:
    """The highest term that any name mentions; 0 if none.

    Term files alone would do as long as nobody deletes one; the log's names hold when somebody did.
    """
    matches = [_TERM_NAMED.fullmatch(name) for name in names]
    matches += [_TERM_NAMED_IN_LOG.fullmatch(name) for name in log_names]
    return Term(max((_number(match) for match in matches if match), default=0))


def map_names(names: list[str]) -> list[tuple[Epoch, Term, str]]:
    """The stored maps, oldest first: by epoch, then by term."""
    matches = [match for name in names if (match := _MAP.fullmatch(name))]
    return sorted((Epoch(int(match[2])), Term(int(match[1])), match[0]) for match in matches)


def leftovers(names: list[str], term: Term) -> list[str]:
    """Names that the owner of `term` may remove: temporary ones and requests of takers before it or too late."""
    # A temporary name of this very term is a taker's who lost the race; a request to this term is for us to answer.
    temporary = [match for name in names if (match := _TEMPORARY.fullmatch(name)) and _number(match) <= term]
    answered = [match for name in names if (match := _LEAVE.fullmatch(name)) and _number(match) < term]
    return [match[0] for match in temporary + answered]


def _number(match: re.Match[str]) -> int:
    """The number in a name: of the one group that matched; 0 if the name has none."""
    return int(match[match.lastindex]) if match.lastindex else 0
