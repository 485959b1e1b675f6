"""Who may look, and what a browser may do with what it gets."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline: text of a corpus that got into a page as markup could do nothing."""

HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True)
class Access:
    """Who is let in: whoever asks from this machine, or whoever has the token."""

    token: str | None
    """None: the server listens on the loopback interface alone."""
    cookie: str = "logitcache"
    """Where a browser keeps the token. Cookies of a host are shared by all its ports, so each has a name of its own."""


def access_for(host: str, port: int) -> Access:
    """None but this machine can reach the loopback interface; for any other there is a new token."""
    return Access(None if is_loopback(host) else secrets.token_urlsafe(24), f"logitcache-{port}")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets a request through to the pages, or answers it: wrong method, wrong Host, no token."""

    def __init__(self, app: App, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        extra = [*HEADERS, (b"cache-control", b"no-cache" if _is_static(scope) else b"no-store")]

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in extra}
                kept = [(name, value) for name, value in message.get("headers", []) if name not in names]
                message = {**message, "headers": [*kept, *extra]}
            await send(message)

        if scope["method"] not in ("GET", "HEAD"):
            await _refuse(send_guarded, 405, "read-only: GET and HEAD are all there is", (b"allow", b"GET, HEAD"))
        elif self._access.token is None:
            await self._let_in_local(headers, scope, receive, send_guarded)
        else:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
            if _is_token(given, self._access.token):
                kept = f"{self._access.cookie}={self._access.token}; HttpOnly; SameSite=Strict; Path=/"
                extra.append((b"set-cookie", kept.encode()))
            elif not _is_token(_cookie(headers, self._access.cookie), self._access.token):
                await _refuse(send_guarded, 403, "open the address that 'logitcache serve' printed, with its token")
                return
            await self._app(scope, receive, send_guarded)

    async def _let_in_local(self, headers: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        # A page from elsewhere whose name was made to resolve to this machine names itself here (DNS rebinding).
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if not is_loopback(name.lower().strip("[]")):
            await _refuse(send, 403, "open this page as http://localhost or http://127.0.0.1, by no other name")
            return
        await self._app(scope, receive, send)


def _is_static(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/static/")


def _is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(headers: dict[str, str], name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


async def _refuse(send: Send, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
    start = [(b"content-type", b"text/plain; charset=utf-8"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
