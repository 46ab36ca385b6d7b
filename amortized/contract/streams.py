"""Where random numbers start: one function gives every use of a generator a seed of its own.

Torch's CPU generator keeps only 32 bits of a seed, so hashed seeds would collide after some 10^5 uses. Here each use has a
range of seeds to itself, in which a permutation, another for each ``seed`` of the data, places its numbers. All ranges lie
above 2^31, out of the way of the seeds that people pick: a user's ``manual_seed(2)`` meets none of them.
"""

from __future__ import annotations

_FEW = ("val", "test", "val noise", "test noise", "predict noise", "search", "budget", "check")
_GAP = ("gap search", "gap choice", "gap value", "gap again")
_BITS = {"train": 29, "train noise": 29, "order": 28, **dict.fromkeys((*_FEW, *_GAP), 25), "produce": 27}
"""Streams, and the bits of a number in each; together less than 2^31 seeds."""
_FIRST: dict[str, int] = {}
for _stream, _bits in _BITS.items():
    _FIRST[_stream] = 2**31 + sum(2 ** _BITS[earlier] for earlier in _FIRST)


def stream_seed(seed: int, stream: str, number: int) -> int:
    """The 32-bit seed of one use, in ``[2^31, 2^32)``: for a given ``seed``, no two of all streams and numbers share one.

    Args:
        seed: of the data, 0 to 2^32 - 1.
        stream: what the random numbers are for: ``"train"``, ``"train noise"``, ...
        number: of the batch within its stream.

    Raises:
        ValueError: if ``seed`` or ``number`` is outside its range.

    >>> len({stream_seed(0, "train", k) for k in range(10_000)} | {stream_seed(0, "val", k) for k in range(10_000)})
    20000
    """
    bits = _BITS[stream]
    mask = (1 << bits) - 1
    if not 0 <= number <= mask:
        raise ValueError(f"batch number {number} is outside the range of the stream {stream!r}, 0 to {mask}")
    key = ((check_seed(seed) + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (number ^ key) & mask
    for multiplier in (0x2C1B3C6D, 0x297A2D39):  # odd, so that each round is a bijection
        x = (x ^ (x >> 15)) * multiplier & mask
        x = (x + (key >> bits)) & mask
    return _FIRST[stream] + (x ^ (x >> 14))


def check_seed(seed: int) -> int:
    """``seed``, if it is one: those of the data have 32 bits, as torch's and Lightning's have.

    Raises:
        ValueError: if it is outside 0 to 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must be from 0 to {2**32 - 1}; got {seed}")
    return seed
