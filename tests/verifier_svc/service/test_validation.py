import math
from dataclasses import replace

import pytest

from treeline.config import LimitsConfig, VerifierConfig
from treeline.errors import InvalidRequestError, UnknownModelError
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.chat import Chat
from verifier_svc.service.fields import MAX_VIOLATIONS, ServedModel
from verifier_svc.service.validation import UNSET, parse_generate, parse_tokenize, with_prompt

INFO = ServedModel(
    "m", "arch", "float32", vocab_size=100, max_context_tokens=64, eos_token_ids=frozenset({0}), has_chat_template=True
)
LIMITS = LimitsConfig(
    max_output_tokens=32,
    max_tree_nodes=16,
    max_tree_depth=4,
    max_stop_strings=2,
    max_stop_string_chars=8,
    max_logprobs=5,
)
VERIFIER = VerifierConfig(default_policy="smart", allowed_policies=["off", "chain:", "smart"])


def parse(info: ServedModel = INFO, verifier: VerifierConfig = VERIFIER, **fields):
    if not fields.keys() & {"prompt", "token_ids", "chat"}:
        fields["prompt"] = "hello"
    return parse_generate(pb.GenerateRequest(**fields), info, LIMITS, verifier)[0]


def prompt_of(info: ServedModel = INFO, **fields):
    return parse_generate(pb.GenerateRequest(**fields), info, LIMITS, VERIFIER)[1]


def chat(*messages: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])


def sampling(**fields):
    return {"sampling": pb.SamplingParams(**fields)}


def stopping(**fields):
    return {"stopping": pb.StoppingParams(**fields)}


def speculation(**fields):
    return {"speculation": pb.SpeculationOptions(**fields)}


def output(**fields):
    return {"output": pb.OutputOptions(**fields)}


WRONG = [
    ({"target_time_per_output_token_ms": 0.0}, "target_time_per_output_token_ms"),
    ({"target_time_per_output_token_ms": math.nan}, "target_time_per_output_token_ms"),
    ({"target_time_per_output_token_ms": 1e6}, "target_time_per_output_token_ms"),
    ({"prompt": ""}, "prompt"),
    ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
    ({"token_ids": pb.TokenIds(ids=[1, 2, 100])}, "token_ids.ids[2]"),
    ({"token_ids": pb.TokenIds(ids=[1] * 64)}, "token_ids.ids"),
    ({"chat": pb.Chat()}, "chat.messages"),
    ({"chat": chat(("user", "hi"), ("robot", "hi"))}, "chat.messages[1].role"),
    ({"chat": chat(("user", ""))}, "chat.messages[0].content"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=math.nan), "sampling.temperature"),
    (sampling(temperature=math.inf), "sampling.temperature"),
    (sampling(top_p=0.0), "sampling.top_p"),
    (sampling(top_p=1.01), "sampling.top_p"),
    (sampling(top_p=-1), "sampling.top_p"),
    (sampling(top_p=math.nan), "sampling.top_p"),
    (sampling(top_k=-2), "sampling.top_k"),
    (sampling(presence_penalty=2.5), "sampling.presence_penalty"),
    (sampling(frequency_penalty=math.nan), "sampling.frequency_penalty"),
    (sampling(min_p=-0.1), "sampling.min_p"),
    (sampling(min_p=1.5), "sampling.min_p"),
    (sampling(logit_bias={100: 1.0}), "sampling.logit_bias[100]"),
    (sampling(logit_bias={7: 101.0}), "sampling.logit_bias[7]"),
    (sampling(logit_bias={7: math.nan}), "sampling.logit_bias[7]"),
    (stopping(min_tokens=-1), "stopping.min_tokens"),
    (stopping(min_tokens=33), "stopping.min_tokens"),
    (stopping(min_tokens=5, max_tokens=4), "stopping.min_tokens"),
    (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=-2), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=math.inf), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=math.nan), "sampling.repetition_penalty"),
    (stopping(max_tokens=0), "stopping.max_tokens"),
    (stopping(max_tokens=-5), "stopping.max_tokens"),
    (stopping(max_tokens=33), "stopping.max_tokens"),
    (stopping(stop=["a", "b", "c"]), "stopping.stop"),
    (stopping(stop=["a", ""]), "stopping.stop[1]"),
    (stopping(stop=["123456789"]), "stopping.stop[0]"),
    (stopping(stop_token_ids=[5, 100]), "stopping.stop_token_ids[1]"),
    (stopping(stop_token_ids=[1] * 257), "stopping.stop_token_ids"),
    (output(logprobs=-1), "output.logprobs"),
    (output(logprobs=6), "output.logprobs"),
    (speculation(policy="none-such"), "speculation.policy"),
    (speculation(policy=""), "speculation.policy"),
    (speculation(policy="chain:x"), "speculation.policy"),
    (speculation(policy="smart-paper"), "speculation.policy"),
    (speculation(policy="chain:" + "1" * 10_000), "speculation.policy"),
    (speculation(max_nodes=-1), "speculation.max_nodes"),
    (speculation(max_nodes=17), "speculation.max_nodes"),
    (speculation(max_depth=5), "speculation.max_depth"),
    ({"priority": 5}, "priority"),
    ({"priority": -5}, "priority"),
]


@pytest.mark.parametrize(("fields", "field"), WRONG, ids=[f"{field}-{i}" for i, (_, field) in enumerate(WRONG)])
def test_each_wrong_field_is_named(fields, field):
    with pytest.raises(InvalidRequestError) as caught:
        parse(**fields)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(str(caught.value)) < 500


def test_no_input_at_all():
    with pytest.raises(InvalidRequestError) as caught:
        parse_generate(pb.GenerateRequest(), INFO, LIMITS, VERIFIER)
    assert [(v.field, "token_ids" in v.description) for v in caught.value.violations] == [("input", True)]


def test_everything_wrong_is_reported_at_once():
    with pytest.raises(InvalidRequestError) as caught:
        parse(**sampling(temperature=-1, top_p=2), **stopping(max_tokens=0), priority=9)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"sampling.temperature", "sampling.top_p", "stopping.max_tokens", "priority"}


def test_a_flood_of_violations_is_cut():
    with pytest.raises(InvalidRequestError) as caught:
        parse(chat=chat(*[("robot", "")] * 1000))
    assert len(caught.value.violations) == MAX_VIOLATIONS


def test_defaults():
    checked = parse()
    assert (checked.sampling.temperature, checked.sampling.top_p, checked.sampling.top_k) == (0.0, 1.0, 0)
    assert checked.sampling.repetition_penalty == 1.0
    assert checked.sampling.greedy
    assert (checked.policy, checked.max_nodes, checked.logprobs, checked.max_tokens) == ("smart", None, None, UNSET)


def test_unset_fields_take_the_models_own_defaults():
    info = replace(INFO, sampling=SamplingParams(temperature=0.6, top_p=0.9, top_k=20))
    assert parse(info, **sampling(seed=3)).sampling == replace(info.sampling, seed=3)
    assert parse(info, **sampling(temperature=0, top_k=0)).sampling == SamplingParams(top_p=0.9)


def test_bounds_themselves_are_allowed():
    checked = parse(
        **sampling(temperature=0.01, top_p=1.0, top_k=2**60, seed=2**64 - 1),
        **stopping(max_tokens=32, stop=["12345678", "b"], stop_token_ids=[99]),
        **output(logprobs=0),
        **speculation(policy="chain:4", max_nodes=0, max_depth=4),
        priority=-4,
        request_id="x" * 128,
    )
    assert checked.sampling.top_k == INFO.vocab_size
    assert checked.sampling.seed == 2**64 - 1
    assert (checked.policy, checked.max_nodes, checked.max_depth, checked.logprobs) == ("chain:4", 0, 4, 0)


def test_numbers_mean_what_people_mean_and_are_shown_as_given():
    assert parse(**sampling(temperature=0.009, top_k=-1)).sampling == SamplingParams()
    with pytest.raises(InvalidRequestError, match=r"top_p.*is 1\.0000001, "):
        parse(**sampling(top_p=1.0000001))


def test_every_bias_is_checked():
    with pytest.raises(InvalidRequestError) as caught:
        parse(**sampling(logit_bias=dict.fromkeys(range(99), 1.0) | {100: 1.0}))
    assert [violation.field for violation in caught.value.violations] == ["sampling.logit_bias[100]"]
    wide = replace(INFO, vocab_size=1000)
    with pytest.raises(InvalidRequestError, match="301 entries"):
        parse(wide, **sampling(logit_bias=dict.fromkeys(range(301), 1.0)))


def test_text_options():
    checked = parse(**stopping(min_tokens=3, include_stop=True), **output(skip_special_tokens=False))
    assert (checked.min_tokens, checked.include_stop, checked.skip_special_tokens) == (3, True, False)
    assert (parse().min_tokens, parse().include_stop, parse().skip_special_tokens) == (0, False, True)
    long = LimitsConfig(max_output_tokens=1000)
    request, roomy = pb.GenerateRequest(prompt="a", **stopping(min_tokens=400)), replace(INFO, max_context_tokens=2000)
    checked, prompt = parse_generate(request, roomy, long, VERIFIER)
    assert with_prompt(checked, prompt, [1], roomy, long).max_tokens == 400


def test_other_models_are_not_found():
    with pytest.raises(UnknownModelError, match="other"):
        parse(model="other")
    assert prompt_of(model="m", prompt="hello") == "hello"


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": "\\ud800"}', "[" * 10000])
def test_what_a_template_gets_is_a_json_object_of_unicode(text):
    for wrong in ({"template_arguments": text}, {"messages": [pb.ChatMessage(role="user", content="x", fields=text)]}):
        given = {"messages": [pb.ChatMessage(role="user", content="hi")]} | wrong
        with pytest.raises(InvalidRequestError, match=r"chat\.\S*(template_arguments|fields): is no JSON object"):
            prompt_of(chat=pb.Chat(**given))


def test_chat_needs_a_template():
    bare = ServedModel("m", "arch", "float32", 100, 64, frozenset(), has_chat_template=False)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        parse(bare, chat=chat(("user", "hi")))
    assert prompt_of(chat=chat(("user", "hi"))) == Chat([{"role": "user", "content": "hi"}])
    empty = chat(("system", ""), ("user", "hi"), ("assistant", ""), ("tool", ""))
    assert [m["content"] for m in prompt_of(chat=empty).messages] == ["", "hi", "", ""]


def test_prompt_and_output_share_the_context():
    def tokenised(length, **fields):
        request = pb.GenerateRequest(**({"prompt": "hello"} if "chat" not in fields else {}), **fields)
        checked, prompt = parse_generate(request, INFO, LIMITS, VERIFIER)
        return with_prompt(checked, prompt, [1] * length, INFO, LIMITS)

    assert tokenised(10).max_tokens == 32  # the output limit
    assert tokenised(60).max_tokens == 4  # what is left
    assert tokenised(60, **stopping(max_tokens=4)).max_tokens == 4
    assert tokenised(10, **stopping(max_tokens=0), **output(prompt_logprobs=0)).max_tokens == 0
    large = replace(INFO, max_context_tokens=10**6)
    scored = pb.GenerateRequest(prompt="x", output=pb.OutputOptions(prompt_logprobs=5))
    checked, prompt = parse_generate(scored, INFO, LIMITS, VERIFIER)
    with pytest.raises(InvalidRequestError, match=r"output\.prompt_logprobs"):
        with_prompt(checked, prompt, [1] * 20_000, large, LIMITS)
    for length, fields, field in [
        (64, {}, "prompt"),
        (1000, {}, "prompt"),
        (64, {"chat": chat(("user", "hi"))}, "chat.messages"),
        (0, {}, "prompt"),
        (60, stopping(max_tokens=5), "stopping.max_tokens"),
    ]:
        with pytest.raises(InvalidRequestError) as caught:
            tokenised(length, **fields)
        assert caught.value.violations[0].field == field


def test_tokenize_checks_its_input():
    assert parse_tokenize(pb.TokenizeRequest(prompt="a"), INFO) == "a"
    for request in (pb.TokenizeRequest(), pb.TokenizeRequest(prompt=""), pb.TokenizeRequest(chat=chat(("x", "y")))):
        with pytest.raises(InvalidRequestError):
            parse_tokenize(request, INFO)
