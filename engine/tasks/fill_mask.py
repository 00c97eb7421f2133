"""Fill-mask: predict the tokens that were hidden (BERT, Devlin et al. 2019), to make a model at home in a domain.

Which tokens are hidden follows from the seed, the epoch and the example, and from the example alone where it is judged:
two evaluations hide the same, whatever trained in between and on however many devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.randomness import stable_seed
from engine.tasks import texts
from engine.tasks.base import SEED, Example, Facts, Table, Task
from engine.tasks.columns import not_text, stop_at
from engine.tasks.texts import IGNORED

SPECIAL = "special_tokens_mask"


class FillMask(Task):
    """The hidden tokens of a text."""

    auto = "AutoModelForMaskedLM"
    columns = {"text": ("text", "sentence", "content", "review", "tweet", "document")}
    new_head = False
    streams = True
    own_metrics = ("perplexity", "accuracy")

    type: Literal["fill-mask"]
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a text is cut; the model's own limit if left out."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are hidden: 8 of 10 behind the mask, 1 behind a random token, 1 left as it is."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        stop_at(not_text(table, "text") for table in tables.values())
        return Facts()

    @property
    def draws(self) -> bool:
        return True

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        most = texts.limit(self.max_length, processor)
        encoded = processor(
            list(rows["text"]), truncation=most is not None, max_length=most, return_special_tokens_mask=True
        )
        return {**encoded, **texts.truncated(encoded)}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        from transformers import DataCollatorForLanguageModeling

        if processor.mask_token is None:
            what = "its tokenizer has no mask token, so nothing can be hidden"
            raise PlanError([Problem(("model", "path"), what, "take a model that was trained to fill masks")])
        collator = DataCollatorForLanguageModeling(processor, mlm_probability=self.mlm_probability)
        pad = texts.token_padder(processor, texts.limit(self.max_length, processor))
        return lambda examples: pad([_hidden(collator, example) for example in examples])

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per example (surprise in nats, tokens guessed right) over its hidden tokens, and how many those are."""
        import torch

        live = batch["labels"] != IGNORED
        logs = outputs.logits[live].float().log_softmax(-1)
        tokens = batch["labels"][live]
        surprise = -logs.gather(1, tokens[:, None])[:, 0]
        found = torch.stack((surprise, (logs.argmax(-1) == tokens).float()), 1)
        sums = torch.zeros(len(live), 2, device=found.device).index_add_(0, live.nonzero()[:, 0], found)
        return sums.double().cpu().numpy(), live.sum(1).cpu().numpy()

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        hidden = float(sum(references))
        surprise, hits = (float(sum(each)) for each in zip(*predictions, strict=True))
        if not hidden or surprise / hidden > 700:  # the exponential of more is beyond a float
            return dict.fromkeys(names, float("nan"))
        found = {"perplexity": exp(surprise / hidden), "accuracy": hits / hidden}
        return {name: found[name] for name in names}


def _hidden(collator: Any, example: Example) -> Example:
    """The example with some tokens hidden, and `labels` that ask for these alone."""
    import torch

    ids = example["input_ids"]
    seed = example.get(SEED)
    collator.generator = torch.Generator().manual_seed(stable_seed("mask", *ids) if seed is None else seed)
    special = torch.tensor([example[SPECIAL]])
    given, labels = collator.torch_mask_tokens(torch.tensor([ids]), special_tokens_mask=special)
    rest = {key: value for key, value in example.items() if key not in (SEED, SPECIAL)}
    return {**rest, "input_ids": given[0].tolist(), "labels": labels[0].tolist()}
