"""A checkpoint with a damaged header loads, or is refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_gguf import write_gguf
from treeline.config import ModelConfig
from treeline.errors import ConfigError

INPUTS = 25
"""Of each kind; a load takes 10 to 50 ms."""
ODD = (None, True, -1, 0, 1, 7, 300, 1.5, float("nan"), "", "x", [], {}, [1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    write_gguf(tiny_llama(), path / "tiny.gguf")
    return path


def with_odd_values(data: object, rng: random.Random) -> object:
    """Some value of some dictionary replaced by another one, or left out."""
    places = [data]
    for place in places:
        places += [one for one in place.values() if isinstance(one, dict)]
    place = rng.choice(places)
    key = rng.choice(list(place))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(ODD)
    return data


def with_odd_bytes(data: bytes, end: int, rng: random.Random) -> bytes:
    """Bytes of the first `end` replaced, inserted or left out; or the file cut."""
    if rng.random() < 0.1:
        return data[: rng.randrange(end)]
    at, count = rng.randrange(end), rng.choice((0, 1, 1, 4))
    return data[:at] + rng.randbytes(rng.choice((0, 1, 1, 4))) + data[at + count :]


def safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return with_odd_bytes(data, 8 + size, rng)
    header = json.dumps(with_odd_values(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def configuration(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(with_odd_values(json.loads(data), rng)).encode()


def gguf(data: bytes, rng: random.Random) -> bytes:
    return with_odd_bytes(data, data.index(b"output.weight") + 60, rng)


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", safetensors), ("config.json", configuration), ("tiny.gguf", gguf)]
)
def test_damage_is_one_line_or_no_matter(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[bytes, random.Random], bytes],
) -> None:
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole, rng, refused = (folder / name).read_bytes(), random.Random(name), 0
    model = ModelConfig(model=str(tmp_path / name if name.endswith(".gguf") else tmp_path), device="cpu")
    for _ in range(INPUTS):
        (tmp_path / name).write_bytes(damage(whole, rng))
        try:
            LanguageModel.load(model)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused, "none of them did damage"
