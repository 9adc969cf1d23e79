"""Training: state, step, loop, optimizers and schedules, checkpoints, metrics, the run directory."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "adafactor",
        "checkpoint",
        "checkpoint_files",
        "checkpoint_trees",
        "config",
        "flops",
        "layers",
        "loop",
        "metrics",
        "muon",
        "optimizers",
        "part_checkpoint",
        "plots",
        "prefetch",
        "progress",
        "recording",
        "reference",
        "run_directory",
        "schedules",
        "state",
        "step",
    ),
    names={
        "checkpoint": ["Checkpointer", "Restored", "load_part", "read_metadata"],
        "config": ["CheckpointConfig", "LoopConfig", "OptimizerConfig", "ScheduleConfig"],
        "flops": ["flops_per_token", "matmul_parameters", "mfu", "peak_flops"],
        "loop": ["Hook", "RunResult", "resume", "run"],
        "metrics": ["JsonlWriter", "TensorBoardWriter", "WandbWriter", "read_metrics"],
        "part_checkpoint": ["PartCheckpointer"],
        "optimizers": ["lora_plus", "make_optimizer"],
        "reference": ["Following", "reference_of", "with_reference"],
        "run_directory": ["RunDirectory"],
        "schedules": ["make_schedule"],
        "state": ["TrainState", "init_state", "new_state"],
        "step": ["make_step"],
    },
)
