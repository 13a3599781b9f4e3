"""What stands in the log files."""

import json
import logging

import pytest
from structlog.contextvars import bound_contextvars

from treeline.config import LoggingConfig
from treeline.telemetry import logs

logger = logging.getLogger("verifier_svc.test")


@pytest.fixture
def written(tmp_path):
    """Sets the log up, and gives the text of the files that it has by then, the newest first."""

    def begin(**config):
        logs.configure(LoggingConfig(**config), "verifier", tmp_path)
        return lambda: [path.read_text() for path in sorted(tmp_path.iterdir())]

    yield begin
    root = logging.getLogger()
    for handler in [one for one in root.handlers if one.name == "treeline"]:
        root.removeHandler(handler)
        handler.close()
    for package in logs.PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)


def test_json_lines_carry_fields_the_request_and_the_traceback(written):
    read = written(format="json")
    with bound_contextvars(request_id="r1"):
        logger.info("it took %d ms", 7, extra={"queue_s": 0.5})
        try:
            raise KeyError("lost")
        except KeyError:
            logger.exception("it failed")
    logging.getLogger("asyncio").error("of another package")
    logging.getLogger("asyncio").info("not wanted")
    logger.debug("not wanted")
    told, failed, other = (json.loads(line) for line in read()[0].splitlines())
    assert (told["message"], told["queue_s"], told["request_id"]) == ("it took 7 ms", 0.5, "r1")
    assert (told["level"], told["logger"], told["service"]) == ("info", "verifier_svc.test", "verifier")
    assert "KeyError: 'lost'" in failed["exception"]
    assert failed["request_id"] == "r1"
    assert "request_id" not in other


def test_a_line_of_text_cannot_be_forged(written):
    read = written(level="debug")
    logger.debug("ended", extra={"request_id": "x\n2026-01-01 [error] forged"})
    (line,) = read()[0].splitlines()
    assert r"request_id='x\n2026" in line


def test_files_rotate_and_are_bounded(written, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    read = written()
    for number in range(100):
        logger.info("line %d", number)
    files = read()
    assert len(files) == 1 + logs.BACKUPS
    assert "line 99" in files[0]
    assert all(len(text) <= 1000 for text in files)
