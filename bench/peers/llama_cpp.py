"""llama.cpp as a peer, through its Python package: it reads the model's GGUF file itself. Optional."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.peers.compare import Answerer, Answers, MissingPeerError


def llama_cpp(gguf: Path, max_tokens: int, context_tokens: int, eos_token_ids: frozenset[int]) -> Answerer:
    """One request after the other: the package's `generate` takes no more.

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
