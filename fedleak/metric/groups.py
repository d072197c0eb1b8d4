"""Layers of a large network in few groups, by the names of their modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Part of the groups wished for that must be left when all of a prefix join.
_FEWEST = 0.7


@dataclass(frozen=True)
class Group:
    """Neighbouring layers that are judged together.

    Attributes
    ----------
    name : str
        ``"conv1"``, the common prefix ``"layer1.0"``, or ``"features.2 to features.4"``.
    modules : tuple of str
        In as few names as possible, for ``withhold:NAME,NAME``.
    parameters : tuple of str
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def layers_by_parameter(parameters: Iterable[str]) -> dict[str, str]:
    """Return the layer of each parameter: its module, as :class:`Group` names it.

    A parameter of a module that holds further layers is a layer of its own.
    """
    names = list(parameters)
    modules = {n: n.rpartition(".")[0] for n in names}
    held = {m for m in modules.values() if any(o.startswith(f"{m}.") for o in modules.values())}
    return {n: n if not m or m in held else m for n, m in modules.items()}


def group_layers(parameters: Sequence[str], most: int) -> tuple[Group, ...]:
    """Return at most ``most`` groups: layers with the longest common prefix join first.

    Parameters
    ----------
    parameters : sequence of str
        Dotted names in the order of the model.
    most : int
    """
    owners = layers_by_parameter(parameters)
    layers = list(dict.fromkeys(owners.values()))
    groups = [[layer] for layer in layers]
    while len(groups) > max(most, 1):
        # Of equals the smallest pair, then the last: what is near the image is told apart longest.
        at = max(
            range(len(groups) - 1),
            key=lambda i: (
                len(_common(groups[i] + groups[i + 1])),
                -len(groups[i] + groups[i + 1]),
                i,
            ),
        )
        prefix = _common(groups[at] + groups[at + 1])
        first, last = at, at + 2
        while first and _common(groups[first - 1] + groups[at]) == prefix:
            first -= 1
        while last < len(groups) and _common(groups[at] + groups[last]) == prefix:
            last += 1
        # All that the prefix has, unless too few groups would be left.
        if not prefix or len(groups) - (last - first) + 1 < _FEWEST * most:
            first, last = at, at + 2
        groups[first:last] = [[layer for group in groups[first:last] for layer in group]]
    return tuple(
        Group(*_named(members, layers), tuple(p for p in parameters if owners[p] in members))
        for members in groups
    )


def _common(names: Sequence[str]) -> list[str]:
    """Return the parts that all these names begin with."""
    first, *rest = (name.split(".") for name in names)
    depth = 0
    while all(len(r) > depth < len(first) and r[depth] == first[depth] for r in rest):
        depth += 1
        if depth >= len(first):
            break
    return first[:depth]


def _named(members: Sequence[str], layers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a name for some layers, and the modules that they are."""
    if len(members) == 1:
        return members[0], tuple(members)
    depth = len(_common(members))
    if depth and _whole(prefix := ".".join(members[0].split(".")[:depth]), members, layers):
        return prefix, (prefix,)
    modules: list[str] = []
    for member in members:
        child = ".".join(member.split(".")[: depth + 1])
        name = child if _whole(child, members, layers) else member
        if name not in modules:
            modules.append(name)
    return f"{modules[0]} to {modules[-1]}", tuple(modules)


def _whole(prefix: str, members: Sequence[str], layers: Sequence[str]) -> bool:
    """Say whether all layers below a prefix are members."""
    return all(x in members for x in layers if x == prefix or x.startswith(f"{prefix}."))
