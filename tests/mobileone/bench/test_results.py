"""Results as files, and the paper's tables."""

import csv
import dataclasses
import json
import math
from datetime import datetime

import pytest

from mobileone.bench.paper import UNVERIFIED, paper_row, paper_table, paper_tables
from mobileone.bench.results import Result, compare_machines


@pytest.fixture
def result():
    rows = [{"model": "a", "min_ms": 1.5, "failure": None}, {"model": "b", "extra": True}]
    return Result.new("latency", {"runs": 3, "sizes": [1, 2]}, rows)


def test_a_result_knows_where_and_when_it_was_taken(result):
    assert {"cpu", "cores", "memory_gib", "os", "device_name"} <= set(result.machine)
    assert datetime.fromisoformat(result.date).utcoffset() is not None
    assert {"python", "torch", "timm"} <= set(result.versions)
    assert Result.new("memory", {}, []).machine_id == result.machine_id


def test_what_is_saved_is_loaded_and_nothing_else_stays(result, tmp_path):
    path = result.save(tmp_path / "new/result.json")
    assert Result.load(path) == result
    result.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file(result, tmp_path):
    path = result.save(tmp_path / "result.json")
    broken = dataclasses.replace(result, rows=[{"min_ms": math.nan}])
    with pytest.raises(ValueError, match="JSON"):
        broken.save(path)
    assert Result.load(path) == result


def test_csv_has_the_union_of_columns_and_the_origin(result, tmp_path):
    with result.write_csv(tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["a", "b"]
    assert rows[0]["min_ms"] == "1.5" and rows[1]["extra"] == "True" and rows[0]["extra"] == ""
    assert {row["machine_id"] for row in rows} == {result.machine_id}
    assert json.loads(rows[0]["protocol"]) == result.protocol


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ('{"format": "other"}', "is not a result"),
        ('{"format": "mobileone-result-1", "kind": "latency"}', "not a complete result"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Result.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        Result.load(tmp_path / "missing.json")


def test_wrong_contents_are_told():
    with pytest.raises(ValueError, match=r"`kind` \(='speed'\).*latency"):
        Result.new("speed", {}, [])
    with pytest.raises(ValueError, match="'times' is list"):
        Result.new("latency", {}, [{"times": [1, 2]}])


def test_machines_must_agree(result):
    other = dataclasses.replace(result, machine=result.machine | {"machine_id": "0", "cpu": "Z80"})
    assert compare_machines([result, result]) == result.machine_id
    with pytest.raises(ValueError, match=r"different machines.*Z80"):
        compare_machines([result, other])
    with pytest.raises(ValueError, match="empty"):
        compare_machines([])


def test_every_table_of_the_paper_is_whole():
    assert set(paper_tables()) == {1, 2, 3, 5, 6, 8, 9, 10, 13}
    for table in paper_tables().values():
        assert f"Table {table.number}" in table.source
        assert table.rows and all(set(row) == set(table.columns) for row in table.rows)
        assert (UNVERIFIED.strip(" ()") in table.caption) is not table.verified
    assert [n for n, table in paper_tables().items() if not table.verified] == [3, 8]
    assert paper_table(3).mark(2.62) == f"2.62{UNVERIFIED}"
    with pytest.raises(ValueError, match=r"`number` \(=4\).*13"):
        paper_table(4)


def test_the_tables_agree_where_they_repeat_each_other():
    top1 = {row["build"]: row["top1"] for row in paper_table(9).rows if row["build"]}
    for number in (5, 10):
        for row in paper_table(number).rows:
            assert row["top1"] == top1.get(row["build"], row["top1"])
    best = {}
    for row in paper_table(6).rows:
        best[row["build"]] = max(best.get(row["build"], 0), row["top1"])
    assert best == {name: top1[name] for name in best}
    assert paper_row("mobileone_s1.apple_in1k")["mobile_ms"] == 0.89
    assert paper_row("mobileone_mu1")["mmacs"] == 139
    assert paper_row("resnet18") is None
