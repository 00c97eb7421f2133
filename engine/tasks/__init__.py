"""The tasks, by the Hub's pipeline tags. A new one is a file here and a word in `TASKS`."""

from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.text_classification import TextClassification

TASKS = (TextClassification,)

__all__ = ["TASKS", "Example", "Facts", "Table", "Task"]
