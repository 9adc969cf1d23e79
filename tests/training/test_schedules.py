"""Schedules against their closed forms, written out again in plain Python."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.training.config import ScheduleConfig
from lmjax.training.schedules import make_schedule

P, W, T = 0.02, 10, 100


def closed_form(kind: str, i: int, f: float) -> float:
    if i < W:
        return P * (i + 1) / W
    u = min((i - W) / (T - W), 1.0)
    if kind == "constant":
        return P
    if kind == "cosine":
        return P * (f + (1 - f) * (1 + math.cos(math.pi * u)) / 2)
    if kind == "linear":
        return P * (1 - (1 - f) * u)
    if kind == "step":
        return P * 0.5 ** ((i >= 40) + (i >= 80))
    if kind == "inverse_sqrt":
        return P * math.sqrt(W / (i + 1))
    v = min(max(i - 70, 0) / 30, 1.0)
    shape = {"wsd linear": v, "wsd cosine": (1 - math.cos(math.pi * v)) / 2, "wsd sqrt": math.sqrt(v)}[kind]
    return P * (1 - (1 - f) * shape)


CONFIGS = {
    "constant": (ScheduleConfig("constant", P, W), 0),
    "cosine": (ScheduleConfig("cosine", P, W), 0.1),
    "cosine to 0.3": (ScheduleConfig("cosine", P, W, final_fraction=0.3), 0.3),
    "linear": (ScheduleConfig("linear", P, W), 0.0),
    "linear to 0.2": (ScheduleConfig("linear", P, W, final_fraction=0.2), 0.2),
    "step": (ScheduleConfig("step", P, W, milestones=(0.4, 0.8), factor=0.5), 0),
    "inverse_sqrt": (ScheduleConfig("inverse_sqrt", P, W), 0),
    "wsd linear": (ScheduleConfig("wsd", P, W, cooldown_fraction=0.3), 0.0),
    "wsd cosine": (
        ScheduleConfig("wsd", P, W, cooldown_fraction=0.3, cooldown_shape="cosine", final_fraction=0.1),
        0.1,
    ),
    "wsd sqrt": (ScheduleConfig("wsd", P, W, cooldown_fraction=0.3, cooldown_shape="sqrt"), 0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_closed_form_at_every_step(name):
    config, fraction = CONFIGS[name]
    steps = np.arange(T + 20)
    got = jax.jit(jax.vmap(make_schedule(config, T)))(steps)
    expected = [closed_form(name.split(" to ")[0], int(i), fraction) for i in steps]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-9)
    assert got.dtype == jnp.float32
    assert float(make_schedule(config, T)(37)) == pytest.approx(expected[37], rel=2e-5)


def test_without_warmup_starts_at_the_peak_and_never_trains_at_zero():
    for kind in ("constant", "cosine", "linear", "step", "wsd", "inverse_sqrt"):
        schedule = make_schedule(ScheduleConfig(kind, P, 0), T)
        assert float(schedule(0)) == pytest.approx(P)
        assert float(schedule(T - 1)) > 0


def test_total_steps_of_the_configuration_goes_before_that_of_the_run():
    schedule = make_schedule(ScheduleConfig("linear", P, 0, total_steps=50), 100)
    assert float(schedule(25)) == pytest.approx(P / 2) and float(schedule(60)) == 0.0


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(kind="cosinus"), "choose one of constant, cosine"),
        (dict(kind="cosine", factor=0.5), "factor is read by step and not by cosine"),
        (dict(kind="constant", final_fraction=0.5), "final_fraction is read by"),
        (dict(kind="constant", total_steps=500), "total_steps has no meaning"),
        (dict(peak=0.0), "peak must be positive"),
        (dict(kind="step", milestones=(0.5, 0.4)), "increasing"),
        (dict(total_steps=10, warmup_steps=10), "more than warmup_steps"),
        (dict(final_fraction=1.5), "between 0 and 1"),
        (dict(kind="wsd", cooldown_shape="square"), "linear, cosine or sqrt"),
    ],
)
def test_refuses_what_has_no_meaning(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        ScheduleConfig(**fields)


def test_refuses_a_warmup_longer_than_the_run():
    with pytest.raises(UserError, match="100 warmup steps and the run only 50"):
        make_schedule(ScheduleConfig("cosine", P, 100), 50)


def test_every_field_changes_the_schedule():
    def curve(config):
        return np.asarray(jax.vmap(make_schedule(config, T))(np.arange(T)))

    changes = {
        "cosine": dict(peak=0.03, warmup_steps=20, total_steps=80, final_fraction=0.5),
        "step": dict(milestones=(0.3, 0.9), factor=0.3),
        "wsd": dict(cooldown_fraction=0.5, cooldown_shape="sqrt", final_fraction=0.5),
    }
    for kind, fields in changes.items():
        base = curve(ScheduleConfig(kind, P, W))
        for name, value in fields.items():
            changed = ScheduleConfig(**{"kind": kind, "peak": P, "warmup_steps": W, name: value})
            assert not np.allclose(curve(changed), base, rtol=1e-3), name
