"""`qhyvit compare` as a shell calls it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qhyvit import cli
from tiny import SIDE, pictures


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qhyvit", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_table_and_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pictures(tmp_path / "data.npz", labels=True), tmp_path / "out"
    common = ["tiny:Tiny", "--input-size", SIDE, "--calib", data, "--data", data, "--calib-size", 5, "-o", out]
    asked = [*common, "--methods", "minmax, fqvit", "--bits", "w8a8,w4a4", "--seeds", 1]
    assert call(monkeypatch, *asked) == 0
    shown, said = capsys.readouterr()
    assert "0 of 4 cells were there already" in said
    assert said.count("seed 0: top-1") == 4
    assert all(word in shown for word in ("tiny:Tiny", "minmax", "fqvit", "w4a4", "no kernel"))
    assert {p.name for p in out.iterdir()} == {"cells", *(f"comparison.{s}" for s in ("md", "csv", "json", "png"))}

    assert call(monkeypatch, *asked, "--json") == 0
    shown, _ = capsys.readouterr()
    result = json.loads(shown)
    assert shown.count("\n") == 1
    assert result == json.loads((out / "comparison.json").read_text())
    assert [(r["bits"], r["method"]) for r in result["rows"]] == [
        ("w8a8", "minmax"), ("w8a8", "fqvit"), ("w4a4", "minmax"), ("w4a4", "fqvit")
    ]  # fmt: skip

    assert call(monkeypatch, *common, "--methods", "minmaxx") == 2
    assert "Did you mean 'minmax'" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qhyvit.comparison.worker.quantize", stop)
    data = pictures(tmp_path / "data.npz", labels=True)
    given = ["tiny:Tiny", "--input-size", SIDE, "--calib", data, "--data", data, "-o", tmp_path / "out"]
    assert call(monkeypatch, *given) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
