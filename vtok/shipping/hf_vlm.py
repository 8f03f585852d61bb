"""What `AutoModelForImageTextToText` makes of an export that names a VLM: its class is copied into `modeling_vtok.py`.

    folder: compressor's weights, config.json with `vlm`: name and commit
        --from_pretrained(folder, trust_remote_code=True)--> the VLM fetched by that name, the compressor before it

The VLM's weights stay where their authors keep them, under their licence; its code is transformers' own.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForImageTextToText

from vtok.llm.joined import Joined
from vtok.shipping.hf import FeatureCompressorModel

OF_VLM = ("dtype", "torch_dtype", "device_map", "max_memory", "quantization_config")
OF_BOTH = ("cache_dir", "token", "local_files_only", "force_download")


class JoinedModel(FeatureCompressorModel):
    """A compressor that is loaded together with the VLM that its config.json names."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Joined:
        """The VLM with the compressor before it, as `attach` gives it.

        How the VLM is to be loaded (dtype, device_map, quantization_config ...) is said as for the
        VLM itself; the compressor is float32, where the VLM's word embeddings are.
        """
        own = {name: kwargs.pop(name) for name in OF_VLM if name in kwargs}
        compressor = super().from_pretrained(*args, **kwargs)
        named, shared = compressor.config.vlm, {name: kwargs[name] for name in OF_BOTH if name in kwargs}
        vlm = AutoModelForImageTextToText.from_pretrained(named["name"], revision=named["revision"], **own, **shared)
        return compressor.to(vlm.get_input_embeddings().weight.device).attach(vlm)
