"""The built-in corpus, the source text of the running Python's standard library, for an hour or so on two CPU cores."""

from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

config = PretrainConfig(
    model=small(FROM_TOKENIZER, num_layers=4, num_heads=4, embed_dim=256, max_length=512),
    data=DataConfig(
        kind="stdlib",
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
        sequence_length=512,
    ),
    optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
    schedule=ScheduleConfig(kind="wsd", peak=3e-3, warmup_steps=50, cooldown_fraction=0.4),
    loop=LoopConfig(steps=2000, eval_every=250, sample_every=500),
    checkpoint=CheckpointConfig(every=250),
    batch_size=8,
    eval_batches=8,
    eval_batch_size=16,
    compare=True,
    sample_prompt="def read(self, ",
)
