"""The hardware table, names as people write them, own figures, and what no hardware can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from freehold.errors import ConfigError, InvalidRequest
from freehold.plan.hardware import cluster, gpu, gpus, own_gpu, read_gpu

REQUIRED = ("a100 h100 h200 b200 b300 gb200 gb300 mi300x mi325x mi355x rtx-pro-6000 dgx-spark cpu-server").split()


def test_the_table_has_everything_that_is_asked_for() -> None:
    assert list(gpus()) == REQUIRED


@pytest.mark.parametrize("key", REQUIRED)
def test_every_entry_is_whole_and_sourced(key: str) -> None:
    made = gpus()[key]
    assert made.memory > 70e9
    assert made.peak("fp4") >= made.peak("fp8") >= made.peak("bf16") > 0
    assert {"specs"} <= set(made.sources)
    assert (made.rent is None) == ("rent" not in made.sources)
    assert (made.capex is None) == ("capex" not in made.sources)
    assert all(source.where and source.date for source in made.sources.values())


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("h200", "h200"),
        ("H200 SXM", "h200"),
        ("NVIDIA H200 141GB", "h200"),
        ("RTX PRO 6000", "rtx-pro-6000"),
        ("rtx_pro_6000", "rtx-pro-6000"),
        ("GB200", "gb200"),
        ("MI300X OAM", "mi300x"),
    ],
)
def test_names_are_taken_as_people_write_them(written: str, key: str) -> None:
    assert gpu(written).key == key


def test_a_count_before_the_name() -> None:
    assert (cluster("16xH100").gpus, cluster("16xH100").gpu.key, cluster("16xH100").nodes) == (16, "h100", 2)
    assert cluster("h200").gpus == 8
    assert cluster("h200", 4).gpus == 4
    assert cluster("2 x gb300").gpus == 2


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("h2000", None, "did you mean h200"),
        ("frobnicator", None, "is not known; there are a100, h100,"),
        ("0xh200", None, "0 GPUs: at least 1"),
        ("h200", -3, "-3 GPUs: at least 1"),
        ("8xh200", 4, "contradict each other"),
        ("1000000xh200", None, "at most 100,000"),
        ("", None, "name it"),
    ],
)
def test_impossible_clusters_are_refused(text: str, count: int | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        cluster(text, count)
    assert "\n" not in str(caught.value)


def test_own_figures_start_from_a_known_one() -> None:
    own = own_gpu(gpu("h200"), name="H20", bandwidth=4.0e12, flops={"bf16": 148e12, "fp8": 296e12})
    assert (own.memory, own.bandwidth, own.arch) == (gpu("h200").memory, 4.0e12, "sm90")
    assert own.notes[0] == "figures of your own"


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"memory": -1}, "memory = -1 must be a positive number"),
        ({"bandwidth": 0.0}, "bandwidth = 0 must be"),
        ({"bandwidth": float("inf")}, "bandwidth = inf must be"),
        ({"capex": -5.0}, "capex = -5 must be"),
        ({"flops": {"bf16": 2e15, "fp8": 1e15}}, "fp8 at 1000 TFLOP/s is slower than bf16"),
        ({"colour": "red"}, "hardware has no figure 'colour'"),
    ],
)
def test_impossible_figures_are_refused(figures: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        own_gpu(gpu("h200"), **figures)


def test_a_file_of_own_figures(tmp_path: Path) -> None:
    path = tmp_path / "h20.toml"
    path.write_text('like = "h200"\nname = "H20"\nbandwidth_tbs = 4.0\ntflops = { bf16 = 148, fp8 = 296 }\n')
    made = read_gpu(path)
    assert (made.name, made.key, made.bandwidth, made.memory) == ("H20", "h20", 4.0e12, gpu("h200").memory)
    assert cluster(f"4x{path}").gpus == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("= 3", "not readable as TOML"),
        ('name = "X"', "kind is missing"),
        ('like = "h200"\nspeed = 3', "unknown key 'speed'"),
        ('like = "h200"\nmemory_mib = "much"', "memory_mib must be a number"),
        ('like = "h200"\nmemory_mib = -4', "memory = .* must be a positive number"),
        ('like = "h200"\nrent = [3, 2, 1]', "rent must be three prices from low to high"),
        ('like = "h200"\nrent = [-1, 2, 3]', "none negative"),
        ('like = "h200"\nnode = 2.5', "node must be a whole number"),
        ('like = "h200"\nkind = "tpu"', "kind is 'cuda', 'rocm' or 'cpu'"),
        ('like = "h200"\ntflops = { int8 = 3 }', "tflops must give bf16"),
        ('like = "h2000"', "did you mean h200"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_gpu(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(ConfigError, match="not readable as TOML"):
        cluster("8xnowhere.toml")
