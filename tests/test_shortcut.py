"""What a stage without a frost line computes: everything, and nothing that it has no use for."""

from __future__ import annotations

import tiny
import torch
import transformers

from engine.shortcut import Shortcut

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8], [6, 7, 8, 9]]), "labels": torch.tensor([0, 1])}


def classifier() -> transformers.GPT2ForSequenceClassification:
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=32, vocab_size=32, pad_token_id=0)
    torch.manual_seed(0)
    return transformers.GPT2ForSequenceClassification(config).eval()


def test_without_a_line_no_keys_are_made_and_the_loss_is_the_same() -> None:
    model = classifier()
    before = model(**BATCH)
    assert before.past_key_values is not None
    with Shortcut(model, None).replaying():
        inside = model(**BATCH)
        assert model(**BATCH, use_cache=True).past_key_values is not None, "who asks gets them"
    assert inside.past_key_values is None
    assert torch.equal(inside.loss, before.loss)
    assert model(**BATCH).past_key_values is not None


def test_a_model_that_makes_no_keys_isnt_asked() -> None:
    model = tiny.vit().eval()
    pictures = torch.zeros(2, 3, tiny.IMAGE, tiny.IMAGE)
    with Shortcut(model, None).replaying():
        inside = model(pictures)
    assert torch.equal(inside.logits, model(pictures).logits)
