"""vtok: learned video compressors and variable-length tokenizers, from training to a frozen LLM."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "__version__"]


def load(path_or_repo: str, *, revision: str | None = None) -> Any:
    """The compressor in an export folder or Hub repository, in eval mode; runs no code from the folder.

    See `vtok.export.load` for arguments and errors.
    """
    from vtok.export import load as load_export  # imported late: `import vtok` costs nothing

    return load_export(path_or_repo, revision=revision)
