"""Axis notation: which axis of a tensor is the batch, which the routed tokens.

One word an axis, in the manner of einops:

====== =================================================================
``b``   the batch
``n``   the routed tokens: gathered wherever it is named, twice in ``n n``
``m+n`` a prefix that always stays (text), then the routed tokens
``n+m`` the routed tokens, then a suffix that always stays
``n-m`` the tokens that may bypass alone: a table without entries for the prefix of the stream that stays
``1``   an axis of size 1; as the first axis it is stretched over the batch
other   any name (``c``, ``d``, ``h``): an axis that routing leaves alone
``-``   alone: the argument is opaque, routing passes it on as it is
====== =================================================================

``"b n c"`` is a token stream, ``"m+n d"`` a rotary table over text and image, ``"b 1 n n"`` an attention mask.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from diffcr_surgery.config import shown
from diffcr_surgery.errors import PatternError

__all__ = ["Axes", "parse_axes"]

TOKEN_WORDS = ("n", "m+n", "n+m", "n-m")
LONGEST = 1_000  # characters; a tensor has 64 axes at most
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|1")


class Axes(NamedTuple):
    """A parsed axis pattern.

    Attributes:
        words: One word an axis; empty for an opaque argument.
        tokens: Positions of the axes that hold routed tokens.
        batch: Position of the batch axis, or of a leading axis of size 1 that can stand for it.
    """

    words: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    batch: int | None = None

    def __str__(self) -> str:
        return " ".join(self.words) or "-"


def parse_axes(pattern: str) -> Axes:
    """Parse an axis pattern.

    Raises:
        PatternError: If a word is unknown or repeated; the text carries the pattern and the word.

    Example:
        >>> parse_axes("b m+n d").tokens
        (1,)
    """
    if isinstance(pattern, str) and len(pattern) > LONGEST:
        raise PatternError(
            f"Axis pattern {shown(pattern)} has {len(pattern)} characters; expected one word an axis, at most {LONGEST} in all."
        )
    if not isinstance(pattern, str) or not pattern.strip():
        raise PatternError(
            f"Axis pattern {shown(pattern)} is empty; write one word an axis, such as 'b n c', or '-' for an opaque argument."
        )
    return _parse(pattern)  # what cannot be hashed is refused before the cache sees it


parse_axes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch.compiler.assume_constant_result sets


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> Axes:
    words = tuple(pattern.split())
    if words == ("-",):
        return Axes(())
    for word in words:
        if word not in TOKEN_WORDS and not _WORD.fullmatch(word):
            raise PatternError(f"Axis pattern {pattern!r}: {word!r} is no axis word; expected a name, 1, 'n', 'm+n', 'n+m' or 'n-m'.")
        if words.count(word) > 1 and word not in (*TOKEN_WORDS, "1"):
            raise PatternError(f"Axis pattern {pattern!r}: {word!r} stands twice; only the token axis and 1 may repeat.")
    if len({word for word in words if word in TOKEN_WORDS}) > 1:
        raise PatternError(f"Axis pattern {pattern!r} mixes {TOKEN_WORDS}; all token axes of one argument are counted alike.")
    batch = words.index("b") if "b" in words else 0 if words[0] == "1" else None
    return Axes(words, tuple(i for i, word in enumerate(words) if word in TOKEN_WORDS), batch)
