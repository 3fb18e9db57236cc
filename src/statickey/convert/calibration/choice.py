"""Which heads become static."""

from collections.abc import Callable, Mapping, Sequence

from ...errors import StaticKeyError

Head = tuple[str, int]
"""Name of a layer, index of a head."""


def named_heads(heads: Mapping[str, Sequence[int]], available: Mapping[str, Sequence[int]]) -> list[Head]:
    """Heads as given by layer, of those that are ``available``.

    Raises:
        StaticKeyError: A layer is not among those chosen; a head does not exist, is static already or is named twice.
    """
    for name, indices in heads.items():
        if name not in available:
            raise StaticKeyError(f"heads names {name!r}, the chosen layers are {', '.join(available)}")
        if not isinstance(indices, Sequence):
            raise StaticKeyError(f"heads[{name!r}]={indices!r} must be a list of heads, such as [0, 2]")
        for head in indices:
            if not isinstance(head, int) or isinstance(head, bool) or head not in available[name]:
                left = ", ".join(map(str, available[name]))
                raise StaticKeyError(f"heads[{name!r}] has {head!r}; its heads that are not static are {left}")
        if len({*indices}) != len(indices) or not indices:
            raise StaticKeyError(f"heads[{name!r}]={indices} must name one head or more, each once")
    return [(name, head) for name in available if name in heads for head in sorted(heads[name])]


def largest_within(
    ranked: Sequence[Head], max_drop: float, drop_of: Callable[[Sequence[Head]], float], unit: str
) -> tuple[list[Head], float]:
    """The longest beginning of a ranking whose drop stays within a budget, by bisection.

    Args:
        ranked: Heads, the best first.
        max_drop: The budget.
        drop_of: What converting some heads costs; taken to grow with their number.
        unit: Name of the cost, for the message.

    Returns:
        The heads and what they cost.

    Raises:
        StaticKeyError: Not even the first head stays within it; says what it costs.
    """
    whole = drop_of(ranked)
    if whole <= max_drop:
        return list(ranked), whole
    inside, outside, cost, over = 0, len(ranked), 0.0, whole
    while outside - inside > 1:
        middle = (inside + outside) // 2
        drop = drop_of(ranked[:middle])
        if drop <= max_drop:
            inside, cost = middle, drop
        else:
            outside, over = middle, drop
    if not inside:
        name, head = ranked[0]
        raise StaticKeyError(
            f"max_drop={max_drop}: no head stays within it; the best found, head {head} of {name} alone, costs "
            f"{over:.4g} {unit}"
        )
    return list(ranked[:inside]), cost
