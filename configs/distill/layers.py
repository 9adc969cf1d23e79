"""A student of every other layer of its teacher, as DistilBERT is made, in a few minutes on two CPU cores.

    python -m experiments.distill --config configs/distill/layers.py --teacher runs/quickstart --run-dir runs/half

It learns the text, the teacher's softened distribution over it, and the direction of the teacher's last hidden states.
The text is held out as in the quickstart, so that the teacher has not seen what both are scored on.
"""

from experiments.distill_config import DistillConfig
from lmjax.data.config import DataConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = DistillConfig(
    student="teacher",
    data=DataConfig(kind="stdlib", sequence_length=256, validation_fraction=0.05),
    optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
    schedule=ScheduleConfig(kind="wsd", peak=2e-3, warmup_steps=20, cooldown_fraction=0.5),
    loop=LoopConfig(steps=300, eval_every=100, log_every=10),
    checkpoint=CheckpointConfig(every=100),
    batch_size=8,
    eval_batches=10,
    eval_batch_size=32,
    hard=0.3,
    soft=0.5,
    temperature=2.0,
    hidden=0.2,
    sample_prompt="def read(self, ",
)
