"""A small new student, half of whose steps are taken on what it says itself (GKD, arXiv:2306.13649).

    python -m experiments.distill --config configs/distill/gkd.py --teacher runs/quickstart --run-dir runs/gkd
"""

from experiments.distill_config import DistillConfig
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = DistillConfig(
    model=small(1, num_layers=2, num_heads=4, embed_dim=96, max_length=256),
    data=DataConfig(kind="stdlib", sequence_length=128, validation_fraction=0.05),
    optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
    schedule=ScheduleConfig(kind="wsd", peak=3e-3, warmup_steps=30, cooldown_fraction=0.5),
    loop=LoopConfig(steps=500, eval_every=100, log_every=10),
    checkpoint=CheckpointConfig(every=100),
    batch_size=16,
    eval_batches=10,
    eval_batch_size=32,
    hard=0.2,
    soft=0.8,
    beta=0.5,
    on_policy=0.5,
    sample_prompt="def read(self, ",
)
