"""Text from a trained model, one token at a time, with keys and values cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from llmtrain.config import Sample
from llmtrain.hardware import eagerly
from llmtrain.knobs import UserError


def generate(model: nn.Module, tokenizer: Any, settings: Sample, context: int | None = None) -> Iterator[str]:
    """Goes on from a prompt, piece by piece as soon as each is whole characters.

    Stops at the end of a text. When the context is full, its newer half is kept and goes on.

    Args:
        model: A model with `context` and `make_caches`, in evaluation mode.
        tokenizer: Turns the prompt into tokens and tokens into text.
        settings: Prompt, length and how to draw.
        context: Most tokens at once: those of a training sample, for the model has learned no later position.
            None takes all that the model has.

    Raises:
        UserError: If the prompt is empty to the tokenizer and it has no end-of-text token to begin with.
    """
    prompt = tokenizer.encode(settings.prompt).tolist() if settings.prompt else []
    if not prompt:
        if tokenizer.end is None:
            raise UserError("the prompt is empty, and this tokenizer has no token to begin a text with")
        prompt = [tokenizer.end]
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens(model, prompt, settings, context):
        if token == tokenizer.end:
            return
        piece = stream.step(tokenizer.library, token)
        if piece:
            yield piece


@torch.no_grad()
def tokens(model: Any, prompt: list[int], settings: Sample, context: int | None = None) -> Iterator[int]:
    """Token ids that follow a prompt of token ids."""
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(settings.seed)
    context = context or model.context
    seen = list(prompt)
    new, caches = seen[-context:], model.make_caches(batch=1)
    for _ in range(settings.tokens):
        if caches[0].length + len(new) > context:
            new, caches = seen[-max(context // 2, 1) :], model.make_caches(batch=1)
        with eagerly():  # the caches grow with each token
            logits = model(torch.tensor([new], device=device), caches)[0, -1]
        token = pick(logits.float(), settings, draw)
        seen.append(token)
        new = [token]
        yield token


def pick(logits: Tensor, settings: Sample, draw: torch.Generator) -> int:
    """One token id drawn from logits (vocab,) with temperature, top-k and top-p."""
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = logits / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.numel():
        smallest = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= settings.top_p  # the likeliest always stays
        probabilities = probabilities.scatter(0, order[outside], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=draw))
