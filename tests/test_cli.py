"""The command line, called as a shell calls it: arguments in; standard output, standard error and exit code out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer.main
import yaml
from PIL import Image

from qhyvit import __version__, cli
from qhyvit.store import load
from tiny import SIDE, pictures

TINY = ("tiny:Tiny", "--input-size", str(SIDE))
QUICK = ("quantize", *TINY, "--method", "mse")  # the default method searches, which takes seconds
SCORES = {"top1", "top5", "agreement", "sqnr_db", "pictures"}
COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """One JSON value on one line, and nothing else."""
        assert self.code == 0, self.err
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What a user's error prints: one line, after what was said on the way."""
        assert self.code == 2
        assert not self.out
        assert "Traceback" not in self.err
        last = self.err.rstrip("\n").splitlines()[-1]
        assert last.startswith("qhyvit: ")
        assert last.endswith(".")
        return last


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["qhyvit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures for the tiny net."""
    return pictures(tmp_path_factory.mktemp("data") / "data.npz", labels=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder that `qhyvit quantize` wrote; in a process of its own, so that what libraries print shows too."""
    out = tmp_path_factory.mktemp("result") / "out"
    command = [sys.executable, "-m", "qhyvit.cli", "quantize", *TINY, "--calib", str(data)]
    command += ["--data", str(data), "-o", str(out), "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    scores = Result(done.returncode, done.stdout, done.stderr).json
    assert scores["folder"] == str(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# Help -------------------------------------------------------------------------------------------------------------


def test_the_commands_are_listed(run: Run) -> None:
    found = run("--help")
    assert found.code == 0
    assert {"quantize", "evaluate", "verify", "bench", "export", "models", "methods", "targets"} <= set(COMMANDS)
    assert all(command in found.out for command in COMMANDS)
    assert "Usage" in run().out + run().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_by_example(command: str, run: Run) -> None:
    found = run(command, "--help")
    assert found.code == 0
    text = " ".join(found.out.split())
    assert "Example" in text
    assert f"qhyvit {command}" in text.partition("Example")[2]
    assert "--json" in text


def test_the_version(run: Run) -> None:
    assert run("--version").out.strip() == __version__


# On the net that ships with the package ---------------------------------------------------------------------------


def test_the_demo_net_from_quantization_to_export(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    found = run("quantize", "--method", "mse", "--calib-size", 4, "--limit", 6, "-o", out, "--json").json
    assert found.keys() == {"float", "simulated", "deployed", "verification", "latency", "folder"}
    assert found["float"]["pictures"] == found["deployed"]["pictures"] == found["verification"]["pictures"] == 6
    assert found["float"]["top1"] >= 0.5
    assert found["deployed"]["agreement"] >= 0.5
    assert found["deployed"]["bytes"] < 0.4 * found["float"]["bytes"]
    assert json.loads((out / "metrics.json").read_text()) == found

    scores = run("evaluate", out, "--limit", 6, "--json").json
    assert scores.keys() == {"float", "simulated", "deployed"}
    for name, row in scores.items():
        assert row.keys() == SCORES
        assert {key: found[name][key] for key in SCORES} == row

    checked = run("verify", out, "--limit", 6, "--json").json
    assert checked.keys() >= {"sqnr_db", "top1_agreement", "integer_ops", "float_ops"}
    assert checked == found["verification"]
    assert checked["integer_ops"] >= 90

    timed = run("bench", out, "--runs", 2, "--json").json
    assert timed.keys() == {"float_ms", "integer_ms", "speedup", "threads", "runs"}
    assert (timed["runs"], timed["threads"]) == (2, 1)

    written = run("export", out, "-o", tmp_path / "new" / "net.onnx", "--json").json
    assert written == {"file": str(tmp_path / "new" / "net.onnx"), "bytes": (out / "model.onnx").stat().st_size}
    assert (tmp_path / "new" / "net.onnx").read_bytes() == (out / "model.onnx").read_bytes()


# Results ----------------------------------------------------------------------------------------------------------


def test_tables_for_people(result: Path, data: Path, run: Run) -> None:
    found = run("evaluate", result, "--data", data)
    assert found.code == 0
    for word in ("float", "simulated", "deployed", "top-1", "24 pictures"):
        assert word in found.out
    assert "sqnr_db" in run("verify", result, "--data", data).out
    assert "speedup" in run("bench", result, "--runs", 1).out


def test_a_float_model_alone(data: Path, run: Run) -> None:
    found = run("evaluate", *TINY, "--data", data, "--json").json
    assert found["float"].keys() == SCORES
    assert found["float"]["pictures"] == 24
    assert found["simulated"] is found["deployed"] is None


def test_a_limit_holds(result: Path, data: Path, run: Run) -> None:
    for command in ("evaluate", "verify"):
        found = run(command, result, "--data", data, "--limit", 5, "--json").json
        assert found.get("float", found)["pictures"] == 5


def test_export_of_the_float_model(result: Path, tmp_path: Path, run: Run) -> None:
    assert run("export", result, "--float", "-o", tmp_path / "f.onnx").code == 0
    kinds = {node.op_type for node in onnx.load(tmp_path / "f.onnx").graph.node}
    assert "Conv" in kinds
    assert "QuantizeLinear" not in kinds


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "models",
            {
                "demo",
                "mobilevit_xxs",
                "mobilevitv2_050",
                "efficientformer_l1",
                "efficientformerv2_s0",
                "mobile_former_26m",
            },
        ),
        ("methods", {"minmax", "percentile", "mse", "kl"}),
        ("targets", {"onnxruntime", "simulate"}),
    ],
)
def test_lists(command: str, names: set[str], run: Run) -> None:
    rows = run(command, "--json").json
    assert names <= {row["name"] for row in rows}
    assert len({row["name"] for row in rows}) == len(rows)
    shown = run(command)
    assert shown.code == 0
    assert all(name in shown.out for name in names)


# Options ----------------------------------------------------------------------------------------------------------


def test_options_reach_the_recipe(tmp_path: Path, data: Path, run: Run) -> None:
    start = tmp_path / "start.yaml"
    start.write_text("seed: 5\nbits: w5a5\noverrides: [{match: stem, bits: w8a8}]\n")
    out = tmp_path / "out"
    options = ["--bits", "w6a7", "--method", "percentile", "--percentile", 99, "--scope", "full", "--calib-size", 9]
    more = [
        "--target",
        "simulate",
        "--saturation",
        "reduce-range",
        "--keep-float",
        "head",
        "--keep-float",
        "q*",
        "--bias-correction",
    ]
    found = run(
        "quantize", *TINY, "--recipe", start, "--calib", data, "--data", data, *options, *more, "-o", out, "--json"
    ).json
    assert found["deployed"] is None
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["bits"] == "w6a7"
    assert recipe["method"] == "percentile"
    assert recipe["ranges"]["percentile"] == 99
    assert (recipe["scope"], recipe["target"], recipe["seed"]) == ("full", "simulate", 5)
    assert (recipe["saturation"], recipe["bias_correction"]) == ("reduce-range", True)
    assert (recipe["calibration"]["size"], recipe["calibration"]["source"]) == (9, str(data))
    assert recipe["overrides"] == [
        {"match": "stem", "bits": "w8a8"},
        {"match": "head", "bits": "float"},
        {"match": "q*", "bits": "float"},
    ]
    assert {s.module for s in load(out).sites.weights} == {"stem", "depthwise"}


def test_a_recipe_makes_the_same_bytes_again(tmp_path: Path, data: Path, run: Run) -> None:
    options = ["--data", data, "--limit", 4]
    more = ["--bits", "w4a8", "--seed", 3, "--calib-size", 7, "--bias-correction", "--keep-float", "head"]
    assert run(*QUICK, "--calib", data, *more, *options, "-o", tmp_path / "a").code == 0
    assert run("quantize", *TINY, "--recipe", tmp_path / "a" / "recipe.yaml", *options, "-o", tmp_path / "b").code == 0
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"metrics.json"}  # it holds times


def test_random_weights_are_warned_of(result: Path, data: Path, run: Run) -> None:
    for model, flags in ((TINY, []), (("mobilevit_xxs", "--input-size", "64"), ["--json"])):
        warned = run("evaluate", *model, "--data", data, "--limit", 2, *flags)
        assert warned.code == 0
        assert re.search(rf"warning: {model[0]} has .*: accuracies mean nothing; pass --weights", warned.err)
    assert "warning" not in run("evaluate", result, "--data", data, "--limit", 2, "--json").err


def test_pictures_without_labels(tmp_path: Path, data: Path, result: Path, run: Run) -> None:
    plain = pictures(tmp_path / "plain.npz")
    found = run("evaluate", result, "--data", plain, "--json").json
    for name in ("float", "simulated", "deployed"):
        assert found[name]["top1"] is found[name]["top5"] is None
    assert found["deployed"]["agreement"] > 0.8
    assert "top-1" not in run("evaluate", result, "--data", plain).out


def test_skipped_pictures_are_named(tmp_path: Path, result: Path, run: Run) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "torn.png").write_bytes(b"\x89PNG and no more")
    for command in ("evaluate", "verify"):
        found = run(command, result, "--data", folder, "--json")
        assert "1 pictures of" in found.err
        assert "torn.png" in found.err
        assert found.json.get("float", found.json)["pictures"] == 4
    found = run(*QUICK, "--calib", folder, "--data", folder, "-o", tmp_path / "out")
    assert "calibration pictures" in found.err
    assert found.err.count("torn.png") == 2


# What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nosuch"], "'nosuch'"),
        (["evaluate", "tiny:Nothing"], "Nothing"),
        (["evaluate", *TINY, "--data", "nowhere"], "nowhere"),
        (["evaluate", "demo", "--weights", "none.safetensors"], "demo"),
        (["evaluate", *TINY, "--weights", "none.safetensors"], r"none\.safetensors"),
        (["quantize", "--bits", "w9a9"], "w9a9"),
        (["quantize", "--method", "mes"], "Did you mean 'mse'"),
        (["quantize", "--target", "tensorrt"], "Known: onnxruntime, simulate"),
        (["quantize", "--scope", "all"], "'partial' or 'full'"),
        (["quantize", "--percentile", "12"], "ranges.percentile"),
        (["quantize", "--saturation", "never"], "saturation"),
        (["quantize", "--recipe", "none.yaml"], r"none\.yaml"),
        (["quantize", *TINY, "--calib", "nowhere"], "nowhere"),
        (["quantize", *TINY, "--keep-float", "x*"], r"pattern 'x\*' matches no layer"),
        (["quantize", *TINY, "--bits", "w16a16"], "16-bit weights.*target simulate"),
        (["verify", "nowhere"], "nowhere"),
        (["bench", "nowhere"], "nowhere"),
        (["export", "nowhere"], "nowhere"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run(*arguments).sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["nosuch"], ["quantize", "--nosuch"], ["bench", "out", "--runs", "0"]])
def test_usage_errors(arguments: list[str], run: Run) -> None:
    found = run(*arguments)
    assert found.code == 2
    assert not found.out
    assert "Traceback" not in found.err


def test_a_damaged_result(result: Path, tmp_path: Path, run: Run) -> None:
    for name in ("float.safetensors", "model.onnx"):
        copy = tmp_path / name
        copy.mkdir()
        for file, data in contents(result).items():
            (copy / file).write_bytes(data[: len(data) // 2] if file == name else data)
        assert name in run("verify", copy, "--limit", 2).sentence


def test_an_existing_folder_is_refused_before_any_work(
    result: Path, tmp_path: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    before = contents(result)

    def work(*_: object, **__: object) -> None:
        pytest.fail("began to work")

    with monkeypatch.context() as patch:
        patch.setattr("qhyvit.models.load.load_model", work)
        patch.setattr("qhyvit.pipeline.quantize", work)
        assert str(result) in run("quantize", *TINY, "-o", result).sentence
        assert "foreign" in run("quantize", *TINY, "-o", foreign, "--force").sentence
    assert contents(result) == before
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_force_replaces_a_result(tmp_path: Path, data: Path, run: Run) -> None:
    common = [*QUICK, "--calib", data, "--data", data, "--limit", 2, "-o", tmp_path / "out"]
    assert run(*common).code == 0
    (tmp_path / "out" / "stale").write_text("")
    assert run(*common, "--bits", "w4a4", "--force").code == 0
    assert load(tmp_path / "out").recipe.bits == "w4a4"
    assert not (tmp_path / "out" / "stale").exists()


def test_ctrl_c(tmp_path: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx.save", stop)  # in the midst of writing
    found = run(*QUICK, "--calib", data, "-o", tmp_path / "out")
    assert found.code == 130
    assert found.err.rstrip().endswith("qhyvit: stopped; nothing half-written was left behind.")
    assert not found.out
    assert not list(tmp_path.iterdir())


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qhyvit.models.load.list_models", fail)
    monkeypatch.setattr(sys, "argv", ["qhyvit", "models"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
