"""Configurations: strict, advising, and the same after a trip through YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lynceus.core.config import changed, differences, digest, dump_yaml, from_dict, load_yaml, to_dict
from lynceus.core.errors import AdviceError, MissingError, OptionError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    depth: int = 3
    widths: tuple[int, ...] = (1, 2)
    size: tuple[int, int] | None = None
    place: Path | None = None
    inner: Inner = field(default_factory=Inner)


def test_unknown_field_names_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'depth'"):
        changed(Outer(), {"dept": 4})
    with pytest.raises(OptionError, match="'rate'"):
        from_dict(Outer, {"inner": {"rat": 1.0}})
    assert changed(Outer(), {"depth": 4}).depth == 4


@given(
    st.builds(
        Outer,
        depth=st.integers(-5, 5),
        widths=st.lists(st.integers(0, 9), max_size=4).map(tuple),
        size=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
        place=st.none() | st.sampled_from([Path("a/b"), Path("c")]),
        inner=st.builds(Inner, rate=st.floats(1e-9, 1e9), kind=st.sampled_from(["a", "b"])),
    )
)
def test_round_trip_through_yaml(config):
    assert from_dict(Outer, yaml.safe_load(dump_yaml(config))) == config


def test_yaml_1_1_number_is_a_number():
    assert from_dict(Inner, yaml.safe_load("rate: 1e-3")).rate == 1e-3


@pytest.mark.parametrize("values", [{"depth": "three"}, {"depth": 2.5}, {"inner": {"kind": "c"}}, {"widths": ["x"]}])
def test_wrong_kinds_are_refused(values):
    with pytest.raises(AdviceError):
        from_dict(Outer, values)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(MissingError, match=r"nothing\.yaml"):
        load_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(AdviceError, match="not valid YAML"):
        load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(AdviceError, match="name: value"):
        load_yaml(tmp_path / "list.yaml")


def test_digest_and_differences_see_every_field():
    a, b = Outer(), Outer(inner=Inner(rate=2e-3))
    assert digest(a) == digest(Outer())
    assert digest(a) != digest(b)
    assert differences(a, b) == ["inner.rate: 0.001 -> 0.002"]
    assert to_dict(a)["widths"] == [1, 2]
