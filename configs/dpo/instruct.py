"""Preferences for a small model that was fine-tuned before, a LoRA adapter in minutes on two CPU cores.

    python -m experiments.dpo --config configs/dpo/instruct.py --model runs/instruct-... --data.path preferences.json

Records have a prompt (or instruction and input), a chosen and a rejected answer.
"""

from experiments.adapter_config import AdapterConfig
from experiments.dpo_config import DpoConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = DpoConfig(
    data=PreferenceConfig(max_length=192),
    objective="dpo(beta=0.1) + 0.2 * chosen_nll()",
    adapter=AdapterConfig(kind="lora"),
    optimizer=OptimizerConfig(kind="adamw", weight_decay=0.0),
    schedule=ScheduleConfig(kind="cosine", peak=1e-3, warmup_steps=20),
    loop=LoopConfig(steps=200, eval_every=25, sample_every=100),
    checkpoint=CheckpointConfig(every=100),
    batch_size=8,
)
