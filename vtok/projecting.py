"""What a projector's configuration leaves open is read off the tower and the language model that it names."""

from __future__ import annotations

from typing import Any

from vtok.config import RunConfig
from vtok.layers.projector import ProjectorConfig

OPEN = ("in_dim", "embedding_dim", "embedding_rms")  # of the model's node; 0 = open


def is_projector(config: RunConfig) -> bool:
    """Whether the run trains a compressor between a frozen tower and a frozen language model."""
    return isinstance(config.model, ProjectorConfig)


def complete(config: RunConfig) -> Any:
    """Fill in the widths of the towers' features and of the LLM's words, and the scale of these, in `config.model`.

    Returns: the LLM, if it was loaded: whoever holds it spares the objective the second reading.
    Raises: ValueError where a width is stated and is another.
    """
    from vtok.llm import load_llm
    from vtok.vision import audio_width, load_tower

    model: Any = config.model
    if not model.in_dim and getattr(model, "source", "video") == "video":  # texts are seen by no tower
        model.in_dim = load_tower(model.tower).embedding_dim
    audio: Any = getattr(model, "audio", None)
    if audio is not None and audio.name and not audio.in_dim:
        audio.in_dim = audio_width(audio)
    llm = None
    if not model.embedding_dim or not model.embedding_rms:
        llm = load_llm(config.objective.llm, shared=not config.objective.lora.rank)
        if model.embedding_dim not in (0, llm.embedding_dim):
            raise ValueError(
                f"model.embedding_dim={model.embedding_dim}, but the words of {llm.name} are {llm.embedding_dim} wide: "
                "leave it out, it is read off the LLM"
            )
        model.embedding_dim = llm.embedding_dim
        model.embedding_rms = model.embedding_rms or llm.embedding_rms
    return llm
