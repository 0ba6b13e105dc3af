"""The names of quantisations that are served. Imports nothing: the configuration checks words by them."""

METHODS = ("awq", "gptq", "compressed-tensors", "mxfp4", "fp8", "int8", "int4", "gguf")
ONLINE = ("fp8", "int8", "int4")  # made from an unquantised checkpoint while it loads


class QuantizationError(ValueError):
    """A quantisation that is not served, or that the checkpoint contradicts; the message names both and what works."""
