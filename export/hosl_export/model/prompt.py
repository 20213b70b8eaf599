"""A soft prompt (Lester et al., arXiv 2104.08691): vectors before every text, in the place of token embeddings.

A parameter and a hook of the token embedding: both are copied and traced with the model, and the rest of it needs no
change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "prompt"


def add_prompt(model: Any, tokens: int) -> nn.Parameter:
    """Let `model` read `tokens` vectors [N, D] in the place of the embeddings of every text's first N tokens.

    They are a parameter of the token embedding, `<embedding>.prompt`, still without values. Whoever tokenizes puts N
    tokens before the text, no matter which: lengths, masks and positions then count the prompt, as PEFT's do. Returns
    the parameter.
    """
    # On the embedding, so that the parameter goes with it into the half that embeds.
    embedding = model.get_input_embeddings()
    values = torch.empty(tokens, embedding.embedding_dim, device=embedding.weight.device)
    embedding.register_parameter(NAME, nn.Parameter(values))
    embedding.register_forward_hook(_put_prompt_first)
    return embedding.prompt  # type: ignore[no-any-return]


def _put_prompt_first(embedding: Any, _: object, h_BTD: Tensor) -> Tensor:
    """Take the place of the first N embeddings of each row: a forward hook."""
    prompt_ND = embedding.prompt
    return torch.cat([prompt_ND.expand(h_BTD.shape[0], -1, -1), h_BTD[:, len(prompt_ND) :]], dim=1)


@torch.no_grad()
def draw_prompt(model: Any, seed: int) -> None:
    """Give the prompt its first values: the embeddings of tokens drawn from the vocabulary, all different."""
    embedding = model.get_input_embeddings()
    order = torch.randperm(embedding.num_embeddings, generator=torch.Generator().manual_seed(seed))
    # By way of `forward`, which scales what some embeddings look up, and leaves the hook out.
    embedding.prompt.copy_(embedding.forward(order[: len(embedding.prompt)]))


def is_prompt(name: str) -> bool:
    """Whether this is the plain name of a soft prompt."""
    return name.endswith(f".{NAME}")
