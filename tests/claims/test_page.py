"""The runner of claims: one result a script with the verdict of its exit status, and a page made of results alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import _run

SCRIPT = '''"""P{id} A Paper of Number {id}.

Claim: none.
"""
import json, os, sys
from pathlib import Path

pair = {{
    "budget": "{id} bits", "shown": False, "ratio": 0.5, "difference": {{"value": -1.0, "low": -1.5, "high": -0.5}},
    "null": {{"label": "plain", "bytes": 100, "bits": 2.0, "divergence": 2.0}},
    "method": {{"label": "better", "bytes": 100, "bits": 2.0, "divergence": 1.0}},
}}
tables = [{{"claim": "Better than plain.", "model": "M", "unit": "nats", "samples": 3, "notes": [], "pairs": [pair]}}]
Path(os.environ["TERSOR_CLAIM_JSON"]).write_text(json.dumps(tables))
sys.exit({status})
'''


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, status in {"001": 0, "002": 2, "003": 3, "004": 77, "005": 1}.items():
        (tmp_path / f"p{number}_name.py").write_text(SCRIPT.format(id=number, status=status))
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(_run, "HERE", tmp_path)
    monkeypatch.setattr(_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(_run, "PAGE", tmp_path / "claims.md")
    return tmp_path


def rows(folder: Path) -> dict[str, str]:
    lines = (folder / "claims.md").read_text().splitlines()
    return {line.split("|")[-3].strip(" `").split()[-1]: line for line in lines if "`script/claims " in line}


def test_the_verdict_is_that_of_the_exit_status(claims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["_run.py"])
    assert _run.main() == 1  # one script broke
    found = rows(claims)
    assert len(found) == 5
    verdicts = ("holds here", "does not hold here", "cannot be tested at this size", "not run yet", "not run yet")
    for row, verdict in zip(found.values(), verdicts, strict=True):
        assert row.split("|")[5].strip(" *") == verdict
    assert "001 bits: plain 2.000 -> better 1.000 (0.50)" in found["p001_name"]
    assert sorted(p.stem for p in (claims / "results").iterdir()) == ["p001_name", "p002_name", "p003_name"]


def test_the_page_has_what_the_results_have(claims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["_run.py", "P001"])
    assert _run.main() == 0
    path = claims / "results" / "p001_name.json"
    found = json.loads(path.read_text())
    found["tables"][0]["pairs"][0]["method"]["divergence"] = 0.0123
    path.write_text(json.dumps(found))
    monkeypatch.setattr("sys.argv", ["_run.py", "--page"])
    _run.main()
    assert "better 0.0123" in rows(claims)["p001_name"]


def test_names_choose_scripts(claims: Path) -> None:
    assert [path.stem for path in _run.scripts(["p00"])] == [f"p00{k}_name" for k in range(1, 6)]
    assert [path.stem for path in _run.scripts(["p002_name", "P001"])] == ["p002_name", "p001_name"]
    with pytest.raises(SystemExit, match="no claim 'p9'"):
        _run.scripts(["p9"])
