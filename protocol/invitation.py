"""An invitation: one file that lets one hospital join, handed over outside the system.

It pins what the hospital will believe from then on: the alliance's name, its certificate authority
and its board. ``fingerprint`` is for people: both sides read it to each other over the telephone,
so that a file that was swapped on the way is found out. The token is secret until it is used, once.
"""

import hashlib
import json
import re
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.statements import Board, Name, SiteName, Time

MAX_BYTES = 64 << 10
Address = Annotated[str, Field(pattern=r"^[^\s/]{1,253}:[0-9]{1,5}$")]


class Pins(BaseModel):
    """What a site believes before anything else."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    alliance: Name
    board: Board
    authority: Annotated[str, Field(max_length=8000)]
    # the certificate, PEM

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all pins, in groups of four hex digits."""
        whole = hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()
        return " ".join(whole[i : i + 4] for i in range(0, 32, 4))

    def has_fingerprint(self, text: str) -> bool:
        """Whether somebody has written down this fingerprint; blanks, colons and case are free."""
        return re.sub(r"[\s:]", "", text).lower() == self.fingerprint.replace(" ", "")


class Invitation(BaseModel):
    """The file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)
    schema_number: Literal[1] = Field(alias="schema", default=1)
    site: SiteName
    pins: Pins
    fleet: Address
    service: Address
    door: Address
    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
    expires: Time

    def __repr__(self) -> str:
        """Return a text without the token."""
        return f"Invitation(site={self.site!r}, alliance={self.pins.alliance!r})"

    __str__ = __repr__

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        value = self.model_dump(mode="json", by_alias=True)
        return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the invitation in a file.

        Raises:
            ConfigError: it is none.
        """
        if len(data) > MAX_BYTES:
            raise ConfigError(f"invitation has {len(data)} bytes, expected at most {MAX_BYTES}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part)[:40] for part in first["loc"]) or "file"
            raise ConfigError(
                f"invitation has a wrong {place!r} ({first['msg'][:100]}): ask for it again"
            ) from error
