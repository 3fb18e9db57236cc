"""Reading samples of which some may be bad, while batches are made."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ..errors import DataError
from .annotations import OnBadSample

T = TypeVar("T")


def substituted(
    read: Callable[[int], T], indices: Sequence[int], wanted: Iterable[int], on_bad_sample: OnBadSample
) -> Iterator[T]:
    """The samples wanted, for training: the next one that can be read takes the place of a bad one.

    Args:
        read: A sample by its number; raises DataError for a bad one.
        indices: Numbers to choose from.
        wanted: Places in ``indices``.
        on_bad_sample: Whether bad samples are refused or skipped.

    Raises:
        DataError: A sample is bad, and bad ones are refused, or all are.
    """
    for place in wanted:
        candidates = (indices[(place + step) % len(indices)] for step in range(len(indices)))
        found = list(_first(read, candidates, on_bad_sample, "the next one takes its place"))
        if not found:
            raise DataError("no readable image left; mend the data")
        yield found[0]


def readable(
    read: Callable[[int], T], indices: Sequence[int], wanted: Sequence[int], on_bad_sample: OnBadSample
) -> list[T]:
    """The samples wanted that can be read, for scoring; arguments are those of ``substituted``.

    Raises:
        DataError: A sample is bad, and bad ones are refused, or all wanted are.
    """
    found = [sample for place in wanted for sample in _first(read, [indices[place]], on_bad_sample, "left out")]
    if not found:
        raise DataError(f"none of {len(wanted)} images in a row could be read; mend the data")
    return found


def _first(
    read: Callable[[int], T], candidates: Iterable[int], on_bad_sample: OnBadSample, instead: str
) -> Iterator[T]:
    """The first candidate that can be read, if any can."""
    for i in candidates:
        try:
            sample = read(i)
        except DataError as error:
            if on_bad_sample == "fail":
                raise
            warnings.warn(f"{error}; {instead}", stacklevel=2)
        else:
            yield sample
            return
