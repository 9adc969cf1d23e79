"""Instructions for a small model, a LoRA adapter in minutes on two CPU cores.

    python -m experiments.sft --config configs/sft/instruct.py --model runs/quickstart-... --data.path instructions.json

Any file of messages, of prompts and completions, or of instructions will do. A larger model wants a lower learning rate
(1e-4 to 3e-4) and longer rows.
"""

from experiments.adapter_config import AdapterConfig
from experiments.sft_config import SftConfig
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = SftConfig(
    data=SupervisedConfig(sequence_length=256),
    adapter=AdapterConfig(kind="lora"),
    optimizer=OptimizerConfig(kind="adamw", weight_decay=0.0),
    schedule=ScheduleConfig(kind="cosine", peak=1e-2, warmup_steps=20),
    loop=LoopConfig(steps=300, eval_every=50, sample_every=100),
    checkpoint=CheckpointConfig(every=100),
    batch_size=8,
    neftune=5.0,
)
