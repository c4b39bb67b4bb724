"""What options of methods may be: wrong ones are refused when a recipe is read.

Where an option counts entries or channels, an int is that number and a float in (0, 1] a share; of
what is said there.
"""

from __future__ import annotations

from quire.errors import InvalidRequestError

BITS = (2, 4, 8)


def entries_of(budget: int | float, whole: int) -> int:
    """The number of entries that ``budget`` stands for: itself, or a share of ``whole``."""
    if isinstance(budget, int):
        return budget
    return max(1, round(budget * whole))


def require(right: bool, what: str, action: str = "") -> None:
    """Raise InvalidRequestError, saying ``what`` is wrong, unless ``right``."""
    if not right:
        raise InvalidRequestError(what, field="kv", action=action)


def check_counts(least: int = 1, **counts: int | float) -> None:
    """Raise InvalidRequestError for what is neither an int from ``least`` on nor a share."""
    for name, count in counts.items():
        share = isinstance(count, float) and (0 < count <= 1 or count == least == 0)
        require(
            share or (isinstance(count, int) and count >= least),
            f"{name}={count} is neither a number of entries nor a share.",
            f"Give an integer from {least} on, or a fraction up to 1.0.",
        )


def check_every(every: int | None) -> None:
    """Raise InvalidRequestError unless ``every`` is a number of tokens or None."""
    require(every is None or every >= 1, f"every={every}: at least 1 new token, or None for never.")


def check_bits(bits: int) -> None:
    """Raise InvalidRequestError unless codes of ``bits`` fill bytes."""
    what = f"bits={bits}: codes are of 2, 4 or 8 bits, which fill whole bytes."
    require(bits in BITS, what, "Take one of them.")


def check_sizes(least: int = 1, **sizes: int | None) -> None:
    """Raise InvalidRequestError for a size below ``least``; None is the method's own choice."""
    for name, size in sizes.items():
        require(size is None or size >= least, f"{name}={size}: at least {least}.", "Give more.")


def check_shares(**shares: float) -> None:
    """Raise InvalidRequestError for what is not from 0 to 1."""
    for name, share in shares.items():
        require(0 <= share <= 1, f"{name}={share}: a share from 0 to 1.")
