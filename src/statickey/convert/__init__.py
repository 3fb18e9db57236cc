"""Swap the attention of an existing timm model."""

from .swap import ConversionReport, ConvertedModule, convert

__all__ = ["ConversionReport", "ConvertedModule", "convert"]
