"""LiteLLM's OpenAI client: prints what it finds as JSON."""

import json
import os

import litellm
from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sure: bool


def chat(**more):
    options = {"temperature": 0, "max_tokens": 8, "num_retries": 0} | more
    ask = [{"role": "user", "content": "hi"}]
    return litellm.completion("openai/target", ask, api_base=os.environ["URL"], api_key="none", **options)


def message(**more):
    return chat(**more).choices[0].message


weather = json.loads(os.environ["WEATHER"])
found = {
    "text": message().content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True)),
    "answers": len(chat(n=3).choices),
    "logprobs": len(chat(logprobs=True).choices[0].logprobs.content),
}
calling = {"tools": [weather], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
found["call"] = message(**calling).tool_calls[0].function.arguments
found["schema"] = message(response_format=Answer, max_tokens=40).content
try:
    chat(temperature=-1)
except litellm.BadRequestError as error:
    found |= {
        "status": error.status_code,
        "param": "sampling.temperature" if "sampling.temperature" in str(error) else "",
    }
stream = chat(stream=True, max_tokens=1000)
next(stream)
stream.completion_stream.close()
print(json.dumps(found))
