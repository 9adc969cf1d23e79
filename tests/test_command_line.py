from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from lmjax import command_line, config_files, host_memory
from lmjax.errors import UserError
from lmjax.sharding.config import MeshShape


@dataclasses.dataclass(frozen=True)
class Source:
    path: str = "text.txt"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Model:
    """The model."""

    num_layers: int = 4
    "How many blocks."
    activation: Literal["gelu", "swiglu"] = "swiglu"
    window: int | tuple[int, ...] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    tied: bool = True

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers={self.num_layers} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Table:
    vocab_size: int = 65


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains nothing."""

    model: Model | Table = Model()
    mesh: MeshShape = MeshShape()
    sources: tuple[Source, ...] = (Source(), Source(weight=2.0))
    extra: Source | None = None
    name: str = 'a "quoted" name'
    limit: float = math.inf
    seed: int = 0


HEADER = f"from {__name__} import Model, Settings, Source, Table\n"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    # Config files import the classes above by the name of this module.
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Settings.__module__])

    def write(text: str, name: str = "settings.py", header: str = HEADER) -> str:
        path = tmp_path / name
        path.write_text(header + text)
        return str(path)

    return write


def _parse(*argv: str) -> Settings:
    return command_line.parse(Settings(), argv)[0]


def _error(*argv: str, plan: bool = False) -> str:
    with pytest.raises(UserError) as error:
        command_line.parse(Settings(), argv, plan=plan)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_arguments_give_the_default():
    assert _parse() == Settings()


def test_every_kind_of_field_is_an_option():
    config = _parse(
        *(
            "--model.num-layers",
            "6",
            "--model.activation",
            "gelu",
            "--model.no-tied",
            "--model.betas",
            "0.8",
            "1",
        ),
        *(
            "--mesh.data",
            "-1",
            "--mesh.tensor",
            "2",
            "--sources.1.weight",
            "3",
            "--limit",
            "1e-3",
            "--name=x",
        ),
    )
    assert config.model == Model(num_layers=6, activation="gelu", tied=False, betas=(0.8, 1.0))
    assert config.mesh == MeshShape(-1, 1, 2)
    assert config.sources == (Source(), Source(weight=3.0))
    assert (config.limit, config.name, config.seed) == (1e-3, "x", 0)


@pytest.mark.parametrize(("words", "value"), [(["8"], 8), (["None"], None), (["8", "0", "8"], (8, 0, 8))])
def test_a_field_of_several_types(words, value):
    assert _parse("--model.window", *words).model == Model(window=value)


def test_underscores_are_as_good_as_hyphens():
    assert _parse("--model.num_layers", "7").model == Model(num_layers=7)


def test_common_options_reach_the_experiment(config_file):
    seen = []
    path = config_file("config = Settings(seed=3)\n")
    argv = ["--config", path, "--plan", "--run-dir", "runs/a", "--seed", "4"]
    command_line.main(lambda *given: seen.append(given), Settings(), plan=True, argv=argv)
    expected = command_line.Options(run_dir="runs/a", plan=True, config_path=path)
    assert seen == [(Settings(seed=4), expected)]


def test_plan_is_offered_only_where_it_is_meant():
    assert command_line.parse(Settings(), ["--plan"], plan=True)[1].plan
    assert "no option --plan" in _error("--plan")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.num-layer", "6"], "no option --model.num-layer; did you mean --model.num-layers?"),
        (["--num-layers", "6"], "did you mean --model.num-layers?"),
        (["--sources.2.weight", "6"], "did you mean --sources.1.weight?"),
        (["--print-confg"], "did you mean --print-config?"),
        (["--zzz"], "no option --zzz; see --help"),
        (["--extra.path", "x"], "--extra.path cannot be set because extra is None here"),
        (["--model.num-layers", "six"], "--model.num-layers"),
        (["--model.num-layers", "0"], "num_layers=0 must be at least 1"),
        (["--model.activation", "relu"], "'gelu', 'swiglu'"),
        (["--seed"], "--seed"),
        (["--mesh.data", "-2"], "data=-2 must be at least 1"),
        (["stray"], "'stray' belongs to no option"),
        (["--config"], "--config needs a file"),
        (["--config", "--plan"], "--config needs a file"),
    ],
)
def test_one_sentence_for_each_mistake(argv, words):
    assert words in _error(*argv)


def test_options_follow_the_config_file(config_file):
    path = config_file("config = Settings(model=Table(9), sources=(Source('a'),), extra=Source('b'))\n")
    config = _parse("--config", path, "--model.vocab-size", "10", "--extra.path", "c")
    assert config == Settings(model=Table(10), sources=(Source("a"),), extra=Source("c"))
    assert _parse(f"--config={path}").model == Table(9)
    # The class of the model is the file's: its options are too.
    assert "no option --model.num-layers" in _error("--config", path, "--model.num-layers", "2")


def test_a_config_file_may_start_from_another(tmp_path, monkeypatch, config_file):
    package = tmp_path / "configs_of_test"
    package.mkdir()
    (package / "base.py").write_text(HEADER + "config = Settings(seed=1, name='base')\n")
    monkeypatch.chdir(tmp_path)
    path = config_file(
        "import dataclasses\nfrom configs_of_test.base import config as base\n"
        "config = dataclasses.replace(base, seed=2)\n"
    )
    before = list(sys.path)
    assert command_line.load_config(path) == Settings(seed=2, name="base")
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = Settings(\n    sed=1)\n", ["Settings has no field sed; did you mean seed?"]),
        ("config = Settings(model=Model(layers=3))\n", ["line 2", "Model has no field layers"]),
        ("config = Settings(model=Model(qqq=3))\n", ["Model has no field qqq", "activation"]),
        ("config = Settings(model=Model(0))\n", ["line 2", "num_layers=0 must be at least 1"]),
        (
            "import dataclasses\nconfig = dataclasses.replace(Settings(), sede=1)\n",
            ["line 3", "Settings has no field sede; did you mean seed?"],
        ),
        ("config = Setings()\n", ["line 2", "Setings"]),
        ("config = (\n", ["line 2", "never closed"]),
        ("from nowhere_at_all import x\n", ["line 2", "nowhere_at_all"]),
        ("conf = Settings()\n", ["has no `config`", "Settings"]),
        ("config = 3\n", ["type int", "Settings"]),
        ("config = Settings\n", ["type type", "Settings"]),
        ("config = Model()\n", ["holds a Model", "takes a Settings"]),
        ("config = Settings(seed='1')\n", ["config.seed is '1', it takes int"]),
        ("config = Settings(seed=True)\n", ["config.seed is True"]),
        ("config = Settings(sources=[Source()])\n", ["config.sources is [", "tuple"]),
        (
            "config = Settings(sources=(Source(weight='2'),))\n",
            ["sources[0].weight is '2', it takes float"],
        ),
        (
            "config = Settings(model=Model(activation='relu'))\n",
            ["config.model.activation is 'relu'", "swiglu"],
        ),
        ("config = Settings(model=Model(betas=(1.0,)))\n", ["config.model.betas is (1.0,)"]),
        ("config = Settings(model=None)\n", ["config.model is None"]),
    ],
)
def test_mistakes_in_config_files(config_file, text, words):
    path = config_file(text)
    message = _error("--config", path)
    for word in (path, *words):
        assert word in message


def test_a_required_field_that_is_missing(config_file):
    path = config_file(
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\n"
        "class Needy:\n    size: int\nconfig = Needy()\n"
    )
    with pytest.raises(UserError, match=r"line 6: Needy needs a value for 'size'"):
        command_line.load_config(path)


def test_a_config_file_that_is_not_there(config_file, tmp_path):
    config_file("config = Settings()\n", name="shakespeare.py")
    assert f"did you mean {tmp_path / 'shakespeare.py'}?" in _error(
        "--config", str(tmp_path / "shakespear.py")
    )
    assert "no config file nowhere/x.py" in _error("--config", "nowhere/x.py")


@pytest.mark.parametrize(
    "config",
    [
        Settings(),
        Settings(model=Table(3), extra=Source("ü\n'\""), sources=(), limit=-math.inf, seed=-1),
        Settings(model=Model(window=(1, 2), betas=(1e-30, 0.1 + 0.2), tied=False), sources=(Source("a"),)),
    ],
)
def test_a_printed_config_reads_back_equal(config, config_file, capsys):
    path = config_file(command_line.format_config(config), header="")
    assert command_line.load_config(path, Settings) == config
    command_line.main(lambda *_: pytest.fail("ran"), Settings(), argv=["--config", path, "--print-config"])
    assert capsys.readouterr().out == Path(path).read_text()


def test_print_config_shows_the_overrides(capsys):
    argv = ["--print-config", "--model.num-layers", "9"]
    command_line.main(lambda *_: pytest.fail("ran"), Settings(), argv=argv)
    assert "        num_layers=9,\n" in capsys.readouterr().out


def test_two_classes_of_one_name_print_apart(tmp_path, monkeypatch, config_file):
    text = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Source:\n    size: int = 1\n"
    (tmp_path / "one_module.py").write_text(text)
    (tmp_path / "two_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    header = "from one_module import Source\nimport two_module, dataclasses\n"
    fields = "[('a', Source, Source()), ('b', two_module.Source, two_module.Source(2))]"
    path = config_file(f"config = dataclasses.make_dataclass('Both', {fields})()\n", header=header)
    pair = command_line.load_config(path)
    text = command_line.format_config((pair.a, pair.b))
    assert "from two_module import Source as Source2\n" in text
    names: dict[str, object] = {}
    exec(text, names)
    assert names["config"] == (pair.a, pair.b)


def test_what_cannot_be_printed_is_named():
    with pytest.raises(UserError, match=r"config\.extra is a function"):
        command_line.format_config(Settings(extra=_parse))

    @dataclasses.dataclass(frozen=True)
    class Inner:
        size: int = 1

    with pytest.raises(UserError, match=r"config\.extra is of the class .*Inner, which is not at the top"):
        command_line.format_config(Settings(extra=Inner()))


def test_a_field_with_the_name_of_a_common_option_is_refused():
    kind = dataclasses.make_dataclass("Clash", [("run_dir", str, "x")], frozen=True)
    with pytest.raises(TypeError, match="run_dir"):
        command_line.parse(kind(), [])


def test_user_errors_end_with_one_line_and_status_2(capsys):
    def experiment(config, options):
        raise UserError("the corpus is empty; give it a text")

    with pytest.raises(SystemExit) as end:
        command_line.main(experiment, Settings(), argv=[])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the corpus is empty; give it a text\n"


@pytest.mark.parametrize(("result", "code"), [(None, None), (0, None), (143, 143)])
def test_the_experiment_chooses_the_exit_status(result, code):
    if code is None:
        command_line.main(lambda *_: result, Settings(), argv=[])
        return
    with pytest.raises(SystemExit) as end:
        command_line.main(lambda *_: result, Settings(), argv=[])
    assert end.value.code == code


def test_an_interrupt_ends_quietly(capsys):
    def experiment(config, options):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command_line.main(experiment, Settings(), argv=[])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


SCRIPT = '''"""An experiment that says which libraries it loaded."""
import dataclasses, sys
from lmjax import command_line
from lmjax.sharding.config import MeshShape

@dataclasses.dataclass(frozen=True)
class Small:
    mesh: MeshShape = MeshShape()
    steps: int = 10
    "How many steps."

def loaded():
    heavy = ("jax", "flax", "optax", "orbax", "grain", "torch", "matplotlib")
    print("heavy:", [name for name in heavy if name in sys.modules], file=sys.stderr)

try:
    command_line.main(lambda config, options: print(config), Small(), plan=True)
finally:
    loaded()
'''


@pytest.mark.parametrize("argv", [["--help"], ["--steps", "3"], ["--step", "3"], ["--print-config"]])
def test_no_heavy_library_is_loaded(tmp_path, argv):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(config_files.__file__).parent.parent),
        "COLUMNS": "100",
    }
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment)
    assert done.stderr.endswith("heavy: []\n")
    assert "Traceback" not in done.stderr
    if argv == ["--help"]:
        assert done.returncode == 0
        for word in (
            "An experiment that says",
            "--config FILE",
            "--plan",
            "--mesh.tensor INT",
            "How many steps.",
        ):
            assert word in done.stdout
    if argv[0] == "--step":
        assert done.returncode == 2
        assert done.stderr.startswith("error: there is no option --step; did you mean --steps?\n")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_an_experiment_runs_with_an_allocator_that_keeps_memory(tmp_path):
    """Restarted once, with the same arguments and process id; a setting of the user's own is left alone."""
    script = tmp_path / "experiment.py"
    script.write_text(
        "import dataclasses, os, sys\n"
        "from lmjax import command_line, host_memory\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n"
        "    steps: int = 1\n"
        "def run(config, options):\n"
        "    print(config.steps, os.getpid(), os.environ[host_memory.VARIABLE])\n"
        "command_line.main(run, Config())\n"
    )
    bare = {k: v for k, v in os.environ.items() if k != host_memory.VARIABLE}
    for environment, setting in ((bare, host_memory.KEEP), ({**bare, host_memory.VARIABLE: " "}, "")):
        process = subprocess.Popen(
            [sys.executable, str(script), "--steps", "7"], env=environment, stdout=subprocess.PIPE, text=True
        )
        out, _ = process.communicate(timeout=60)
        assert out.split() == ["7", str(process.pid), *setting.split()]
