"""Checkpoints of everything a run needs to go on: state, position in the data, metadata; written by Orbax.

All three are committed together by one rename, in the background, from a copy taken before `save` returns, so
that the step may donate the state at once. A process killed at any moment leaves the earlier checkpoints as
they were.

On disk the state is a nested dict keyed by the names in its tree, always with one entry a layer. It does not
depend on how layers were run, on the device mesh, or on the classes that an optimizer keeps its state in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import __version__
from lmjax.errors import UserError
from lmjax.training import checkpoint_files as files
from lmjax.training.checkpoint_files import pick_step, read_metadata, step_folder, steps
from lmjax.training.checkpoint_trees import in_order, insert, place, restore_tree, shapes_of, signature, to_nested
from lmjax.training.config import CheckpointConfig

__all__ = ["Checkpointer", "Restored", "load_part", "pick_step", "read_metadata", "steps"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: steps made when it was saved.
      state: the state, in the structure, types and shardings of the target.
      data_state: position in the data, as given to `save`.
      metadata: as `read_metadata` returns it.
    """

    step: int
    state: Any
    data_state: Any
    metadata: dict[str, Any]


_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # what damaged metadata can raise


class Checkpointer:
    """Writes and reads the checkpoints of one run. As a context manager it waits for the last write.

    Args:
      directory: the folder that holds the checkpoints; made at the first save.
      config: what is kept, and whether writes happen in the background.
      to_disk: from the state to the tree on disk, `lmjax.models.layout.unstack_layers`; None for no change.
        Called on the whole state with NumPy leaves, and traced by `jax.eval_shape`.
      from_disk: the inverse, `lmjax.models.layout.stack_layers`. Called only if `to_disk` changes the
        structure of the state at hand.
    """

    def __init__(
        self,
        directory: Path | str,
        config: CheckpointConfig | None = None,
        *,
        to_disk: Callable[[Any], Any] | None = None,
        from_disk: Callable[[Any], Any] | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.config = config or CheckpointConfig()
        self._to_disk, self._from_disk = to_disk, from_disk
        self._orbax: Any = None
        self._layouts: dict[Any, bool] = {}
        self._writing: int | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # an error already on its way out tells more
                raise

    def save(
        self,
        step: int,
        state: Any,
        data_state: Any = None,
        *,
        metric: float | None = None,
        config: Any = None,
    ) -> None:
        """Writes a checkpoint. When this returns the arrays are copied, and the state may be donated.

        Waits for the write before this one, then removes checkpoints that are no longer to be kept. A step
        that has a complete checkpoint already is left as it is.

        Args:
          step: steps made so far.
          state: any pytree of arrays; random keys as raw key data.
          data_state: position in the data, as JSON values.
          metric: what `keep_best` goes by, if known at this step.
          config: the configuration of the run, as JSON values; `read_metadata` gives it back.

        Raises:
          UserError: if this or the write before it failed, as on a full disk. Earlier checkpoints are intact.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in steps(self.directory):
            return
        if self._orbax is None:
            self._start(ocp)
        tree = to_nested(self._disk_tree(state))
        self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        metadata = {
            "step": step,
            "metric": None if metric is None or not np.isfinite(metric) else float(metric),
            "best_mode": self.config.best_mode,
            "lmjax": __version__,
            "config": config,
            "leaves": signature(tree),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave(metadata),
        )
        self._writing = step
        with self._reporting():
            self._orbax.save(step_folder(self.directory, step), items)
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete, then removes those no longer to be kept."""
        if self._writing is None:
            return
        with self._reporting():
            self._orbax.wait_until_finished()
        self._writing = None
        files.prune(self.directory, self.config.keep_last, self.config.keep_best)

    def close(self) -> None:
        """Waits for the last write and ends the writing thread."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax, orbax = None, self._orbax
                orbax.close()

    def check(self, target: Any) -> None:
        """Refuses a target that the newest readable checkpoint does not fit; reads its metadata only.

        Raises:
          UserError: naming a leaf, what it is there and here, and the mend.
        """
        for step in reversed(steps(self.directory)):
            try:
                metadata = files.read_json(self.directory, step, "meta")
                leaves = metadata["leaves"]
            except _UNREADABLE:
                continue  # `restore` warns of it
            files.compare_leaves(leaves, self._target_signature(target), self._name(step))
            return

    def restore(self, target: Any) -> Restored | None:
        """Reads the newest complete checkpoint; None if there is no checkpoint.

        A checkpoint that turns out to be damaged is passed over, with a warning, for the one before it.

        Args:
          target: a state, or its `jax.ShapeDtypeStruct`s. Leaves that have a sharding are read onto it,
            whatever sharding they were saved from.

        Raises:
          UserError: if the checkpoint is of another model or optimizer, or if none can be read.
        """
        self.wait()
        found = list(reversed(steps(self.directory)))
        for step in found:
            try:
                metadata = files.read_json(self.directory, step, "meta")
                data_state = files.read_json(self.directory, step, "data")
                leaves = metadata["leaves"]
            except _UNREADABLE as error:
                self._warn_damaged(step, error)
                continue
            files.compare_leaves(leaves, self._target_signature(target), self._name(step))
            try:
                state = self._read(step, target)
            except Exception as error:  # whatever the storage library makes of damaged bytes
                self._warn_damaged(step, error)
                continue
            return Restored(step, state, data_state, metadata)
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.directory} can be read: "
                "remove that folder to start anew"
            )
        return None

    def _name(self, step: int) -> str:
        return str(step_folder(self.directory, step))

    def _warn_damaged(self, step: int, error: Exception) -> None:
        message = f"checkpoint {self._name(step)} is damaged and is passed over ({_reason(error)})"
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _start(self, ocp: Any) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot make the checkpoint folder {self.directory}: {reason}") from error
        files.remove_leftovers(self.directory)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"a checkpoint needs up to {needed / 1e6:,.0f} MB and {self.directory} has {free / 1e6:,.0f} "
                "MB left: free some space or choose another run directory (earlier checkpoints are intact)"
            )

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns a failed write into one sentence, and removes what it had written so far."""
        try:
            yield
        except Exception as error:
            step, self._writing = self._writing, None
            files.remove_leftovers(self.directory)
            raise UserError(
                f"checkpoint {self._name(step or 0)} could not be written ({_reason(error)}): free some "
                "space or choose another run directory (earlier checkpoints are intact)"
            ) from error

    def _changes_layout(self, state: Any) -> bool:
        """Whether `to_disk` makes another tree of this state."""
        if self._to_disk is None:
            return False
        structure: Any = jax.tree.structure(state)
        if structure not in self._layouts:
            disk = jax.eval_shape(self._to_disk, shapes_of(state))
            self._layouts[structure] = jax.tree.structure(disk) != structure
        return self._layouts[structure]

    def _disk_tree(self, state: Any) -> Any:
        if not self._changes_layout(state):
            return state
        assert self._to_disk is not None
        arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
        if all(leaf.is_fully_addressable for leaf in arrays):
            # On the host the layers are views of one copy; on the device they would be another copy of the
            # state.
            state = jax.device_get(state)
        return self._to_disk(state)

    def _target_signature(self, target: Any) -> dict[str, Any]:
        shapes = shapes_of(target)
        if self._to_disk is not None:
            shapes = jax.eval_shape(self._to_disk, shapes)
        return signature(to_nested(shapes))

    def _read(self, step: int, target: Any) -> Any:
        if not self._changes_layout(target):
            tree = restore_tree(step_folder(self.directory, step), to_nested(target))
            state = jax.tree.unflatten(jax.tree.structure(target), in_order(tree, target))
            return jax.tree.map(lambda x, t: x if isinstance(x, jax.Array) else place(x, t), state, target)
        assert self._to_disk is not None and self._from_disk is not None
        disk = jax.eval_shape(self._to_disk, shapes_of(target))
        tree = restore_tree(step_folder(self.directory, step), to_nested(disk))
        state = self._from_disk(jax.tree.unflatten(jax.tree.structure(disk), in_order(tree, disk)))
        return jax.tree.map(place, state, target)


def load_part(directory: Path | str, part: str = "variables", step: int | str | None = None) -> Any:
    """One part of a checkpoint, such as "variables" or "ema", without the bytes of the rest.

    Args:
      directory: the folder that holds the checkpoints.
      part: a name at the top of the state, or a path of names joined by "/".
      step: None for the newest, "best", or a step.

    Returns:
      A nested dict of NumPy arrays, with one entry a layer.

    Raises:
      UserError: if there is no such checkpoint or part, or it cannot be read.
    """
    step = pick_step(directory, step)
    leaves = read_metadata(directory, step)["leaves"]
    folder = step_folder(Path(directory).absolute(), step)
    wanted: dict[str, Any] = {}
    for path, (dtype, shape) in leaves.items():
        if path.startswith(part + "/"):
            insert(wanted, path.split("/"), jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)))
    if not wanted:
        have = ", ".join(sorted({path.split("/")[0] for path in leaves}))
        raise UserError(f"checkpoint {folder} has no part {part!r}: it has {have}")
    try:
        tree = restore_tree(folder, wanted, partial=True)
    except Exception as error:
        raise UserError(f"checkpoint {folder} is damaged ({_reason(error)}): choose another step") from error
    for name in part.split("/"):
        tree = tree[name]
    return tree


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}" if str(error) else type(error).__name__
