"""TinyBERT's terms (arXiv:1909.10351): hidden states through a learned projection and attention scores of every layer.

    python -m experiments.distill --config configs/distill/tinybert.py --teacher runs/quickstart --run-dir runs/tiny

The student has as many heads as its teacher and half its width.
"""

from experiments.distill_config import DistillConfig
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = DistillConfig(
    model=small(1, num_layers=2, num_heads=4, embed_dim=64, max_length=256),
    data=DataConfig(kind="stdlib", sequence_length=256, validation_fraction=0.05),
    optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
    schedule=ScheduleConfig(kind="wsd", peak=3e-3, warmup_steps=30, cooldown_fraction=0.5),
    loop=LoopConfig(steps=500, eval_every=100, log_every=10),
    checkpoint=CheckpointConfig(every=100),
    batch_size=8,
    eval_batches=10,
    eval_batch_size=32,
    hard=0.0,
    soft=1.0,
    hidden=0.05,
    hidden_kind="mse",
    hidden_layers="uniform",
    attention=0.02,
    sample_prompt="def read(self, ",
)
