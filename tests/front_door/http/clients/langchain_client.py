"""LangChain's OpenAI client: prints what it finds as JSON."""

import json
import os

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    sure: bool


def model(**more):
    options = {"model": "target", "temperature": 0, "max_tokens": 8, "max_retries": 0} | more
    return ChatOpenAI(base_url=os.environ["URL"], api_key="none", **options)


weather = json.loads(os.environ["WEATHER"])
found = {
    "text": model().invoke("hi").content,
    "streamed": "".join(chunk.text for chunk in model().stream("hi")),
    "answers": len(model(n=3).generate([[HumanMessage("hi")]]).generations[0]),
    "logprobs": len(model(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"]),
}
calling = model(max_tokens=80).bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
found["call"] = json.dumps(calling.invoke("hi").tool_calls[0]["args"])
found["schema"] = model(max_tokens=40).with_structured_output(Answer).invoke("hi").model_dump_json()
try:
    model(temperature=-1).invoke("hi")
except openai.BadRequestError as error:
    found |= {"status": error.status_code, "param": error.param}
stream = model(max_tokens=1000).stream("hi")
next(stream)
stream.close()
print(json.dumps(found))
