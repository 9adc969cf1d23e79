"""nanoGPT's recipe for a CPU: 4 layers of 4 heads and width 128, context 64, batch 12, 2,000 steps, characters.

    python -m experiments.pretrain --config configs/pretrain/text.py --data.path input.txt --run-dir runs/text

Its README puts a run of this size on Shakespeare's plays at a validation loss of 1.88 nats a character.
"""

from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = PretrainConfig(
    model=small(FROM_TOKENIZER, num_layers=4, num_heads=4, embed_dim=128, max_length=64),
    data=DataConfig(
        tokenizer=TokenizerConfig(kind="char"),
        sequence_length=64,
        packing="crop",
        split="position",
        document_markers=False,
    ),
    optimizer=OptimizerConfig(kind="adamw", weight_decay=0.1),
    schedule=ScheduleConfig(kind="cosine", peak=3e-3, warmup_steps=100),
    loop=LoopConfig(steps=2000, eval_every=250, log_every=20),
    checkpoint=CheckpointConfig(every=1000),
    batch_size=12,
    eval_batches=0,
    eval_batch_size=96,
    sample_tokens=300,
)
