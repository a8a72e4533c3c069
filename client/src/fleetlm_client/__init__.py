"""FleetLM's asyncio SDK: append to sessions, read them, resume by cursor; reconnecting is its job.

    import fleetlm_client

    async with fleetlm_client.connect("http://127.0.0.1:4000", participant_id="alice") as client:
        async with client.join("s1", cursor=0) as session:
            ack = await session.append({"text": "hi"})
            async for event in session:
                print(event)

Guide: docs/client.md. Errors: `fleetlm_client.errors` and `fleetlm_common.errors`, all importable from here.
"""

from fleetlm_client.client import Client, connect, connect_rest
from fleetlm_client.drafts import NewMessage
from fleetlm_client.errors import (
    ClientClosed,
    ConnectionRefused,
    NotReachable,
    NotSent,
    OutcomeUnknown,
    ProtocolMismatch,
)
from fleetlm_client.events import (
    Ack,
    CaughtUp,
    Draining,
    Event,
    Gap,
    InboxEntry,
    InboxPage,
    InboxUpdate,
    Joined,
    Message,
    Page,
    ReadCursor,
    Reconnected,
)
from fleetlm_client.inbox import Inbox
from fleetlm_client.rest import Rest, SessionInfo, SessionPage
from fleetlm_client.session import Session
from fleetlm_client.settings import Settings
from fleetlm_common.errors import (
    Conflict,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    Invalid,
    NotFound,
    Rejected,
    TooLarge,
    TryAgain,
    Unauthenticated,
)

__all__ = [
    "Ack",
    "CaughtUp",
    "Client",
    "ClientClosed",
    "Conflict",
    "ConnectionRefused",
    "Draining",
    "Event",
    "FleetError",
    "Forbidden",
    "Gap",
    "IdempotencyConflict",
    "Inbox",
    "InboxEntry",
    "InboxPage",
    "InboxUpdate",
    "Invalid",
    "Joined",
    "Message",
    "NewMessage",
    "NotFound",
    "NotReachable",
    "NotSent",
    "OutcomeUnknown",
    "Page",
    "ProtocolMismatch",
    "ReadCursor",
    "Reconnected",
    "Rejected",
    "Rest",
    "Session",
    "SessionInfo",
    "SessionPage",
    "Settings",
    "TooLarge",
    "TryAgain",
    "Unauthenticated",
    "connect",
    "connect_rest",
]
