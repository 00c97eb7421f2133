"""The words of a model: its padding token, tokens that a recipe adds, and rows of weights for as many as there are.

Nothing is guessed and nothing is taken away: what a tokenizer lacks is named in the recipe, and a new row that no stage
would train is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.errors import PlanError, Problem
from engine.randomness import stable_seed
from engine.recipe import Model, Recipe


def complete(tokenizer: PreTrainedTokenizerBase, model: Model) -> None:
    """Give a tokenizer what the recipe says it lacks: new tokens, and the one that fills short texts up.

    Raises `PlanError` where no padding is named and none known, and for tokens that are there already. Where the end of
    a text doubles as padding, a model can't tell the one from the other.
    """
    for key, special in (("add_tokens", False), ("add_special_tokens", True)):
        _add(tokenizer, getattr(model, key), key, special)
    if model.pad_token:
        tokenizer.add_special_tokens({"pad_token": model.pad_token})
    elif tokenizer.pad_token is None:
        what = f"the tokenizer of {model.path} has no padding token, so texts of different lengths can't share a batch"
        known = f"`{tokenizer.eos_token}`, the end of a text, or " if tokenizer.eos_token else ""
        raise PlanError([Problem(("model", "pad_token"), what, f"write one: {known}`[PAD]`, which is then added")])


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], key: str, special: bool) -> None:
    known = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        if token in known or token in tokens[:index]:
            what = f"`{token}` is a token of {'this list' if token in tokens[:index] else 'the model'} already"
            raise PlanError([Problem(("model", key, index), what, "leave it out")])
    if tokens:
        tokenizer.add_tokens(list(tokens), special_tokens=special)


def fit(config: Any, tokenizer: Any) -> None:
    """Let a config have a padding and as many words as the tokenizer; a skeleton is then built with them."""
    text = config.get_text_config()
    text.pad_token_id, text.vocab_size = tokenizer.pad_token_id, max(text.vocab_size, len(tokenizer))


def pads_alike(config: Any, tokenizer: Any) -> list[str]:
    """Make the config's padding the tokenizer's: a decoder that classifies reads the last token that is none."""
    wanted, text = getattr(tokenizer, "pad_token_id", None), config.get_text_config()
    had = getattr(text, "pad_token_id", None)
    if wanted is None or wanted == had:
        return []
    text.pad_token_id = wanted
    return [] if had is None else [f"the config's padding token is {had}, the tokenizer's {wanted}: the latter counts"]


def grow(model: nn.Module, tokenizer: Any, recipe: Recipe) -> list[str]:
    """Give the model a row of weights for every token; returns what there is to say of it.

    A new padding token starts as the mean of the others and is never read. Tokens that are to be learnt start close to
    it, each a little off, as transformers draws them (Hewitt 2021, "Initializing new word embeddings").
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or model.main_input_name != "input_ids":
        return []
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    if len(tokenizer) <= rows:
        return []
    torch.manual_seed(stable_seed(recipe.seed, "tokens"))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=recipe.model.grows)  # pyright: ignore
    if not recipe.model.grows:
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # pyright: ignore
                if table is not None:
                    table.weight[rows:] = table.weight[:rows].mean(0)
    return [f"{len(tokenizer) - rows} new tokens start as the mean of the word embeddings"]


def tables(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights that have a row for each token: of what is read, and of what is written where untied."""
    held = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore
    rows = {id(table.weight) for table in held if table is not None and hasattr(table, "weight")}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in rows)


def refuse_unread(recipe: Recipe, config: Any, model: nn.Module) -> None:
    """Raise `PlanError` where tokens are added to a model that reads none."""
    if recipe.model.grows and (model.main_input_name != "input_ids" or not hasattr(config, "vocab_size")):
        key = "add_tokens" if recipe.model.add_tokens else "add_special_tokens"
        raise PlanError([Problem(("model", key), f"{type(model).__name__} reads no text", "leave the key out")])
