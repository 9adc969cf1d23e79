"""One table from logical axis names to mesh axes."""

from __future__ import annotations

from collections.abc import Sequence

from lmjax.errors import UserError

MeshAxes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, MeshAxes]]

# Megatron's split of each block over `tensor` (Shoeybi et al. 2019: heads, MLP width and vocabulary, one
# all-reduce a sublayer) and ZeRO-3's split of every matrix over `fsdp` (Rajbhandari et al. 2020).
DEFAULT_RULES: tuple[tuple[str, MeshAxes], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("positions", None),
    ("norm", None),
)


def mesh_axes(rules: Rules, axis: str | None, leaf: str = "") -> tuple[str, ...]:
    """The mesh axes that split a logical axis; () leaves it whole. The first rule of that name counts.

    Raises:
      UserError: where no rule has that name. An axis that is to stay whole says so with None.

    >>> mesh_axes(DEFAULT_RULES, "batch"), mesh_axes(DEFAULT_RULES, "norm"), mesh_axes(DEFAULT_RULES, None)
    (('data', 'fsdp'), (), ())
    """
    if axis is None:
        return ()
    for name, target in rules:
        if name == axis:
            return (target,) if isinstance(target, str) else tuple(target or ())
    subject = f"the logical axis {axis!r}" + (f" of {leaf}" if leaf else "")
    known = ", ".join(sorted({name for name, _ in rules}))
    raise UserError(
        f"no sharding rule names {subject} (they name: {known}); add ({axis!r}, a mesh axis or None)"
    )
