"""The run directory, its records and curves, the progress lines, and the FLOPs they speak of."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.training import flops
from lmjax.training.config import LoopConfig
from lmjax.training.metrics import JsonlWriter, TensorBoardWriter, WandbWriter, read_metrics, truncate_metrics
from lmjax.training.plots import plot_run
from lmjax.training.progress import Progress
from lmjax.training.run_directory import RunDirectory, git_commit, to_json


def test_holds_configuration_and_environment(tmp_path):
    with RunDirectory.open(tmp_path / "a" / "run", LoopConfig(7), config_text="config = 1\n") as run:
        config = json.loads((run.path / "config.json").read_text())
        assert config["steps"] == 7 and config["class"] == "LoopConfig"
        assert (run.path / "config.py").read_text() == "config = 1\n"
        environment = json.loads((run.path / "environment.jsonl").read_text())
        assert environment["packages"]["jax"] == jax.__version__
        assert environment["devices"] == {"kind": "cpu", "count": jax.device_count(), "processes": 1}
    with RunDirectory.open(tmp_path / "a" / "run", LoopConfig(8)):
        pass
    with RunDirectory.open(tmp_path / "a" / "run", LoopConfig(8)) as run:
        assert json.loads((run.path / "config-1.json").read_text())["steps"] == 7
        assert not (run.path / "config-2.json").exists()
        assert len((run.path / "environment.jsonl").read_text().splitlines()) == 3


def test_is_held_by_one_process_at_a_time(tmp_path):
    with RunDirectory.open(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunDirectory.open(tmp_path)
    RunDirectory.open(tmp_path).close()


def test_a_path_that_cannot_be_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        RunDirectory.open(tmp_path / "file" / "run")


def test_configurations_become_json():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        shape: tuple = (1, 2)

    value = {"inner": Inner(), "dtype": jnp.bfloat16, "number": np.float32(0.5), "path": Path("a")}
    as_json = to_json(value)
    assert as_json["inner"] == {"class": "Inner", "shape": [1, 2]} and as_json["number"] == 0.5
    json.dumps(as_json)


def test_git_commit_of_a_repository_and_of_none(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True, capture_output=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == commit + "+changes"


def test_records_are_exact_truncated_and_never_half(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    loss = float(np.float32(1) / 3)
    writer.write(1, {"loss": loss})
    writer.write(2, {"loss": math.nan})
    assert read_metrics(path)[0] == {"step": 1, "loss": loss}, "not flushed, or rounded"
    assert read_metrics(path)[1] == {"step": 2, "loss": None}
    writer.write(3, {"loss": 1.0})
    writer.write(3, {"validation/loss": 2.0})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 3]
    truncate_metrics(path, 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert path.read_text().count("\n") == 2
    assert read_metrics(tmp_path / "none") == []
    truncate_metrics(tmp_path / "none", 2)


def records(steps=300):
    return [
        {
            "step": step,
            "loss": 1.5 + 3 / (1 + step / 20),
            "learning_rate": 1e-3 * min(1, step / 50),
            "grad_norm": 1 + 5 / step,
            "tokens_per_second": 1e4 + step % 7,
        }
        for step in range(1, steps)
    ] + [{"step": 100 * i, "validation/loss": 2.0 / i} for i in (1, 2)]


def test_plots_what_there_is(tmp_path):
    from matplotlib.image import imread

    files = plot_run(records(), tmp_path, "a run")
    names = ["loss", "learning_rate", "gradient_norm", "throughput", "overview"]
    assert [file.name for file in files] == [f"{name}.png" for name in names]
    for file in files:
        image = imread(file)
        assert image.shape[1] > 600 and image.std() > 0.02, "a blank picture"
    assert [file.name for file in plot_run([{"step": 1, "loss": 2.0}], tmp_path / "one")] == [
        "loss.png",
        "overview.png",
    ]
    assert plot_run([], tmp_path / "none") == []
    assert plot_run([{"step": 1, "loss": None}], tmp_path / "nan") == []
    assert plot_run([{"step": 1, "loss": -1.0, "grad_norm": 0.0}], tmp_path / "negative")


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert any(file.stat().st_size > 50 for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "package, make", [("tensorboardX", TensorBoardWriter), ("wandb", lambda d: WandbWriter("p", d))]
)
def test_a_missing_tracker_is_one_sentence(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"install it with `pip install lmjax\[tracking\]`"):
        make(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_elsewhere():
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress(10, 0, stream=stream)
        for step in range(1, 11):
            progress.advance(step)
            progress.update(step, {"loss": 2.5, "tokens_per_second": 1234.0})
        progress.say("a line of its own [brackets]")
        progress.close()
        text = stream.getvalue()
        assert "loss 2.5000" in text and "1,234 tokens/s" in text and "MFU unknown hardware" in text
        assert "a line of its own [brackets]" in text
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("step 1/10") and lines[1].startswith("step 10/10") and len(lines) == 3


GPT2 = dict(
    vocab_size=50257, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=3072,
    gated_mlp=False,
)  # fmt: skip


def test_flops_count_the_products_of_a_model_written_out():
    """6 a matrix parameter, by XLA's own count of a forward pass: 2 for each of three passes."""
    V, D, F, T, H, K, G = 97, 64, 160, 32, 4, 16, 2

    def forward(weights, x, head):
        q, k, v, o, gate, up, down = weights
        x = x @ q @ o + (x @ k @ v.T)  # each matrix once, as attention does, without the scores
        x = (x @ gate * (x @ up)) @ down
        return x @ head

    shapes = [(D, H * K), (D, G * K), (D, G * K), (H * K, D), (D, F), (D, F), (F, D)]
    weights = [jnp.zeros(shape) for shape in shapes]
    cost = jax.jit(forward).lower(weights, jnp.zeros((T, D)), jnp.zeros((D, V))).compile().cost_analysis()
    expected = (
        2
        * T
        * flops.matmul_parameters(
            vocab_size=V,
            num_layers=1,
            embed_dim=D,
            num_heads=H,
            num_kv_heads=G,
            head_dim=K,
            mlp_dim=F,
            gated_mlp=True,
        )
    )
    assert expected <= cost["flops"] <= 1.02 * expected  # XLA adds the additions


def test_attention_is_counted_once_and_within_its_window():
    def attention(T, window=None):
        return flops.flops_per_token(**GPT2, context_length=T, window=window) - 6 * flops.matmul_parameters(**GPT2)

    # Scores and values of T (T + 1) / 2 pairs, 2 operations each, three passes; a T-th of it is a token's.
    exact = 12 * 3 * 2 * 2 * 768 * (1024 * 1025 / 2) / 1024
    assert attention(1024) == pytest.approx(exact, rel=2e-3)
    pairs = sum(min(i + 1, 128) for i in range(1024)) / 1024
    assert attention(1024, 128) == pytest.approx(12 * 3 * 2 * 2 * 768 * pairs, rel=1e-2)
    assert attention(1024, 1024) == attention(1024, 5000) == attention(1024)
    assert attention(1024, [128, None] * 6) == pytest.approx((attention(1024) + attention(1024, 128)) / 2)
    assert flops.flops_per_token(**GPT2, context_length=1024) == pytest.approx(0.80e9, rel=0.01)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA L4", 121e12), ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("cpu", None),
        ("NVIDIA GT 710", None),
    ],
)  # fmt: skip
def test_peaks_of_devices(kind, peak):
    assert flops.peak_flops(kind) == peak


def test_mfu_of_unknown_hardware_is_unknown():
    assert flops.mfu(1e6, 1e9, 2, None) is None
    assert flops.mfu(1e6, 1e9, 2, 1e15) == 0.5
