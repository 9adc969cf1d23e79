"""The shape of a mesh as configuration: no jax here."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each mesh axis; one of them may be -1, which takes all that are left."""

    data: int = -1
    "Copies of the parameters that split the batch."
    fsdp: int = 1
    "Devices that split the batch and the parameters too (fully sharded data parallelism)."
    tensor: int = 1
    "Devices that split heads, MLP width and vocabulary of one row."

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh axis {axis}={size} must be at least 1, or -1 for all devices left")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"only one mesh axis may be -1, here are {_written(sizes)}")

    def resolve(self, device_count: int) -> tuple[int, int, int]:
        """The three sizes for so many devices.

        Raises:
          UserError: where the product is not the number of devices.

        >>> MeshShape(data=-1, tensor=2).resolve(8)
        (4, 1, 2)
        """
        sizes = dataclasses.asdict(self)
        product = 1
        for size in sizes.values():
            product *= max(size, 1)
        if -1 in sizes.values():
            if device_count % product:
                raise UserError(
                    f"a mesh of {_written(sizes)} does not fit: {device_count} devices are not a multiple "
                    f"of {product}; choose sizes whose product divides {device_count}"
                )
            sizes = {axis: device_count // product if size == -1 else size for axis, size in sizes.items()}
        elif product != device_count:
            raise UserError(
                f"a mesh of {_written(sizes)} needs {product} devices, here are {device_count}; choose sizes "
                f"whose product is {device_count}, or set one of them to -1"
            )
        return sizes["data"], sizes["fsdp"], sizes["tensor"]


def _written(sizes: dict[str, int]) -> str:
    return " × ".join(f"{axis}={size}" for axis, size in sizes.items())
