"""A reward model on a small model that was fine-tuned before, in minutes on two CPU cores.

    python -m experiments.reward_model --config configs/reward/instruct.py --model runs/instruct-... \\
      --data.path preferences.json

With a thousand pairs it learns them by heart soon after: hence the dropout and the few steps.
"""

from experiments.adapter_config import AdapterConfig
from experiments.reward_model_config import RewardModelConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = RewardModelConfig(
    data=PreferenceConfig(kind="pairs", max_length=192),
    adapter=AdapterConfig(kind="lora", rank=16, dropout=0.1),
    optimizer=OptimizerConfig(kind="adamw", weight_decay=0.0),
    schedule=ScheduleConfig(kind="cosine", peak=4e-3, warmup_steps=10),
    loop=LoopConfig(steps=150, eval_every=25),
    checkpoint=CheckpointConfig(every=50),
    batch_size=8,
)
