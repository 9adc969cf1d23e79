"""Eight CPU devices, a compilation cache that survives the run, and the fixtures that every room shares.

The settings are environment variables, set before jax is imported, so that subprocesses have them too.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jax.sharding import Mesh

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))


def _cpu() -> str:
    """A short name of this CPU: compiled code of one model must not be loaded by another."""
    try:
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(wanted)]
        text = "\n".join(sorted(set(lines)))
    except OSError:
        text = ""
    return hashlib.sha256((text or platform.processor() or platform.machine()).encode()).hexdigest()[:8]


def _set_environment() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_X64"] = "0"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={DEVICES}"
    # Three quarters of the suite's time would be LLVM at work on programs that run for a millisecond.
    # JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the tests as users compile.
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
        if version < (0, 11) and "xla_cpu_use_fusion_emitters" not in flags:  # later ones lack the flag
            flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()
    python = ".".join(map(str, sys.version_info[:2]))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / f"jax-{python}-{_cpu()}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("MPLBACKEND", "Agg")


assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could choose its devices"
_set_environment()


PROGRAMS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Frees compiled programs before their memory mappings reach the kernel's limit of 65,530, which ends a process."""
    yield
    if PROGRAMS.exists() and PROGRAMS.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def make_test_mesh() -> Callable[..., Mesh]:
    """Makes a mesh of a (data, fsdp, tensor) shape from as many of the devices as it needs."""

    def make(shape: tuple[int, int, int]) -> Mesh:
        import jax

        from lmjax import sharding

        needed = shape[0] * shape[1] * shape[2]
        if jax.device_count() < needed:
            pytest.skip(f"a mesh of shape {shape} needs {needed} devices, here are {jax.device_count()}")
        return sharding.make_mesh(*shape, devices=jax.devices()[:needed])

    return make


@pytest.fixture(params=MESHES, ids=lambda shape: "x".join(map(str, shape)))
def mesh(request: pytest.FixtureRequest, make_test_mesh: Callable[..., Mesh]) -> Mesh:
    """Each of the four meshes of eight devices that every law must hold on."""
    return make_test_mesh(request.param)


@pytest.fixture
def one_device_mesh(make_test_mesh: Callable[..., Mesh]) -> Mesh:
    return make_test_mesh((1, 1, 1))


@pytest.fixture(scope="session")
def lmjax_data() -> Path:
    """The folder of real texts that some tests read, from the environment variable LMJAX_DATA."""
    folder = os.environ.get("LMJAX_DATA")
    if not folder:
        pytest.skip("set LMJAX_DATA to the folder that holds the texts")
    path = Path(folder)
    assert path.is_dir(), f"LMJAX_DATA={folder} is not a directory"
    return path
