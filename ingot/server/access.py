"""Who may ask: API keys for groups of routes, and TLS. Keys are compared by digest, in a time that tells nothing."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ingot.errors import ConfigError
from ingot.server.request import Code, ServerError

GROUPS = ("inference", "management", "metrics")
_SHORTEST = 16
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Access:
    """Digests of the keys of each group; a group without any is open to everybody. Health is always open."""

    keys: Mapping[str, frozenset[bytes]] = field(default_factory=dict)

    def check(self, group: str, authorization: bytes | str | None, key: bytes | str | None) -> None:
        """UNAUTHORIZED unless the group is open or a header carries one of its keys."""
        known = self.keys.get(group)
        if known is None:
            return
        digest = hashlib.sha256(_presented(authorization, key)).digest()
        # every key is compared, whichever fits: how long this takes does not depend on what was presented
        if not sum(hmac.compare_digest(digest, each) for each in known):
            way = "'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise ServerError(Code.UNAUTHORIZED, f"{group} needs an API key: {way}", "REJECTED")

    def check_headers(self, group: str, headers: Mapping[bytes, bytes]) -> None:
        """The same for headers, of HTTP or of a gRPC call."""
        if group in self.keys:
            self.check(group, headers.get(b"authorization"), headers.get(b"x-api-key"))


def _presented(authorization: bytes | str | None, key: bytes | str | None) -> bytes:
    given = _as_bytes(authorization)
    scheme, _, token = given.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else _as_bytes(key)


def _as_bytes(value: bytes | str | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def read_keys(file: Path) -> frozenset[bytes]:
    """A key, or sha256:DIGEST of one, a line; # begins a comment. ConfigError for a file without keys or short ones."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    short = [number for number, line in enumerate(keys, 1) if len(line) < _SHORTEST]
    if not keys or short:
        problem = f"key {short[0]} has fewer than {_SHORTEST} characters" if short else "it holds no key"
        raise ConfigError(f"key file {file}: {problem}; `openssl rand -hex 32` makes good ones")
    if file.stat().st_mode & 0o007:
        raise ConfigError(f"key file {file} can be read by everybody on this machine; chmod 600 {file}")
    return frozenset(_digest_of(line) for line in keys)


def _digest_of(line: str) -> bytes:
    digest = _DIGEST.fullmatch(line)
    return bytes.fromhex(digest[1]) if digest else hashlib.sha256(line.encode()).digest()


@dataclass(frozen=True)
class Tls:
    """PEM files: our certificate chain and key; with `client_ca` clients need a certificate of that authority."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What a port listens with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Read the files, now or again: new connections use what they hold."""
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS with {self.certificate} and {self.key}: {error}") from error
