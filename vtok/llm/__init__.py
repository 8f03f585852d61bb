"""A frozen language model that reads a compressor's tokens: its loss, its answers, its likelihoods.

"<video>\\nQuestion: ... Answer:"   one place for a clip's tokens in every prompt           tasks.py
        |
ids with placeholders + Tokens      spliced into word embeddings, mask, labels, positions   splice.py
        |
frozen LLM                          any causal LM of transformers, by name or folder        frozen.py
        |
loss | answers | choices            teacher-forced, greedy, by likelihood                   reading.py, choices.py
questions of clips                  with their answers and choices                          questions.py
answers of parts before the whole   long videos, training-free                              parts.py

lora.py       adapters on the LLM, an option        distill.py    few tokens taught by all tokens
objective.py  the training loss of every projector family
joined.py     a trained projector inside a VLM (vtok.layers.seams, places.py); framewise.py: the second way
"""

from vtok.llm.choices import score
from vtok.llm.distill import hidden_distance, logit_divergence
from vtok.llm.framewise import swap
from vtok.llm.frozen import FrozenLLM, LLMConfig, load_llm
from vtok.llm.joined import Joined, attach
from vtok.llm.lora import Adapters, LoraConfig, load_adapted
from vtok.llm.objective import BudgetConfig, ObjectiveConfig, ProjectorObjective
from vtok.llm.parts import PartsConfig
from vtok.llm.questions import Answered, ask
from vtok.llm.reading import PLACE, Read, generate, read, tokens_at
from vtok.llm.splice import PLACEHOLDER, Spliced, splice
from vtok.llm.tasks import TaskConfig, Told, choose

__all__ = ["PLACE", "PLACEHOLDER", "Adapters", "Answered", "BudgetConfig", "FrozenLLM", "LLMConfig", "LoraConfig"]
__all__ += ["ObjectiveConfig", "PartsConfig", "ProjectorObjective", "Read", "Spliced", "TaskConfig", "Told", "ask"]
__all__ += [
    "choose",
    "generate",
    "hidden_distance",
    "load_adapted",
    "load_llm",
    "logit_divergence",
    "read",
    "score",
    "splice",
]
__all__ += ["tokens_at"]
__all__ += ["Joined", "attach", "swap"]
