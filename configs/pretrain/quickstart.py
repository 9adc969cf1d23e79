"""A language model of Python source in a few minutes on two CPU cores.

The text is that of the running Python's own standard library, so nothing is downloaded. It ends with the bits a
byte of held-out modules, before and after, beside those of bigram counts and of gzip.
"""

from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = PretrainConfig(
    model=small(FROM_TOKENIZER, num_layers=4, num_heads=4, embed_dim=128, max_length=256),
    data=DataConfig(
        kind="stdlib",
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=2048),
        sequence_length=256,
        validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
    schedule=ScheduleConfig(kind="wsd", peak=4e-3, warmup_steps=50, cooldown_fraction=0.5),
    loop=LoopConfig(steps=750, eval_every=375, log_every=10),
    checkpoint=CheckpointConfig(every=375),
    batch_size=8,
    eval_batches=0,
    eval_batch_size=32,
    compare=True,
    sample_prompt="def read(self, ",
    sample_tokens=200,
)
