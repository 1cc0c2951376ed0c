"""Personal links, form tokens and completion codes: signed, so that nothing but the study's secret has to be kept.

A link's token is NUMBER.EXPIRY.SIGNATURE: the annotator's number and the second of its end, in base 36, and 16 bytes of an
HMAC-SHA256 over both. Who holds it is the annotator. Purposes are signed apart, so that none can stand for another.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import NamedTuple

SIGNATURE_BYTES = 16
CODE_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # without letters that look like digits
CODE_LENGTH = 10  # of 5 bits: no guessing
TOKEN = re.compile(r"([0-9a-z]{1,7})\.([0-9a-z]{1,9})\.([A-Za-z0-9_-]{22})")
MAX_TOKEN = 48  # characters
MOST_DAYS = 3660  # that a link can hold


class Refused(ValueError):
    """A link that is forged, cut off, or over."""


class Claim(NamedTuple):
    """Whose link it is, and until when (seconds since 1970)."""

    annotator: int
    expires: int


def check_days(days: float, name: str) -> None:
    """Raises ValueError, which names the option, where links cannot hold for so many days."""
    if not 0 < days <= MOST_DAYS:
        raise ValueError(f"{name} must be above 0 and {MOST_DAYS} at most, not {days}")


def mac(secret: bytes, purpose: str, text: str) -> bytes:
    """HMAC-SHA256 of a text for one purpose.

    Raises:
        ValueError: the study has no secret, such as an imported one.
    """
    if len(secret) < SIGNATURE_BYTES:
        raise ValueError("the study's folder has no secret.key: links, forms and codes cannot be signed")
    return hmac.new(secret, f"{purpose}\n{text}".encode(), hashlib.sha256).digest()


def sign(secret: bytes, annotator: int, expires: int) -> str:
    """The token of an annotator's personal link."""
    body = f"{_base36(annotator)}.{_base36(expires)}"
    return f"{body}.{_text(mac(secret, 'link', body)[:SIGNATURE_BYTES])}"


def read(secret: bytes, token: str, now: float) -> Claim:
    """Who a token belongs to.

    Raises:
        Refused: forged, damaged or expired; says which of them in words for its holder.
    """
    found = TOKEN.fullmatch(token) if len(token) <= MAX_TOKEN else None
    if found is None:
        raise Refused("This link is not complete. Please copy the whole link from the message you were sent.")
    body = f"{found[1]}.{found[2]}"
    if not hmac.compare_digest(_text(mac(secret, "link", body)[:SIGNATURE_BYTES]), found[3]):
        raise Refused("This link is not valid. Please copy the whole link from the message you were sent.")
    claim = Claim(int(found[1], 36), int(found[2], 36))
    if now >= claim.expires:
        raise Refused("This link has expired. Please ask the people who run this study for a new one; your answers are kept.")
    return claim


def form_token(secret: bytes, annotator: int, purpose: str) -> str:
    """What a form carries: the annotator was shown it, for this purpose, and no page of somebody else's can send it."""
    return _text(mac(secret, "form", f"{annotator}:{purpose}")[:SIGNATURE_BYTES])


def form_is_own(secret: bytes, annotator: int, purpose: str, token: str) -> bool:
    """Whether a form's token is the annotator's, for this purpose."""
    return hmac.compare_digest(form_token(secret, annotator, purpose).encode(), token.encode("utf-8", "replace"))


def completion_code(secret: bytes, code: str) -> str:
    """What an annotator hands in for pay, such as "7Q2MF-0XK9D"; who holds the secret computes it again.

    Args:
        secret: the study's.
        code: the annotator's opaque one.
    """
    number = int.from_bytes(mac(secret, "done", code)[:8], "big")
    letters = "".join(CODE_ALPHABET[(number >> (5 * i)) & 31] for i in range(CODE_LENGTH))
    return f"{letters[:5]}-{letters[5:]}"


def image_name(secret: bytes, *parts: object) -> str:
    """32 hexadecimal digits for an image: the same each time, and saying nothing of what it shows or who made it."""
    return mac(secret, "image", ":".join(map(str, parts)))[:16].hex()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _base36(number: int) -> str:
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
        if not number:
            return digits
