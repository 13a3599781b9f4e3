"""The generated code of the contracts is what the contracts say, and they are in good style."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parent.parent
BUF = Path(sys.executable).with_name("buf")
NAMES = sorted(path.stem for path in (ROOT / "proto/treeline/v1").glob("*.proto"))


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """What the compiler makes of each contract, by its name."""
    built = tmp_path_factory.mktemp("proto") / "all.binpb"
    subprocess.run(
        [BUF, "build", "--as-file-descriptor-set", "--exclude-source-info", "-o", built], cwd=ROOT, check=True
    )
    return {Path(file.name).stem: file for file in FileDescriptorSet.FromString(built.read_bytes()).file}


@pytest.mark.parametrize("name", NAMES)
def test_generated_code_has_not_drifted(contracts, name):
    expected = contracts[name]
    module = importlib.import_module(f"treeline.v1.{name}_pb2")
    messages = [*expected.message_type, *(inner for message in expected.message_type for inner in message.nested_type)]
    for field in (field for message in messages for field in message.field):
        field.ClearField("json_name")  # left out of generated code where it is the usual one
    assert FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb) == expected, "stale: run `make proto`"

    types = (ROOT / f"treeline/v1/{name}_pb2.pyi").read_text()
    stale = [f.name for message in messages for f in message.field if f"{f.name.upper()}_FIELD_NUMBER:" not in types]
    assert not stale, "stale: run `make proto`"
    stubs = importlib.import_module(f"treeline.v1.{name}_pb2_grpc")
    for service in expected.service:
        servicer = getattr(stubs, f"{service.name}Servicer")
        assert all(hasattr(servicer, method.name) for method in service.method), "stale: run `make proto`"


@pytest.mark.parametrize("check", [["lint"], ["format", "-d", "--exit-code"]])
def test_contracts_follow_the_style(check):
    done = subprocess.run([BUF, *check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
