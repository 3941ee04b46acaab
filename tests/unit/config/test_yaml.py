"""YAML that is read as it stands, and YAML that is refused with its line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from closedloop.bootstrap import load_run
from closedloop.config.dataset import load_dataset
from closedloop.config.settings import load_settings
from closedloop.config.yaml import ALIASES_MAX, DEPTH_MAX, format_yaml, read_yaml
from closedloop.errors import ConfigError


def save(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "cannot be read as YAML"),
        (b"- 1", "must hold keys and values, found list"),
        (b"\xff\xfe\x00", "YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: .*{message}"):
        read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: {a: 1}\nname: x\ngates: {a: 2}\n", "lines 1 and 3: both have the key 'gates'"),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "lines 2 and 4: both have the key 'b'"),
        ("a:\n  - {b: 1, b: 2}\n", "lines 2 and 2: both have the key 'b'"),
        ("on: 1\ntrue: 2\n", "lines 1 and 2: both have the key True"),
        ("a: &one {b: 1}\nc:\n  <<: *one\n  <<: *one\n", "lines 3 and 4: both have the key '<<'"),
    ],
)
def test_a_repeated_key_is_refused_with_both_lines(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"some\.yaml: {message}"):
        read_yaml(save(tmp_path, text))


def test_a_merged_key_may_be_overridden(tmp_path):
    read = read_yaml(save(tmp_path, "a: &one {b: 1, c: 2}\nd:\n  <<: *one\n  b: 3\n"))
    assert read["d"] == {"b": 3, "c": 2}


def build_bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (build_bomb(9, 9), "line 2: the alias \\*a0 stands inside a value with an anchor"),
        (build_bomb(30, 2), "line 2: the alias \\*a0 stands inside a value with an anchor"),
        ("a: &a\n  b: *a\n", "line 2: the alias \\*a stands inside a value with an anchor"),
        (
            "a: &a [1]\nb:\n" + "  - *a\n" * (ALIASES_MAX + 1),
            f"line {ALIASES_MAX + 3}: more than {ALIASES_MAX} aliases",
        ),
        ("a: " + "[" * 10_000 + "]" * 10_000, f"values lie in each other more than {DEPTH_MAX} deep"),
    ],
)
def test_what_would_grow_without_bound_is_refused_before_it_is_built(tmp_path, text, message):
    path = save(tmp_path, text)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_every_door_for_yaml_refuses_a_repeated_key(project, tmp_path):
    """Each file is appended to, read by its own command's function, and put back."""
    doors = {
        "params.yaml": lambda: load_run(project.root / "params.yaml", root=project.root),
        "configs/local.yaml": lambda: load_settings(folder=project.root / "configs"),
        "configs/datasets/shop.yaml": lambda: load_dataset("shop", project.root / "configs/datasets"),
    }
    for name, read in doors.items():
        path = tmp_path / "project" / name
        before = path.read_text(encoding="utf-8")
        first = next(line.partition(":")[0] for line in before.splitlines() if line[:1].isalpha())
        path.write_text(f"{before}\n{first}: again\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"both have the key '{first}'"):
            read()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),
        ("1E5", 1e5),
        ("+1e+2", 100.0),
        ("-.5e1", -5.0),
        ("1.5e3", 1500.0),
        ("'1e-1'", "1e-1"),
        ("e1", "e1"),
    ],
)
def test_a_number_with_an_exponent_is_a_number(tmp_path, text, value):
    assert read_yaml(save(tmp_path, f"a: {text}"))["a"] == value


@pytest.mark.parametrize("text", ["010", "-007", "1:30", "190:20:30.15", "1_000", "1_0.5"])
def test_what_is_one_number_here_and_another_to_dvc_is_refused_unless_it_is_quoted(tmp_path, text):
    """Of value_set: [01234] nothing was left but 668."""
    with pytest.raises(ConfigError, match=f"line 2: {text} is one number to YAML 1.1"):
        read_yaml(save(tmp_path, f"a:\n  b: [{text}]"))
    assert read_yaml(save(tmp_path, f"a: '{text}'"))["a"] == text


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii"))


@given(
    st.dictionaries(
        st.text("ab01e-.", min_size=1), PLAIN | st.from_regex(r"[-+]?[0-9.]{1,3}[eE][-+]?[0-9]{1,2}"), min_size=1
    )
)
def test_what_is_written_is_read_as_the_same(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "some.yaml"
    path.write_text(format_yaml(content), encoding="utf-8")
    assert read_yaml(path) == content


def test_text_written_by_another_hand_is_read_as_pyyaml_reads_it(tmp_path):
    text = "a: yes\nb: 2024-01-01\nc: [1, 2.5, null, x]\nd: 'no'\ne: 0x10\n"
    assert read_yaml(save(tmp_path, text)) == yaml.safe_load(text)
