"""The tasks, by the Hub's pipeline tags. A new one is a file here and a word in `TASKS`."""

from engine.tasks.audio_classification import AudioClassification
from engine.tasks.automatic_speech_recognition import AutomaticSpeechRecognition
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.fill_mask import FillMask
from engine.tasks.image_classification import ImageClassification
from engine.tasks.image_segmentation import ImageSegmentation
from engine.tasks.multiple_choice import MultipleChoice
from engine.tasks.object_detection import ObjectDetection
from engine.tasks.question_answering import QuestionAnswering
from engine.tasks.sentence_similarity import SentenceSimilarity
from engine.tasks.summarization import Summarization
from engine.tasks.text_classification import TextClassification
from engine.tasks.text_generation import TextGeneration
from engine.tasks.token_classification import TokenClassification
from engine.tasks.translation import Translation

TASKS = (
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    FillMask,
    SentenceSimilarity,
    TextGeneration,
    Summarization,
    Translation,
    ImageClassification,
    ImageSegmentation,
    ObjectDetection,
    AudioClassification,
    AutomaticSpeechRecognition,
)

__all__ = ["TASKS", "Example", "Facts", "Table", "Task"]
