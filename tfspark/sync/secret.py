"""Who knows the secret of a round: nonces and proofs.

Each side of a connection sends a nonce, which is used once, and answers the other's with a proof: a
keyed digest (HMAC-SHA-256, RFC 2104) of both nonces and of what it says. So the secret itself is
never sent, and what one connection has carried is of no use on another.
"""

from __future__ import annotations

import hmac
import secrets
import struct

NONCE_BYTES = 32
PROOF_BYTES = 32

_LENGTH = struct.Struct("<Q")


def nonce() -> bytes:
    """Bytes that nobody can foresee, to be used once."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(token: str, role: str, *parts: bytes) -> bytes:
    """What only those who know the token can make of the parts.

    Args:
        token: the secret.
        role: who proves, and to whom; so nobody's proof can be sent back to him as another's.
        parts: nonces, and what is said.

    Example:
        >>> given, own = nonce(), nonce()
        >>> len(proof("secret", "rank to driver", given, own, b"rank 1"))
        32
    """
    # Each with its length, so that no two lists of parts look the same.
    content = b"".join(_LENGTH.pack(len(part)) + part for part in (role.encode(), *parts))
    return hmac.digest(token.encode(), content, "sha256")


def is_proof(given: bytes, token: str, role: str, *parts: bytes) -> bool:
    """Whether it is; takes the same time whatever is wrong with it."""
    return hmac.compare_digest(given, proof(token, role, *parts))
