"""OpenVINO GenAI as a peer: it reads the model's GGUF file itself; its weights are then corrected. Optional.

A Q4_1 weight is `scale * q + minimum`, q of 4 bits. Its reader turns that into `scale * (q - zero)` and rounds `zero`,
which is `-minimum / scale`, to 4 bits as well. This shifts all 32 weights of a group by up to half a step, and changes
the model's output. `exact_model` restores the fraction. The weights stay in 4 bits, and a pass costs the same.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.peers.compare import Answerer, Answers, MissingPeerError

LOOKUP_TOKENS, LOOKUP_NGRAM = 5, 3
CACHE_GB = 1
Q4_1_BYTES = 20
"""Of a group of 32 weights: scale and minimum in float16, then 16 bytes of two q each."""

RowZeros = dict[bytes, np.ndarray]
"""A row's scales, float16 [groups] as bytes -> its zero points, float16 [groups]."""


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
            return genai.ContinuousBatchingPipeline(exact_model(gguf).name, scheduler, "CPU", properties)
        except RuntimeError as error:
            raise MissingPeerError(f"cannot load {gguf.name}: {error}") from error

    # Concurrency 1 needs no pipeline of its own: any of them takes requests one by one.
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


@cache
def exact_model(gguf: Path) -> TemporaryDirectory[str]:
    """The folder of OpenVINO's model and tokenizers made from a GGUF file; it is there until the process ends.

    Weights of other types than Q4_1 are left as its reader has them.
    """
    import openvino
    import openvino_genai as genai

    folder = TemporaryDirectory(prefix="treeline-openvino-")
    exact = Path(folder.name)
    with TemporaryDirectory(prefix="treeline-openvino-") as given:
        beside = Path(given, gguf.name)  # It writes its model beside the file.
        beside.symlink_to(gguf.resolve())
        genai.LLMPipeline(str(beside), "CPU", enable_save_ov_model=True)
        model = openvino.Core().read_model(Path(given, "openvino_model.xml"))
        put_zeros_right(model, row_zeros(gguf))
        openvino.save_model(model, exact / "openvino_model.xml", compress_to_fp16=False)
        for path in Path(given).glob("openvino_*tokenizer.*"):
            shutil.copy(path, exact)
    return folder


def row_zeros(gguf: Path) -> RowZeros:
    """The zero points of all rows of all Q4_1 weights."""
    from gguf import GGMLQuantizationType, GGUFReader

    zeros: RowZeros = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.tensor_type != GGMLQuantizationType.Q4_1:
            continue
        rows = tensor.data.reshape(-1, int(tensor.shape[0]) // 32, Q4_1_BYTES)
        scale, minimum = (
            np.ascontiguousarray(rows[..., start : start + 2]).view(np.float16)[..., 0] for start in (0, 2)
        )
        wide = scale.astype(np.float32)
        exact = np.divide(-minimum.astype(np.float32), wide, out=np.zeros_like(wide), where=wide != 0)
        zeros.update(zip(map(np.ndarray.tobytes, scale), exact.astype(np.float16), strict=True))
    return zeros


def put_zeros_right(model: Any, zeros: RowZeros) -> None:
    """Replace the zero points of an `openvino.Model`.

    Rows are matched by their scales, which reader and file share: names and the order of rows in a tensor differ.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        shifted, scale = (node.input_value(i).get_node() for i in (0, 1))
        if shifted.get_type_name() != "Subtract" or scale.get_type_name() != "Constant":
            continue
        keys = [row.tobytes() for row in np.asarray(scale.data)[..., 0]]
        if all(key in zeros for key in keys):
            exact = np.stack([zeros[key] for key in keys])[..., None]
            shifted.input(1).replace_source_output(opset13.constant(exact).output(0))
