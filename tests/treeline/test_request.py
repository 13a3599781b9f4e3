import pytest

from treeline.errors import InvalidRequestError
from treeline.request import identify
from treeline.v1 import generation_pb2 as pb


def identified(**fields) -> pb.GenerateRequest:
    request = pb.GenerateRequest(**fields)
    identify(request)
    return request


def test_ids_and_seeds_are_drawn_once():
    first, second = identified(), identified()
    assert "" != first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed
    again = identified(request_id=first.request_id, sampling=first.sampling)
    assert again == first


def test_given_ids_and_seeds_stay():
    request = identified(request_id="mine", sampling=pb.SamplingParams(seed=0))
    assert (request.request_id, request.sampling.seed) == ("mine", 0)


@pytest.mark.parametrize("request_id", ["x" * 129, "two words", "naïve", "\n"])
def test_ids_that_metadata_cannot_carry_are_refused(request_id):
    identified(request_id="!" + "~" * 127)
    with pytest.raises(InvalidRequestError, match="request_id"):
        identified(request_id=request_id)
