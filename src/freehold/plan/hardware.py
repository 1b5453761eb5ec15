"""Accelerators to plan for: the table `hardware.toml`, and one's own figures. Torch-free.

gpu("h200")                                        # by key or by a name that people write: "H200 SXM", "8xH200"
own_gpu(gpu("h200"), name="H20", bandwidth=4.0e12, flops={"bf16": 148e12, "fp8": 296e12})
read_gpu("my-gpu.toml")                            # the table's own format, one entry
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from freehold.errors import ConfigError, InvalidRequest
from freehold.plan.types import Cluster, ComputeDtype, Gpu, Rent, Source

_MIB = 2**20
_REQUIRED = (
    "name kind arch memory_mib bandwidth_tbs tflops link_gbs domain scale_out_gbit node power".split()
)  # of an entry
_OPTIONAL = "rent capex owned system notes sources".split()
_FLOPS = frozenset(get_args(ComputeDtype))
_FILE = re.compile(r"\s*(?:(\d+)\s*[x×*]\s*)?(.+?)\s*", re.IGNORECASE)


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("freehold.plan").joinpath("hardware.toml").read_text(encoding="utf-8"))


@cache
def gpus() -> Mapping[str, Gpu]:
    """Every accelerator of the table, by key."""
    table = _table()
    return MappingProxyType({key: _gpu(key, entry, table["sources"]) for key, entry in table["gpus"].items()})


def gpu(name: str) -> Gpu:
    """An accelerator by its key or its name. Raises InvalidRequest with what there is."""
    known, wanted = gpus(), _plain(name)
    for key, entry in known.items():
        if wanted in (_plain(key), _plain(entry.name)):
            return entry
    # "H200", "NVIDIA H200 141GB", "MI300X OAM": the key is one of the words.
    words = re.split(r"[\s_]+", name.lower())
    found = [key for key in known if key in words]
    if len(found) == 1:
        return known[found[0]]
    near = get_close_matches(wanted, [_plain(key) for key in known], 1)
    hint = next((f" (did you mean {key}?)" for key in known if near and _plain(key) == near[0]), "")
    raise InvalidRequest(
        f"hardware {name!r} is not known{hint}; there are {', '.join(known)}, or a TOML file with figures of your own",
        param="hardware",
    )


def cluster(text: str, count: int | None = None) -> Cluster:
    """ "8xH200" or ("h200", 8): so many of them; without a number, one node.

    A path to a TOML file stands for a GPU too. Raises InvalidRequest and ConfigError.
    """
    match = _FILE.fullmatch(text)
    if match is None:
        raise InvalidRequest("hardware is empty; name it, as in 8xh200", param="hardware")
    number, name = match[1], match[2]
    if number and count is not None and int(number) != count:
        raise InvalidRequest(f"{text!r} and {count} GPUs contradict each other; give the number once", param="gpus")
    chosen = read_gpu(name) if name.endswith(".toml") else gpu(name)
    wanted = int(number) if number else chosen.node if count is None else count
    if wanted < 1:
        raise InvalidRequest(f"{wanted} GPUs: at least 1 is needed", param="gpus")
    if wanted > 100_000:
        raise InvalidRequest(f"{wanted:,} GPUs of {chosen.name}: at most 100,000 can be planned for", param="gpus")
    return Cluster(chosen, wanted)


def own_gpu(like: Gpu, **figures: Any) -> Gpu:
    """`like` with other figures (fields of `Gpu`). Raises InvalidRequest for one that cannot be."""
    unknown = sorted(set(figures) - {field.name for field in fields(Gpu)})
    if unknown:
        raise InvalidRequest(f"hardware has no figure {unknown[0]!r}", param=unknown[0])
    own = replace(like, **{"notes": ("figures of your own", *like.notes), **figures})
    _check(own)
    return own


def read_gpu(path: str | Path) -> Gpu:
    """One accelerator from a TOML file with the keys that an entry of `hardware.toml` has (prices may be left out).

    `like = "h200"` takes what is not given from that one. Raises ConfigError.
    """
    path = Path(path)
    try:
        entry = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    like = entry.pop("like", None)
    try:
        if like is not None:
            known = _table()["gpus"][gpu(str(like)).key]
            entry = {**{key: value for key, value in known.items() if key not in ("sources", "notes")}, **entry}
        return _gpu(path.stem, {**entry, "notes": [f"figures of {path.name}"]}, {})
    except (ConfigError, InvalidRequest) as error:
        raise ConfigError(f"{path}: {error}") from None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _gpu(key: str, entry: Mapping[str, Any], sources: Mapping[str, Any]) -> Gpu:
    missing = [field for field in _REQUIRED if field not in entry]
    unknown = sorted(set(entry) - {*_REQUIRED, *_OPTIONAL})
    if missing:
        raise ConfigError(f"hardware {key}: {missing[0]} is missing")
    if unknown:
        raise ConfigError(
            f"hardware {key}: unknown key {unknown[0]!r}; an entry has {', '.join(_REQUIRED + _OPTIONAL)}"
        )
    flops = entry["tflops"]
    if not isinstance(flops, Mapping) or "bf16" not in flops or not set(flops) <= _FLOPS:
        raise ConfigError(f"hardware {key}: tflops must give bf16, and may give fp8 and fp4")
    if entry["kind"] not in ("cuda", "rocm", "cpu"):
        raise ConfigError(f"hardware {key}: kind is 'cuda', 'rocm' or 'cpu', not {entry['kind']!r}")
    _numbers(key, entry, flops)
    rent = entry.get("rent")
    made = Gpu(
        key=key,
        name=str(entry["name"]),
        kind=entry["kind"],
        arch=str(entry["arch"]),
        memory=round(entry["memory_mib"] * _MIB),
        bandwidth=entry["bandwidth_tbs"] * 1e12,
        flops=MappingProxyType({dtype: value * 1e12 for dtype, value in flops.items()}),
        link=entry["link_gbs"] * 1e9,
        domain=entry["domain"],
        scale_out=entry["scale_out_gbit"] * 1e9 / 8,
        node=entry["node"],
        power=float(entry["power"]),
        rent=None if rent is None else Rent(*(float(price) for price in rent)),
        capex=entry.get("capex"),
        system=bool(entry.get("system", False)),
        owned=entry.get("owned"),
        notes=tuple(entry.get("notes", ())),
        sources=MappingProxyType({name: Source(**sources[at]) for name, at in entry.get("sources", {}).items()}),
    )
    _check(made)
    return made


def _numbers(key: str, entry: Mapping[str, Any], flops: Mapping[str, Any]) -> None:
    """TOML's types are the only check that arithmetic below does not make by itself."""
    named = [(field, entry[field]) for field in _REQUIRED if field not in ("name", "kind", "arch", "tflops")]
    named += [(f"tflops.{dtype}", value) for dtype, value in flops.items()]
    named += [(field, entry[field]) for field in ("capex", "owned") if field in entry]
    rent = entry.get("rent")
    if rent is not None:
        if not isinstance(rent, list) or len(rent) != 3:
            raise ConfigError(f"hardware {key}: rent is three prices: low, typical, high")
        named += [("rent", price) for price in rent]
    for field, value in named:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"hardware {key}: {field} must be a number, found {value!r}")
        if field in ("domain", "node") and not isinstance(value, int):
            raise ConfigError(f"hardware {key}: {field} must be a whole number, found {value!r}")


def _check(made: Gpu) -> None:
    """Refuse figures that no hardware can have."""
    positive: dict[str, float] = {
        "memory": made.memory,
        "bandwidth": made.bandwidth,
        "link": made.link,
        "scale_out": made.scale_out,
        "domain": made.domain,
        "node": made.node,
        "power": made.power,
        **{f"flops.{dtype}": value for dtype, value in made.flops.items()},
        **({} if made.capex is None else {"capex": made.capex}),
        **({} if made.owned is None else {"owned": made.owned}),
    }
    for field, value in positive.items():
        if not 0 < value < math.inf:
            raise InvalidRequest(f"hardware {made.key}: {field} = {value:g} must be a positive number", param=field)
    if made.rent is not None and not 0 <= made.rent.low <= made.rent.typical <= made.rent.high < math.inf:
        raise InvalidRequest(
            f"hardware {made.key}: rent must be three prices from low to high, none negative", param="rent"
        )
    for dtype, wider in (("fp4", "fp8"), ("fp8", "bf16")):
        narrow, wide = made.flops.get(dtype), made.flops.get(wider)  # type: ignore[call-overload]
        if narrow is not None and wide is not None and narrow < wide:
            raise InvalidRequest(
                f"hardware {made.key}: {dtype} at {narrow / 1e12:g} TFLOP/s is slower than {wider} at "
                f"{wide / 1e12:g}; correct one",
                param="flops",
            )
