"""The mesh, the one table of rules from logical axes to mesh axes, and the printed plan."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("config", "context", "mesh", "planning", "rules", "state"),
    names={
        "config": ["AXES", "MeshShape"],
        "mesh": ["make_mesh", "batch_sharding", "replicated", "check_batch_size", "shard_batch"],
        "rules": ["DEFAULT_RULES", "Rules", "mesh_axes"],
        "planning": ["Plan", "LeafPlan", "plan", "bytes_per_device"],
        "context": ["constrain", "tracing_for"],
        "state": ["optimizer_shardings"],
    },
)
