"""Peers that read the model's GGUF file themselves, its weights in 4 bits: OpenVINO GenAI and llama.cpp. Optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers import Answerer, Answers, MissingPeerError

LOOKUP_TOKENS, LOOKUP_NGRAM = 5, 3
CACHE_GB = 1


def openvino_genai(
    gguf: Path, max_tokens: int, concurrencies: list[int], eos_token_ids: frozenset[int], *, prompt_lookup: bool
) -> Answerer:
    """OpenVINO GenAI on the CPU, with as many requests at a time as asked for.

    Raises:
        MissingPeerError: it is not installed, or cannot read the file.
    """
    try:
        import openvino
        import openvino_genai as genai
    except ImportError as error:
        raise MissingPeerError(f"{error}: pip install openvino-genai") from None

    def pipeline(concurrency: int) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.cache_size = concurrency, CACHE_GB
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if prompt_lookup:
            properties["prompt_lookup"] = True
        try:
            return genai.ContinuousBatchingPipeline(str(gguf), scheduler, "CPU", properties)
        except RuntimeError as error:
            raise MissingPeerError(f"cannot load {gguf.name}: {error}") from error

    # Loading converts the whole model. One at a time needs no pipeline of its own: any takes them one by one.
    pipelines = {concurrency: pipeline(concurrency) for concurrency in {*concurrencies} - {1} or {1}}

    def answer(prompts: list[list[int]], concurrency: int) -> Answers:
        config = genai.GenerationConfig(max_new_tokens=max_tokens)
        config.do_sample = False
        config.stop_token_ids = set(eos_token_ids)
        if prompt_lookup:
            config.num_assistant_tokens, config.max_ngram_size = LOOKUP_TOKENS, LOOKUP_NGRAM
        inputs = [openvino.Tensor(np.asarray([prompt], np.int64)) for prompt in prompts]
        pipe = pipelines[max(pipelines) if concurrency == 1 else concurrency]
        together = [[one] for one in inputs] if concurrency == 1 else [inputs]
        try:
            results = [result for some in together for result in pipe.generate(some, [config] * len(some))]
        except RuntimeError as error:
            raise MissingPeerError(f"cannot run {gguf.name}: {error}") from error
        return [list(result.m_generation_ids[0]) for result in results]

    return answer


def llama_cpp(gguf: Path, max_tokens: int, context_tokens: int, eos_token_ids: frozenset[int]) -> Answerer:
    """llama.cpp through its Python package, one request after the other.

    Raises:
        MissingPeerError: it is not installed, or cannot read the file.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise MissingPeerError(f"{error}: pip install llama-cpp-python") from None
    threads = torch.get_num_threads()
    try:
        llama = Llama(str(gguf), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, verbose=False)
    except ValueError as error:
        raise MissingPeerError(f"cannot load {gguf.name}: {error}") from error

    def answer(prompts: list[list[int]], concurrency: int) -> Answers:
        answers = []
        for prompt in prompts:
            llama.reset()
            said: list[int] = []
            for token in llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
                said.append(token)
                if len(said) == max_tokens or token in eos_token_ids:
                    break
            answers.append(said)
        return answers

    return answer
