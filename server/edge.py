"""The public edge: TLS towards the hospitals, Flower's Fleet paths and nothing else behind it.

Flower's SuperLink serves its Control and Runtime APIs on the same port, to anybody. So it listens
on loopback, and this is the only way to it from outside: the paths that an agent uses, ``POST``
only, bodies of a bounded size, the headers that Flower's nodes send. Everything else is 404,
whether Flower knows it or not: an endpoint that a later version adds is shut until it is listed
here. What announces an answer is looked into: SuperLink believes the tree of parts that it names.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from huizhen.server.superlink import is_plain_answer

FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
MAX_BODY_BYTES = 12 << 20  # of a chunk; those of most sites have 5 MiB
MAX_ANSWER_BYTES = 1 << 20  # of what announces an answer: it names the parts and holds none
BODY_SECONDS = 300.0  # for a request and its answer: a chunk over a slow line
_PUSH_MESSAGES = "/v1/fleet/push-messages"
_REQUEST_HEADERS = frozenset(
    {
        b"content-type", b"accept", b"flwr-public-key", b"flwr-signature", b"flwr-timestamp",
        b"flwr-package-name", b"flwr-package-version", b"flwr-component-name",
    }
)  # fmt: skip
_RESPONSE_HEADERS = ("content-type", "content-length")


class _TooLargeError(Exception):
    """A body without a length grew over the limit."""


def make_edge(superlink: str, ca: Path) -> Starlette:
    """Return the edge as an ASGI application.

    Args:
        superlink: host and port of the SuperLink, on loopback.
        ca: the authority of its certificate, PEM.
    """
    context = ssl.create_default_context(cafile=str(ca))
    client = httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=context,
        trust_env=False,  # a proxy has no place between two processes of one machine
        timeout=httpx.Timeout(60, connect=5),
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=32),
    )

    async def serve(request: Request) -> Response:
        path = request.scope["raw_path"].decode("latin-1")  # as sent: nothing decoded, no query
        if request.method != "POST" or path not in FLEET_PATHS or request.url.query:
            return Response(status_code=404)
        length = request.headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > MAX_BODY_BYTES):
            return Response(status_code=413)
        headers = [(n, v) for n, v in request.headers.raw if n in _REQUEST_HEADERS]
        if length is not None:
            headers.append((b"content-length", length.encode()))
        try:
            async with asyncio.timeout(BODY_SECONDS):
                content: Any = _bounded(request, MAX_BODY_BYTES)
                if path == _PUSH_MESSAGES:
                    content = b"".join([one async for one in _bounded(request, MAX_ANSWER_BYTES)])
                    if not is_plain_answer(content):
                        return Response(status_code=400)
                asked = client.build_request("POST", path, content=content, headers=headers)
                answer = await client.send(asked, stream=True)
        except _TooLargeError:
            return Response(status_code=413)
        except TimeoutError:
            return Response(status_code=408)
        except (httpx.TransportError, ClientDisconnect):
            return Response(status_code=503)
        kept = {name: answer.headers[name] for name in _RESPONSE_HEADERS if name in answer.headers}
        return StreamingResponse(_stream(answer), status_code=answer.status_code, headers=kept)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    return Starlette(lifespan=lifespan, routes=[Route("/{path:path}", serve, methods=_METHODS)])


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"]


async def _bounded(request: Request, most: int) -> AsyncIterator[bytes]:
    """Give a request's body as it comes, up to a number of bytes."""
    taken = 0
    async for chunk in request.stream():
        taken += len(chunk)
        if taken > most:
            raise _TooLargeError
        yield chunk


async def _stream(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()
