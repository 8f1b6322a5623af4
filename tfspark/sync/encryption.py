"""Connections that nobody can read or change on their way: TLS 1.3 with a certificate of the run.

The driver makes one certificate and its key for a run; Spark carries both to the ranks, as it
carries the secret. Every side shows the certificate and accepts no other, so no authority and no
name has to be trusted. Making it takes the package `cryptography` on the driver
(`pip install 'tfspark[encryption]'`); using it takes none.
"""

from __future__ import annotations

import datetime
import errno
import os
import socket
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from tfspark._optional import import_optional

_VALID = datetime.timedelta(days=3650)  # longer than any run; the key is gone with the run
_CLOCKS_DIFFER = datetime.timedelta(days=2)


class WantsReadError(BlockingIOError):
    """An operation, even a write, goes on once the other side has said something."""


@dataclass(frozen=True)
class Identity:
    """The certificate of a run, and its key. It pickles.

    Attributes:
        certificate, key: PEM.

    Example:
        >>> identity = Identity.make()
        >>> ours, theirs = socket.socketpair()
        >>> server = identity.secured(ours, server_side=True)
    """

    certificate: str
    key: str = field(repr=False)

    @classmethod
    def make(cls) -> Identity:
        """A new one.

        Raises:
            MissingExtraError: the package `cryptography` is not installed.
        """
        import_optional("cryptography", "encryption", "Encryption between ranks")
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tfspark run")])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCKS_DIFFER)
            .not_valid_after(now + _VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(certificate.public_bytes(pem).decode(), private.decode())

    def secured(self, connection: socket.socket, *, server_side: bool) -> SecureSocket:
        """A connected socket, encrypted; the given one is used up.

        The handshake is part of the first reads and writes.
        """
        context = self._server if server_side else self._client
        secured: Any = context.wrap_socket(
            connection,
            server_side=server_side,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
        return secured

    @cached_property
    def _server(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody comes back
        return context

    @cached_property
    def _client(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # whoever has the key is right, wherever it runs
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.sslsocket_class = SecureSocket
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.certificate)
        # OpenSSL reads a key from files only.
        with tempfile.TemporaryDirectory(prefix="tfspark-") as folder:
            path = Path(folder) / "identity.pem"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self.certificate + self.key)
            context.load_cert_chain(path)
        return context

    def __getstate__(self) -> dict[str, Any]:
        # Contexts do not pickle, and are made anew.
        return {"certificate": self.certificate, "key": self.key}


class SecureSocket(ssl.SSLSocket):
    """An encrypted socket that says like any other when it would block, and takes many buffers."""

    def send(self, data: Any, flags: int = 0) -> int:
        """See `socket.send`. Returns only what is on its way: nothing is kept back."""
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            _would_block(error)

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """See `socket.recv`."""
        try:
            return super().recv(size, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            _would_block(error)

    def sendmsg(self, buffers: Sequence[memoryview], *_: Any) -> int:  # type: ignore[override]
        """See `socket.sendmsg`; takes the first buffer."""
        return self.send(buffers[0])

    def recvmsg_into(  # type: ignore[override]
        self, buffers: Sequence[memoryview], *_: Any
    ) -> tuple[int, list[Any], int, Any]:
        """See `socket.recvmsg_into`; receives as much as is there.

        What OpenSSL has decrypted already makes no socket readable, so none of it may stay.
        """
        total = 0
        for buffer in buffers:
            done = 0
            while done < buffer.nbytes:
                try:
                    count = self.recv_into(buffer[done:])
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    if total:
                        return total, [], 0, None
                    _would_block(error)
                if count == 0:
                    return total, [], 0, None
                done += count
                total += count
        return total, [], 0, None


def _would_block(error: ssl.SSLError) -> NoReturn:
    kind = WantsReadError if isinstance(error, ssl.SSLWantReadError) else BlockingIOError
    raise kind(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
