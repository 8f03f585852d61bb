"""What a `.vtok` file says before its first token, and the errors of reading one. `docs/formats.md` has every byte."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from vtok.entropy import take_varint, varint

MAGIC = b"\x89VTOK\r\n\x1a"  # like PNG's: a high bit and both line endings, so that text-mode copies are noticed
VERSION = 3  # the highest that is read: files are written as the lowest that can say what they hold
CODINGS = ("packed", "static", "ar")
MODELS = {"static": "the static entropy model", "ar": "the prior"}  # what a coding needs beside the codebooks
ASKED = ("tokens", "bytes", "psnr_db", "lpips", "predicted_psnr_db")  # what lengths of time blocks can be chosen for
AHEAD = 8  # kinds of asking that the look-ahead is counted above
FINGERPRINT_BYTES = PRIOR_BYTES = 8  # small files are mostly header, and 2^64 keeps accidents out


class VtokFileError(ValueError):
    """A .vtok file that cannot be used."""


class ForeignFile(VtokFileError):
    """Not a .vtok file at all."""


class DamagedFile(VtokFileError):
    """A checksum, or a value that a checksum covers, is wrong."""


class TruncatedFile(DamagedFile):
    """The file ends before its footer does."""


class NewerVersion(VtokFileError):
    """Written by a later version of the format than this one reads."""


class WrongModel(VtokFileError):
    """Encoded with another model, or with another entropy model."""


class OtherBuild(VtokFileError):
    """Coded with a prior whose probabilities come out otherwise on this machine."""


@dataclass(frozen=True)
class Header:
    """What a .vtok file says before its first token.

    model_id: `<family>-<hash>`. weights_sha256: 32 bytes, of the model's model.safetensors.
    size: (height, width) in pixels of the frames that went in, and of those that come out. fps: frames per second.
    codebook_sizes: Q sizes. coding: "packed", "static" or "ar". entropy_sha256: of the static model, or the start of
    the prior's (more is cut off); b"" when packed. fingerprint: 8 bytes (ar; b"" else), of what its probabilities
    are where it was encoded.
    build: that machine in words, for whoever cannot decode the file.
    budget: most tokens a group may hold; 0 where none was asked. tokens_per_second: Fraction(0) where none was asked.
    asked: what each group's own length was chosen for, one of ASKED; "" for lengths that follow from the two above.
    asked_value: how much of it. look_ahead: groups seen beyond the one decided, or None for the whole video.
    """

    model_id: str
    weights_sha256: bytes
    size: tuple[int, int]
    fps: Fraction
    codebook_sizes: tuple[int, ...]
    coding: str = "packed"
    entropy_sha256: bytes = b""
    budget: int = 0
    tokens_per_second: Fraction = Fraction(0)
    asked: str = ""
    asked_value: Fraction = Fraction(0)
    look_ahead: int | None = 0
    fingerprint: bytes = b""
    build: str = ""

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise ValueError(f"coding={self.coding!r} is unknown; choose one of {', '.join(CODINGS)}")
        if self.coding == "ar":
            object.__setattr__(self, "entropy_sha256", self.entropy_sha256[:PRIOR_BYTES])
        size = {"static": 32, "ar": PRIOR_BYTES}.get(self.coding, 0)
        if len(self.weights_sha256) != 32 or len(self.entropy_sha256) != size:
            raise ValueError("a sha256 has 32 bytes; entropy_sha256 goes with coding='static' and 'ar' only")
        if len(self.fingerprint) != (FINGERPRINT_BYTES if self.coding == "ar" else 0):
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, and goes with coding='ar' only")
        if self.size[0] < 1 or self.size[1] < 1 or self.fps <= 0 or self.tokens_per_second < 0 or self.budget < 0:
            raise ValueError(f"size={self.size}, fps={self.fps}, budget={self.budget} must be positive")
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={self.codebook_sizes}: continuous tokens have no .vtok form")
        if self.asked and (self.asked not in ASKED or self.asked_value < 0):
            raise ValueError(f"asked={self.asked!r} {self.asked_value} must be one of {', '.join(ASKED)}, 0 or more")
        if self.asked and (self.budget or self.tokens_per_second):
            raise ValueError(f"asked={self.asked!r} goes without budget and tokens_per_second")

    @property
    def version(self) -> int:
        """Of the format: the lowest that can say this."""
        return 3 if self.coding == "ar" else 2 if self.asked else 1


def header_bytes(header: Header) -> bytes:
    name = header.model_id.encode()
    body = bytes([CODINGS.index(header.coding)]) + varint(len(name)) + name
    body += header.weights_sha256 + header.entropy_sha256
    if header.coding == "ar":
        build = header.build.encode()
        body += header.fingerprint + varint(len(build)) + build
    if header.asked:  # in the place of the two that lengths of their own do without
        ahead = 0 if header.look_ahead is None else header.look_ahead + 1
        first, rate = ASKED.index(header.asked) + AHEAD * ahead, header.asked_value
    else:
        first, rate = header.budget, header.tokens_per_second
    numbers = (*header.size, header.fps.numerator, header.fps.denominator, first, rate.numerator, rate.denominator)
    body += b"".join(map(varint, numbers))
    body += b"".join(map(varint, (len(header.codebook_sizes), *header.codebook_sizes)))
    if header.version > 2:
        body += bytes([bool(header.asked)])
    return MAGIC + header.version.to_bytes(2, "little") + len(body).to_bytes(2, "little") + body


def parse_header(body: bytes, version: int) -> Header:
    if body[0] >= len(CODINGS) or (CODINGS[body[0]] == "ar") != (version > 2):
        raise ValueError(f"coding {body[0]} is unknown")
    coding = CODINGS[body[0]]
    size, at = take_varint(body, 1)
    model_id = body[at : at + size].decode()
    at += size
    weights, at = body[at : at + 32], at + 32
    entropy, fingerprint, build = b"", b"", ""
    if coding == "static":
        entropy, at = body[at : at + 32], at + 32
    if coding == "ar":
        entropy, at = body[at : at + PRIOR_BYTES], at + PRIOR_BYTES
        fingerprint, at = body[at : at + FINGERPRINT_BYTES], at + FINGERPRINT_BYTES
        size, at = take_varint(body, at)
        build, at = body[at : at + size].decode(), at + size
    values = []
    for _ in range(8):
        value, at = take_varint(body, at)
        values.append(value)
    height, width, num, den, budget, rate_num, rate_den, count = values
    sizes = []
    for _ in range(count):
        value, at = take_varint(body, at)
        sizes.append(value)
    asked, value, ahead, rate = "", Fraction(0), 1, Fraction(rate_num, rate_den)
    own, at = (body[at], at + 1) if version > 2 else (version - 1, at)
    if own:
        ahead, kind = divmod(budget, AHEAD)
        if own > 1 or kind >= len(ASKED):
            raise ValueError(f"what was asked, {kind}, is unknown")
        asked, value, budget, rate = ASKED[kind], rate, 0, Fraction(0)
    if at != len(body):
        raise ValueError(f"the header has {len(body) - at} bytes too many")
    return Header(
        model_id=model_id,
        weights_sha256=weights,
        size=(height, width),
        fps=Fraction(num, den),
        codebook_sizes=tuple(sizes),
        coding=coding,
        entropy_sha256=entropy,
        budget=budget,
        tokens_per_second=rate,
        asked=asked,
        asked_value=value,
        look_ahead=ahead - 1 if ahead else None,
        fingerprint=fingerprint,
        build=build,
    )
