"""Images that requests name by URI: from where the operator allows it, and from no private address."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from urllib.parse import unquote

import httpx

from raysseg import storage
from raysseg.hosting import Http
from raysseg.serve.refusal import Refusal

_TIMEOUT_S = 20.0
_UNICAST = ipaddress.ip_network("2000::/3")  # beyond it lie translations to IPv4


async def fetch(uri: str, http: Http) -> bytes:
    """The file behind a URI.

    Raises:
        Refusal: it is not allowed, can't be had, or too large.
    """
    is_web = uri.startswith("https://")
    if not uri.startswith(http.fetch) or _is_devious(uri) or (not is_web and re.search("[?#]", uri)):
        allowed = ", ".join(http.fetch) if http.fetch else "none here; send the image itself"
        raise Refusal(403, f"uri: {uri!r} is not allowed; allowed beginnings: {allowed}")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await (_fetch_web if is_web else _fetch_stored)(uri, http)
    except (httpx.HTTPError, httpx.InvalidURL, storage.StorageError, OSError, TimeoutError, UnicodeError) as error:
        raise Refusal(
            422, f"uri: {uri!r} can't be had ({type(error).__name__}); check it, or send the image"
        ) from error


def _is_devious(uri: str) -> bool:
    """Whether a URI may mean something above what it begins with."""
    plain = unquote(uri)
    return not plain.isprintable() or "\\" in plain or ".." in re.split("[/?#]", plain)


async def _fetch_stored(uri: str, http: Http) -> bytes:
    data = await asyncio.to_thread(_read_start, uri, http.max_bytes + 1)
    _check_size(len(data), http)
    return data


def _read_start(uri: str, size: int) -> bytes:
    with storage.open_input(uri) as file:
        return bytes(file.read(size))


async def _fetch_web(uri: str, http: Http) -> bytes:
    """Over a connection to the very address that was looked at: a name may mean another one a moment later."""
    url = httpx.URL(uri)
    address = await _public_address(url.host, url.port or 443)
    headers = {"Host": url.netloc.decode(), "Accept-Encoding": "identity"}
    names = {"sni_hostname": url.host}
    request = httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions=names)
    data = bytearray()
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
        answer = await client.send(request, stream=True)
        if answer.status_code != 200 or "content-encoding" in answer.headers:
            reason = f"answers {answer.status_code}; allowed: 200, without redirection or content encoding"
            raise Refusal(422, f"uri: {uri!r} {reason}")
        async for chunk in answer.aiter_raw():
            data += chunk
            _check_size(len(data), http)
    return bytes(data)


async def _public_address(host: str, port: int) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refusal(403, f"uri: {host} has a private address, and those are never asked; send the image itself")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is one of the open net, and stands for no other one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_global
    return address.is_global and address in _UNICAST and not address.sixtofour and not address.teredo


def _check_size(size: int, http: Http) -> None:
    if size > http.max_bytes:
        raise Refusal(413, f"the file is too large; allowed: {http.max_bytes} bytes")
