"""Cut a Hugging Face model in two: a `ClientHalf` for the device, and a `Tail` for the cloud, as torch modules.

A half is the Hugging Face model itself with modules taken away: a copy of the tree of modules and of the config, around
the same tensors. So a change of a weight in place shows in both halves and in the uncut model, which the export relies
on when it rounds weights. Parameters keep the uncut model's names, but the blocks of each half count from 0;
`renumber` and `join_state` lead back. Which module belongs where is told by the family's entry in `families.py`.

The exporter cuts loaded models; `bundle.reading`, for the cloud, cuts models without memory and fills them from files.

Shapes: B batch, T tokens or positions of an image, D width of the activations, V vocabulary, L labels, S positions
asked for, C channels, H rows, W columns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hosl_export.model.families import find_family
from hosl_export.model.family import Family
from hosl_export.model.heads import class_head, linear_of
from hosl_protocol.run.manifest import ImageEntry


class ClientHalf(nn.Module):
    """Embeddings and first blocks, whose graph is the shard; or a part of them that other parts come before or after.

    `model` is the cut Hugging Face model, `image` what a model of images is given.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        image: ImageEntry | None = None,
        first_block: int = 0,
        grid: tuple[int, int] | None = None,
        embeds: bool = True,
        packs: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.image = image
        self.first_block = first_block
        self.grid = grid
        """Rows and columns of what `first_block` is given, where that is a feature map given as positions."""
        self.embeds = embeds
        """Whether it begins with the embeddings, else with what `first_block` is given."""
        self.packs = packs
        """Whether a feature map is given back as positions, as the cloud gets it."""

    @property
    def token_table(self) -> nn.Parameter | None:
        """The token embedding [V, D], of which a run only gathers the rows of its tokens; None for images and in a part
        without embeddings."""
        has_none = self.family.takes_images or not self.embeds
        return None if has_none else self.model.get_input_embeddings().weight

    @property
    def prompt_tokens(self) -> int:
        """Vectors of a soft prompt; 0 where there is none."""
        return 0 if self.token_table is None else len(getattr(self.model.get_input_embeddings(), "prompt", ()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        boundary: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] (and the mask [B, T] for an encoder), or images [B, C, H, W], to activations [B, T, D].

        In a part without embeddings what those before it computed, `boundary` [B, T, D] or a feature map [B, D, R, C],
        takes the place of ids and images.
        """
        if self.family.takes_images:
            h = self.features(pixel_values) if boundary is None else self._run_blocks(_unpack(boundary, self.grid))
            return _pack(h) if h.ndim == 4 and self.packs else h

        # With padding on the right, a causal model's real tokens never see padding: no mask, faster attention.
        mask = {"attention_mask": attention_mask} if self.family.is_encoder else {"use_cache": False}
        given = {"input_ids": input_ids} if boundary is None else {"inputs_embeds": boundary}
        blocks = list(self.model.get_submodule(self.family.blocks).children())
        with _entering(blocks, boundary), _leaving(blocks) as left:
            outputs = self.model.base_model(**given, **mask)
        h_BTD: Tensor = left[0] if left else outputs.last_hidden_state
        return h_BTD

    def features(self, pixel_values: Tensor | None) -> Tensor:
        """Images [B, C, H, W] to tokens [B, T, D], or to a feature map [B, D, rows, columns]."""
        embeddings = [self.model.get_submodule(path) for path in self.family.embeddings]
        return self._run_blocks(_run(embeddings, pixel_values))

    def _run_blocks(self, h: Tensor) -> Tensor:
        return _run(self.model.get_submodule(self.family.blocks), h)


class Tail(nn.Module):
    """The later blocks and the head. `model` is the cut Hugging Face model."""

    def __init__(self, model: Any, family: Family, grid: tuple[int, int] | None = None, prompt_tokens: int = 0) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.grid = grid
        """Rows and columns of the activations, where they are a feature map."""
        self.prompt_tokens = prompt_tokens
        """How many of a text's first positions are the device's soft prompt."""

    @property
    def classifier(self) -> nn.Module | None:
        """The head of a classification; None for a language model or a bare encoder."""
        return class_head(self.model)

    @property
    def class_count(self) -> int | None:
        """Rows of the classifier; None where there is none."""
        return None if self.classifier is None else linear_of(self.classifier)[1].out_features

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Activations [B, T, D] and mask [B, T], padded on the right, to what the model computes.

        A language model gives logits [B, T, V], or [B, V] and [B, S, V] at `positions` [B] and [B, S], where only
        those pass through the head. A classifier gives logits [B, L], read at the last real token by a causal model.
        A bare encoder gives its last hidden state [B, T, D].
        """
        if self.family.takes_images:
            return self._classify_image(inputs_embeds)
        blocks = self.blocks
        if self.family.is_encoder:
            with _entering(blocks, inputs_embeds):
                outputs = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
            return outputs[0] if self.classifier is None else outputs.logits  # type: ignore[no-any-return]

        if self.classifier is None:
            # The whole model: some scale or bound their logits.
            head = self.model.get_output_embeddings()
            with _entering(blocks, inputs_embeds), _selecting(head, positions):
                return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits  # type: ignore[no-any-return]

        h_BTD = self.base_outputs(inputs_embeds).last_hidden_state
        if positions is None:
            positions = _last_tokens(h_BTD, attention_mask)
        return self.classifier(_select(h_BTD, positions))  # type: ignore[no-any-return]

    def base_outputs(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run activations [B, T, D] through all but a head. Returns what the base model does."""
        mask = {"attention_mask": attention_mask} if self.family.is_encoder else {"use_cache": False}
        with _entering(self.blocks, inputs_embeds):
            return self.model.base_model(inputs_embeds=inputs_embeds, **mask)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that it has left."""
        path = base_prefix(self.model, self.family) + self.family.blocks
        return list(self.model.get_submodule(path).children())

    def _classify_image(self, h_BTD: Tensor) -> Tensor:
        """Logits [B, L] from the positions of each image."""
        h = _run(self.model.get_submodule(self.family.blocks), _unpack(h_BTD, self.grid))
        if self.family.final_norm is not None:
            h = self.model.get_submodule(self.family.final_norm)(h)
        pooled = h[:, 0] if self.family.pool is None else self.model.get_submodule(self.family.pool)(h)
        return self.model.classifier(pooled)  # type: ignore[no-any-return]


def _run(parts: Iterable[nn.Module], h: Any) -> Tensor:
    """Run modules one after the other."""
    for part in parts:
        h = part(h)
    return h  # type: ignore[no-any-return]


def _pack(h_BDRC: Tensor) -> Tensor:
    """Give a feature map [B, D, rows, columns] the shape of positions [B, T, D]."""
    if h_BDRC.requires_grad:
        # Its gradient comes transposed, and from such torch 2.13 computes wrong ones where B is 1.
        h_BDRC.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return h_BDRC.flatten(2).transpose(1, 2)


def _unpack(h_BTD: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Give positions [B, T, D] the shape of their feature map [B, D, rows, columns], if `grid` says that of one."""
    if grid is None:
        return h_BTD
    h_BDRC = h_BTD.transpose(1, 2).reshape(h_BTD.shape[0], -1, *grid)  # not `len`, which a trace takes for a constant
    # Transposed, each position's channels lie together. On CPUs with AVX-512 torch 2.13 crashes in the backward of such
    # a map for some shapes (8 channels, stride 2), and is no faster for any.
    return h_BDRC.contiguous() if h_BDRC.device.type == "cpu" else h_BDRC


def _last_tokens(h_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Index of each row's last real token [B]."""
    if attention_mask is None:
        return torch.full(h_BTD.shape[:1], h_BTD.shape[1] - 1, device=h_BTD.device)
    return attention_mask.sum(dim=1).long() - 1


def _select(h_BTD: Tensor, positions: Tensor) -> Tensor:
    """Pick positions [B] or [B, S] of each row, which gives [B, D] or [B, S, D]."""
    rows = torch.arange(len(h_BTD), device=h_BTD.device)
    return h_BTD[rows.view(-1, *[1] * (positions.ndim - 1)), positions]


class _Elsewhere(nn.Module):
    """Stands for a module of the other half, which the model still calls. What comes of it, nobody reads."""

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Return a tensor that the model can go on with: the activations that came in, or a scalar 0 for positions."""
        given = (each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor) and each.ndim > 2)
        return next(given, torch.zeros(()))


@contextlib.contextmanager
def _entering(blocks: Sequence[nn.Module], h: Tensor | None) -> Iterator[None]:
    """Let the first of `blocks` be given `h`, whatever the model makes before it: that was made elsewhere already."""
    if h is None or not blocks:
        yield
        return

    def replace(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if arguments:
            return (h, *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": h}

    # A hook for this one run, in which the activations are known.
    hook = blocks[0].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _leaving(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give what the last of `blocks` computes, before the model goes on with it; nothing where there is none."""
    left: list[Tensor] = []
    if not blocks:
        yield left
        return

    hook = blocks[-1].register_forward_hook(lambda _, __, h: left.append(h[0] if isinstance(h, tuple) else h))
    try:
        yield left
    finally:
        hook.remove()


@contextlib.contextmanager
def _selecting(head: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """Let a language-model head see `positions` [B] or [B, S] alone: logits of all would be gigabytes."""
    if positions is None:
        yield
        return

    hook = head.register_forward_pre_hook(lambda _, arguments: (_select(arguments[0], positions), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


def _copy_around_tensors(model: Any) -> Any:
    """Copy the tree of modules and its config, but share every tensor with `model`."""
    # What the memo has, deepcopy takes for copied.
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def client_half(model: Any, split: int, image: ImageEntry | None = None) -> ClientHalf:
    """Make the device's half: what is before the blocks, and the first `split` of the uncut `model`, which stays whole.

    `image` says what a model of images is given.
    """
    family = find_family(model.config.model_type)
    # What an encoder's task head is put on is a whole model by itself, and all that a device needs of it.
    half = _copy_around_tensors(model.base_model if base_prefix(model, family) else model)
    _keep_blocks(half, family, slice(None, split))
    for path in family.final:
        replace_module(half, path, _Elsewhere())
    return ClientHalf(half, family, image).eval()


def split_prefix(client: ClientHalf, blocks: int, grid: tuple[int, int] | None = None) -> tuple[ClientHalf, ClientHalf]:
    """Make two of a client half, which stays whole: its first `blocks`, and those that go on from them.

    `grid` is the shape of the activations between them where they are a feature map.
    """
    family, first, rest = client.family, _copy_around_tensors(client.model), _copy_around_tensors(client.model)
    _keep_blocks(first, family, slice(None, blocks))
    drop_device_part(rest, family, blocks)
    return (
        ClientHalf(first, family, client.image).eval(),
        ClientHalf(rest, family, client.image, first_block=blocks, grid=grid, embeds=False).eval(),
    )


def block_part(client: ClientHalf, block: int, grid: tuple[int, int] | None = None, *, packs: bool) -> ClientHalf:
    """Make a half of one block of a client half, which stays whole: number `block`, or -1: what is before the first.

    `grid` is the shape of what the block is given, where that is a feature map given as positions; `packs` says whether
    it gives its own back as positions.
    """
    family, model = client.family, _copy_around_tensors(client.model)
    if block < 0:
        _keep_blocks(model, family, slice(0))
        return ClientHalf(model, family, client.image, packs=packs).eval()
    drop_device_part(model, family, block)
    _keep_blocks(model, family, slice(1))
    return ClientHalf(model, family, client.image, block, grid, embeds=False, packs=packs).eval()


def tail_half(model: Any, split: int, grid: tuple[int, int] | None = None) -> Tail:
    """Make the cloud's half: the blocks of the uncut `model`, which stays whole, after the first `split`, and its head.

    `grid` is the shape of the activations where they are a feature map.
    """
    family, half = find_family(model.config.model_type), _copy_around_tensors(model)
    drop_device_part(half, family, split)
    return Tail(half, family, grid).eval()


def drop_device_part(model: Any, family: Family, split: int) -> None:
    """Take from a whole model, in place, the first `split` blocks and what comes before them."""
    prefix = base_prefix(model, family)
    _keep_blocks(model, family, slice(split, None))
    for path in family.embeddings:
        replace_module(model, prefix + path, _Elsewhere())


def base_prefix(model: Any, family: Family) -> str:
    """The prefix of parameters' names in `model` over those of the uncut model: `bert.` where it has a task head."""
    return family.base_prefix if hasattr(model, family.base_prefix.rstrip(".") or " ") else ""


def _keep_blocks(model: Any, family: Family, kept: slice) -> None:
    """Cut the list of blocks in place, and with it what the config says of each, which some models read as they run."""
    path = base_prefix(model, family) + family.blocks
    blocks = nn.ModuleList(list(model.get_submodule(path))[kept])
    replace_module(model, path, blocks)

    config = model.config
    if family.counted_by == "num_hidden_layers":
        count = config.num_hidden_layers
        for name, value in vars(config).items():
            if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
                setattr(config, name, value[kept])
        config.num_hidden_layers = len(blocks)

    # The embedding and the head are on different machines from here on, and PEFT looks for what they share.
    config.tie_word_embeddings = False


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, where the model has a module there."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if getattr(owner, name, None) is not None:
        setattr(owner, name, module)
