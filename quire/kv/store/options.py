"""What options of stores may be; wrong ones are refused when a recipe is read."""

from __future__ import annotations

from quire.errors import InvalidRequestError

BITS = (2, 4, 8)


def check_bits(bits: int) -> None:
    """Raise InvalidRequestError unless codes of ``bits`` fill bytes."""
    if bits not in BITS:
        raise InvalidRequestError(
            f"bits={bits}: codes are of 2, 4 or 8 bits, which fill whole bytes.",
            field="kv",
            value=bits,
            action="Take the next of them.",
        )


def check_sizes(least: int = 1, **sizes: int | None) -> None:
    """Raise InvalidRequestError for a size below ``least``; None is the method's own choice."""
    for name, size in sizes.items():
        if size is not None and size < least:
            raise InvalidRequestError(
                f"{name}={size}: at least {least}.", field="kv", value=size, action="Give more."
            )
