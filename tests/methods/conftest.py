"""The tiny model that training's tests use."""

from tests.training.conftest import tiny_llama

__all__ = ["tiny_llama"]
