"""The API server as FleetLM uses it: a few verbs on JSON objects, over the connection of `kubernetes.aio`.

    ApiError
    ├── ApiUnavailable   nobody answered in time, or the server could not: try again; a change may have been made
    ├── ApiConflict      the object is another one, or newer, than the precondition said: read again and decide anew
    │   └── ApiExists    a create found the name taken
    ├── ApiNotFound      no such object (reads answer None instead)
    ├── ApiExpired       a watch asked for what the server has forgotten: list again
    └── ApiRefused       the server will not do it, whoever asks again: not allowed, invalid

Promise: every request has a deadline; nothing is retried here (the callers' loops are level-triggered); what reaches a
caller is one of these errors. Must not be done here: knowing what objects mean.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import urlencode

import aiohttp
import msgspec
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException

from fleetlm_common.kubenames import Resource

Object: TypeAlias = dict[str, Any]
"""A Kubernetes object as JSON. Whoever looks into one converts it to a type of its own first."""

JSON: Final = "application/json"
METADATA: Final = f"{JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""What a list is asked for when only names matter: objects that are large are not sent."""
REQUEST_S: Final = 10.0
"""Longest request; the API server ends most of its own within seconds."""
WATCH_S: Final = 240
"""The server ends a watch after so long; the caller goes on from the last version."""
SILENCE_S: Final = 90.0
"""Bookmarks come each minute: a watch that is silent for longer hangs on a dead connection."""
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""A list of some thousand objects; more means that a selector is missing."""
EVENT_BYTES_MAX: Final = 4 * 1024 * 1024
"""One object of a watch; etcd holds none above 1.5 MiB."""


class ApiError(Exception):
    """The API server did not do what it was asked; `status` is its HTTP status, 0 without an answer."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class ApiUnavailable(ApiError):
    """No answer; the change may have been made."""


class ApiConflict(ApiError):
    """A precondition did not hold."""


class ApiExists(ApiConflict):
    """The name is taken."""


class ApiNotFound(ApiError):
    """No such object."""


class ApiExpired(ApiError):
    """That version is forgotten."""


class ApiRefused(ApiError):
    """Not allowed, or invalid; the message is the server's."""


class Listing(NamedTuple):
    """Objects, and the version at which a watch goes on."""

    items: list[Object]
    version: str


class Event(NamedTuple):
    """A change seen by a watch: ADDED, MODIFIED, DELETED, or BOOKMARK (only the version of `object` counts)."""

    type: str
    object: Object


class _Status(msgspec.Struct, frozen=True):
    """What the server says when it does not do it."""

    message: str = ""
    reason: str = ""
    code: int = 0


class KubeApi:
    """One connection pool to the API server. Cancel-safe: a change under way is made or not.

    Args:
        configuration: from `connect`.
        agent: who asks, for the server's log.
    """

    def __init__(self, configuration: Configuration, *, agent: str) -> None:
        self._client = ApiClient(configuration)
        self._client.user_agent = agent

    @classmethod
    async def connect(cls, env: Mapping[str, str], *, agent: str) -> KubeApi:
        """As the pod's ServiceAccount; outside of a cluster as `KUBECONFIG` says.

        Raises:
            ApiUnavailable: neither is there.
        """
        configuration = Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in env:
                kube_config.load_incluster_config(configuration)
            else:
                path = env.get("KUBECONFIG", "")
                await kube_config.load_kube_config(path, client_configuration=configuration, persist_config=False)
        except (kube_config.ConfigException, OSError) as error:
            raise ApiUnavailable(f"no way to an API server is configured: {error}") from error
        return cls(configuration, agent=agent)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """A quorum read; None if there is no such object."""
        try:
            return await self._ask("GET", resource.path(namespace, name))
        except ApiNotFound:
            return None

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        labels: str = "",
        fields: str = "",
        metadata_only: bool = False,
    ) -> Listing:
        """A quorum read of all objects with these labels and fields."""
        query, accept = _selectors(labels, fields), METADATA if metadata_only else JSON
        found = await self._ask("GET", resource.path(namespace), query=query, accept=accept)
        # A list's items leave out what they are; who compares them with what was asked for needs it.
        kind = {"apiVersion": resource.api, "kind": resource.kind}
        items = found["items"] or []  # a list of metadata without any is null
        return Listing([{**kind, **item} for item in items], found["metadata"]["resourceVersion"])

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Make an object that is not there yet."""
        return await self._ask("POST", resource.path(namespace), body=body)

    async def replace(self, resource: Resource, namespace: str, body: Object, *, subresource: str = "") -> Object:
        """Replace an object; compare-and-swap if `body` has a resourceVersion."""
        path = resource.path(namespace, body["metadata"]["name"], subresource)
        return await self._ask("PUT", path, body=body)

    async def apply(
        self, resource: Resource, namespace: str | None, body: Object, *, manager: str, subresource: str = ""
    ) -> Object:
        """Server-side apply: this manager's fields become as in `body`, everybody else's stay."""
        path = resource.path(namespace, body["metadata"]["name"], subresource)
        query = {"fieldManager": manager, "force": "true"}
        return await self._ask("PATCH", path, query=query, body=body, content="application/apply-patch+yaml")

    async def merge(
        self, resource: Resource, namespace: str | None, name: str, body: Object, *, manager: str, subresource: str = ""
    ) -> Object:
        """JSON merge patch; a resourceVersion in it is a precondition."""
        path = resource.path(namespace, name, subresource)
        query = {"fieldManager": manager}
        return await self._ask("PATCH", path, query=query, body=body, content="application/merge-patch+json")

    async def delete(
        self, resource: Resource, namespace: str | None, name: str, *, uid: str, propagation: str = "Background"
    ) -> None:
        """Delete the object that has this uid; another one of that name stays (`ApiConflict`)."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": propagation}
        await self._ask("DELETE", resource.path(namespace, name), body=options)

    async def watch(
        self, resource: Resource, namespace: str | None, *, version: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[Event]:
        """Changes after `version`, bookmarks included, until the server ends the watch.

        Raises:
            ApiExpired: list again.
            ApiUnavailable: the connection failed or fell silent; go on from the last version seen.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
            **_selectors(labels, fields),
        }
        limits = aiohttp.ClientTimeout(sock_connect=REQUEST_S, sock_read=SILENCE_S)
        response = await self._send("GET", resource.path(namespace), query=query, limits=limits)
        try:
            async for line in _lines(response):
                event = msgspec.json.decode(line)
                if event["type"] == "ERROR":
                    _complain(event["object"].get("code", 500), msgspec.json.encode(event["object"]))
                yield Event(event["type"], event["object"])
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError) as error:
            raise ApiUnavailable(f"the watch of {resource.plural} broke: {error!r}") from error
        finally:
            # A TLS connection that is closed says goodbye first, and nobody waits for that: a loop that ends soon
            # leaves its socket to the collector. `close` aborts the others, too.
            if response.connection is not None and response.connection.transport is not None:
                response.connection.transport.abort()
            response.close()

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = JSON,
        accept: str = JSON,
    ) -> Object:
        limits = aiohttp.ClientTimeout(total=REQUEST_S)
        response = await self._send(method, path, query=query, body=body, content=content, accept=accept, limits=limits)
        try:
            found: Object = msgspec.json.decode(await _body(response))
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError) as error:
            raise ApiUnavailable(f"{method} {path}: {error!r}") from error
        return found

    async def _send(
        self,
        method: str,
        path: str,
        *,
        limits: aiohttp.ClientTimeout,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = JSON,
        accept: str = JSON,
    ) -> aiohttp.ClientResponse:
        """Ask; an answer that is no success raises."""
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": self._client.user_agent}
        try:
            # The hook re-reads the pod's token, which is renewed each hour.
            await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            answer = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=limits
            )
            response: aiohttp.ClientResponse = answer.response
            if response.status >= 400:
                _complain(response.status, await _body(response))
        except (TimeoutError, aiohttp.ClientError, OSError, ApiException, kube_config.ConfigException) as error:
            raise ApiUnavailable(f"{method} {path}: {error!r}") from error
        return response


def _selectors(labels: str, fields: str) -> dict[str, str]:
    """As query parameters."""
    found = {"labelSelector": labels, "fieldSelector": fields}
    return {name: value for name, value in found.items() if value}


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole answer, unless it is larger than any that is asked for."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            response.close()
            raise ApiUnavailable(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return bytes(body)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of an endless answer."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
        if len(rest) > EVENT_BYTES_MAX:
            raise ApiUnavailable(f"an event of more than {EVENT_BYTES_MAX} bytes")


def _complain(status: int, body: bytes) -> None:
    """Raise what the server's answer means."""
    try:
        said = msgspec.json.decode(body, type=_Status)
    except msgspec.DecodeError:
        said = _Status(message=body[:200].decode(errors="replace"))
    message = said.message or f"HTTP status {status}"
    if status == 409 and said.reason == "AlreadyExists":
        kind: type[ApiError] = ApiExists
    else:
        kind = {404: ApiNotFound, 409: ApiConflict, 410: ApiExpired, 412: ApiConflict}.get(status, ApiRefused)
        # A credential that was just renewed is known to the server a moment later: 401 is worth a retry.
        if status >= 500 or status in {401, 408, 429}:
            kind = ApiUnavailable
    raise kind(message, status=status, reason=said.reason)
