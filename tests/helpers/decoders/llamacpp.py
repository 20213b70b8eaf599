"""llama.cpp's own server, from the binding xllamacpp of PyPI: the ids of a text, what comes next, how likely.

It takes ids and gives the likelihoods of the tokens that it is asked for, before any sampling.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp from PyPI, with wheels for x86-64 and aarch64")

_TYPE_F32 = xllamacpp.ggml_type.GGML_TYPE_F32


class LlamaCpp:
    """A .gguf file, served."""

    def __init__(self, path: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = context, context, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # As exact as it can: keys and values of the cache as they were computed.
        params.cache_type_k = params.cache_type_v = _TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.port, params.use_jinja, params.fit_params = False, 0, True, False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        del self._server

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to a request, or to none."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as a prompt, special tokens in it and before it."""
        ids: list[int] = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return ids

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ids that it goes on with, always the likeliest, up to the end of the text."""
        answer = self._complete(ids, n_predict=tokens, return_tokens=True)
        found: list[int] = answer["tokens"]
        return found

    def log_likelihoods(self, ids: Sequence[int], vocabulary: int) -> npt.NDArray[np.float64]:
        """Of every token of the vocabulary to come next, before any sampling."""
        # It shows none with half of a character, nor with the end of the text: the one that is drawn is a letter.
        letter = [[self.tokenize("a")[-1], 1000.0]]
        answer = self._complete(ids, n_predict=1, n_probs=vocabulary, logit_bias=letter)
        found = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
        return np.array([found[token] for token in range(vocabulary)])

    def _complete(self, ids: Sequence[int], **more: Any) -> Any:
        return self.ask(
            "/completion", prompt=list(ids), temperature=0.0, cache_prompt=False, samplers=["temperature"], **more
        )
